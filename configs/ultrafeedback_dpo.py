"""LLaDA-8B-Instruct aligned on UltraFeedback-Binary's pairs with ELBO-DPO: VRPO, the method behind LLaDA 1.5.

Everything that is not stated here is as in ultrafeedback_binary.py, so that the two compare unpaired and paired
feedback. Numbers marked [vrpo] are published (arXiv 2505.19223); [ours] are choices: the publication's batch, rate and
beta were not at hand.
"""

from ml_collections import ConfigDict

from elbo_kto_jax.runtime import recipes


def get_config() -> ConfigDict:
    config = recipes.load("ultrafeedback_binary")
    config.objective.name = "elbo_dpo"  # [vrpo]
    config.objective.beta = 0.1  # [ours]
    config.objective.label_smoothing = 0.0  # [vrpo]
    config.estimator.draws = 8  # [vrpo] per completion
    config.estimator.scheme = "uniform"  # [vrpo] each draw has its own l
    config.train.global_batch_size = 64  # [ours] completions: 32 pairs
    return config
