"""iLLaDA-8B-Instruct aligned on kto-mix-14k with ELBO-KTO.

iLLaDA has been fine-tuned on demonstrations only; its authors name preference alignment as the next step. Everything
that is not stated here is as in kto_mix.py. [illada] marks what its authors publish (arXiv 2606.25331,
github.com/ML-GSAI/LLaDA), [ours] is a choice. Not yet run at this size.
"""

from ml_collections import ConfigDict

from elbo_kto_jax.runtime import recipes


def get_config() -> ConfigDict:
    config = recipes.load("kto_mix")
    config.model.path = "GSAI-ML/iLLaDA-8B-Instruct"  # [illada] hub id, as their README links it
    config.model.mask_token_id = -1  # [illada] config.json names none; models/illada.py has the README's 5
    config.data.max_length = 4096  # [ours] as LLaDA's, to compare the two; the model was trained with 8192
    # config.sampler: [illada] "can directly reuse the existing LLaDA inference code", so LLaDA's settings stand
    return config
