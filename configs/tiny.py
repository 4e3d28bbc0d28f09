"""A tiny model on a CPU in minutes: the settings of the quickstart (launch/quickstart.sh).

The values are ours, chosen on the quickstart's task; the method's own settings are those of kto_mix.py unless a line says why not.
`tiny.py:sft` is the fine-tuning that makes the quickstart's starting model.
"""

from ml_collections import ConfigDict


def get_config(objective: str = "elbo_kto") -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "model": {"path": "", "dtype": "float32", "param_dtype": "float32", "remat": "none"},
            "data": {
                "train": "",
                "eval": "",
                "max_length": 64,
                "packing": True,
                "append_eot": True,
                "desirable_fraction": 1.0,
                "undesirable_fraction": 1.0,
            },
            "objective": {
                "name": objective,
                "beta": 0.1,
                "desirable_weight": 1.0,
                "undesirable_weight": 1.0,
                "reference_point": "global_mean",
            },
            "estimator": {"draws": 4, "scheme": "stratified"},
            "reference": {"mode": "precomputed", "path": ""},
            "optimizer": {
                "learning_rate": 1e-3,
                "warmup_fraction": 0.03,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
            },
            "train": {
                "epochs": 0,
                "steps": 100,
                "global_batch_size": 32,
                "microbatch_tokens": 2048,
                "checkpoint_every": 100,
                "eval_every": 0,
                "log_every": 1,
                "samples": 4,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "lora": {"rank": 0, "alpha": 1.0, "base_quantization": "none"},
            "sampler": {
                "gen_length": 16,
                "steps": 16,
                "block_length": 16,
                "temperature": 0.0,
                "cfg_scale": 0.0,
                "remasking": "low_confidence",
                "logits_eos_inf": False,
                "confidence_eos_eot_inf": False,
                "threshold": 0.0,
                "cache": "none",
                "batch_size": 64,
            },
        }
    )
