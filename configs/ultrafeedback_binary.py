"""LLaDA-8B-Instruct aligned on UltraFeedback-Binary with ELBO-KTO: the run behind the paper's 62.3% (arXiv 2510.23658).

The pairs (prompt, chosen, rejected) are split into two unpaired examples each. The paper states no settings of its own
for this data set, so all others are those of kto_mix.py.
"""

from ml_collections import ConfigDict

from elbo_kto_jax.runtime import recipes


def get_config() -> ConfigDict:
    config = recipes.load("kto_mix")
    config.data.train = "trl-lib/ultrafeedback_binarized"  # [paper] names UltraFeedback-Binary; this is its TRL form
    config.data.eval = ""  # [ours] another split: "trl-lib/ultrafeedback_binarized:test"
    return config
