"""Evaluations of an aligned model beside its base: the grid of `python -m elbo_kto_jax.sweep`.

An evaluation uses the keys `seed`, `model.dtype`, `mesh`, `sampler` and `judge`, and where it estimates likelihoods
`data`, `estimator` and `train.microbatch_tokens`; they are those of kto_mix.py. Every list of `sweep` is an axis of the
grid. Settings of the tasks are in configs/tasks.py; what an entry of `sweep.sampler` sets takes precedence over them.
"""

from ml_collections import ConfigDict

from elbo_kto_jax.runtime import recipes


def get_config() -> ConfigDict:
    config = recipes.load("kto_mix")
    config.sampler.batch_size = 32  # [ours] over all devices; tasks set their own lengths
    config.sweep = {
        "checkpoints": ["GSAI-ML/LLaDA-8B-Instruct", "runs/kto_mix"],
        # "win_rate" (against `baseline`, on `prompts`), "elbo" and "exact_elbo" (of `data`), and tasks of
        # lm-evaluation-harness, by name or as YAML files. What generates is run with every entry of `sampler`,
        # what estimates a likelihood with every entry of `draws`.
        "tasks": ["gsm8k", "mmlu_generative", "arc_challenge", "hellaswag"],
        # Keys of `sampler` that an entry replaces; {}: none. A threshold fills several positions a step.
        "sampler": [{}, {"threshold": 0.9}],
        "draws": [],  # masks per example or answer, as in [1, 8, 32, 128]; []: each task's own number
        "baseline": "",
        "prompts": "",
        "data": "",
        "limit": 0,  # prompts, records or questions of each task, the first ones; 0: all
    }
    return config
