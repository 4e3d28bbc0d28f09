"""A conversation with an aligned model (python -m elbo_kto_jax.chat): kto_mix.py's model, and a sampler that is quick.

The block length, the threshold and the reuse of keys and values are those of Fast-dLLM (arXiv 2505.22618).
"""

from ml_collections import ConfigDict

from elbo_kto_jax.runtime import recipes


def get_config() -> ConfigDict:
    config = recipes.load("kto_mix")
    config.mesh = {"data": 1, "fsdp": 1, "tensor": -1}  # one row: its heads are spread, not the rows
    config.sampler = {
        "gen_length": 256,  # at most; where that is more than half of what the model takes, as many blocks as fit there
        "steps": 256,
        "block_length": 32,
        "temperature": 0.0,
        "cfg_scale": 0.0,
        "remasking": "low_confidence",
        "logits_eos_inf": False,
        "confidence_eos_eot_inf": False,
        "threshold": 0.9,
        "cache": "dual",
        "early_stop": True,
        "batch_size": 1,
    }
    return config
