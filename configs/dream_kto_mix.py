"""Dream-v0-Instruct-7B aligned on kto-mix-14k with ELBO-KTO.

Everything that is not stated here is as in kto_mix.py. [dream] marks what its authors publish (arXiv 2508.15487,
github.com/DreamLM/Dream), [ours] is a choice. Not yet run at this size.

Dream-Coder-7B and DiffuCoder-7B are the same network: give their id as --config.model.path.
"""

from ml_collections import ConfigDict

from elbo_kto_jax.runtime import recipes


def get_config() -> ConfigDict:
    config = recipes.load("kto_mix")
    config.model.path = "Dream-org/Dream-v0-Instruct-7B"  # [dream]
    config.data.max_length = 2048  # [dream] prompt and response, says the README; config.json's 131072 is Qwen2.5's
    config.sampler.gen_length = 256  # [dream] GSM8K's settings, for the samples of the report
    config.sampler.steps = 256  # [dream]
    config.sampler.block_length = 256  # [dream] its sampler has no blocks
    config.sampler.temperature = 0.0  # [ours] theirs is 0.1 with top_p 0.9, which is not implemented here
    config.sampler.remasking = "low_confidence"  # [ours] their "maskgit_plus"; their choice is "entropy"
    return config
