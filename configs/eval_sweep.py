"""Evaluations of an aligned model beside its base: the grid of `python -m elbo_kto_jax.sweep`.

The keys up to `sweep` are those of every config: an evaluation uses `seed`, `model.dtype`, `mesh` and `sampler`, and
where it estimates likelihoods `data`, `estimator` and `train.microbatch_tokens`; the rest belongs to training. Every
list of `sweep` is an axis of the grid. Settings of the tasks are in configs/tasks.py; what an entry of `sweep.sampler`
sets takes precedence over them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # [ours]
            "model": {
                "path": "GSAI-ML/LLaDA-8B-Instruct",  # [paper]
                "dtype": "bfloat16",  # [paper] bf16 compute; log-probabilities and norms are float32 in any case
                "param_dtype": "float32",  # [ours] an update of 1e-6 is lost in a bfloat16 weight
                "mask_token_id": -1,  # what config.json, the tokenizer or the authors say
                "remat": "full",  # [paper] activation checkpointing
            },
            "data": {
                "train": "trl-lib/kto-mix-14k",  # [paper]
                "eval": "",  # [ours] another split: "trl-lib/kto-mix-14k:test"
                "max_length": 4096,  # [paper] tokens
                "packing": True,  # [ours] the authors pad every row to 4096; False does that
                "append_eot": False,  # [paper]
                "desirable_fraction": 1.0,  # [paper] n_D
                "undesirable_fraction": 1.0,  # [paper] n_U
            },
            "objective": {
                "name": "elbo_kto",
                "beta": 0.1,  # [paper] the example's value; the authors' command line has 0.2 as its default
                "desirable_weight": 1.0,  # [paper] lambda_D
                "undesirable_weight": 1.0,  # [paper] lambda_U
                "reference_point": "global_mean",  # [paper]
                "label_smoothing": 0.0,  # of objectives on pairs
            },
            "estimator": {
                "draws": 8,  # [paper] 1, 2, 4 and 8 studied
                "scheme": "uniform",  # [paper]
            },
            "reference": {
                "mode": "precomputed",  # [paper]
                "path": "",  # [paper] the model itself
            },
            "optimizer": {
                "learning_rate": 1e-6,  # [paper] the example's value; the command line has 5e-6 as its default
                "warmup_fraction": 0.03,  # [paper]
                "b1": 0.9,  # [paper]
                "b2": 0.95,  # [paper]
                "weight_decay": 0.01,  # [paper]
                "clip_norm": 1.0,  # [paper]
            },
            "train": {
                "epochs": 1,  # [paper]
                "steps": 0,
                "global_batch_size": 32,  # [ours] the paper states one example per device and no device count
                "microbatch_tokens": 4096,  # [ours] one row per chip, what a 16 GB chip holds
                "one_pass_microbatches": 1,  # [ours] more of them: faster, where they fit
                "checkpoint_every": 100,  # [ours]
                "eval_every": 0,  # [ours] no held-out data above
                "log_every": 1,  # [ours]
                "samples": 4,  # [ours]
                "on_bad_numbers": "stop",
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},  # [paper] FSDP over all devices
            "lora": {"rank": 0, "alpha": 1.0, "base_quantization": "none"},  # [paper] full fine-tuning
            "sampler": {  # [llada] for win rates; tasks set their own lengths (configs/tasks.py)
                "gen_length": 256,
                "steps": 256,
                "block_length": 8,
                "temperature": 0.0,
                "cfg_scale": 0.0,
                "remasking": "low_confidence",
                "logits_eos_inf": False,
                "confidence_eos_eot_inf": False,
                "early_stop": False,  # [llada] the whole response is written
                "threshold": 0.0,
                "cache": "none",
                "batch_size": 32,  # [ours] over all devices
            },
            "tasks": "",  # of `evaluate`; a sweep has its own list
            "sweep": {
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
                "limit": 0,  # examples per task; 0: all
            },
        }
    )
