"""LLaDA-8B-Instruct aligned on kto-mix-14k with ELBO-KTO: the run behind the paper's 65.9% (arXiv 2510.23658).

Numbers marked [paper] are the authors' published settings, [llada] are of LLaDA (arXiv 2502.09992), [ours] are choices
that the publications leave open; none is a hidden default.
"""

from ml_collections import ConfigDict

_MODEL = {
    "path": "GSAI-ML/LLaDA-8B-Instruct",  # [paper]
    "dtype": "bfloat16",  # [paper] bf16 compute; log-probabilities and norms are float32 in any case
    "param_dtype": "float32",  # [ours] a bfloat16 weight has an update of 1e-6 in expectation only
    "mask_token_id": -1,  # what config.json, the tokenizer or the authors say
    "remat": "full",  # [paper] activation checkpointing
}
_DATA = {
    "train": "trl-lib/kto-mix-14k",  # [paper]
    "weights": [],  # of several data sets in a list
    "eval": "",  # [ours] another split: "trl-lib/kto-mix-14k:test"
    "max_length": 4096,  # [paper] tokens
    "packing": True,  # [ours] the authors pad every row to 4096; False does that
    "append_eot": False,  # [paper]
    "desirable_fraction": 1.0,  # [paper] n_D
    "undesirable_fraction": 1.0,  # [paper] n_U
    "cache": "",  # [ours] beside the working folder
}
_OBJECTIVE = {
    "name": "elbo_kto",
    "beta": 0.1,  # [paper] the example's value; the authors' command line has 0.2 as its default
    "desirable_weight": 1.0,  # [paper] lambda_D
    "undesirable_weight": 1.0,  # [paper] lambda_U
    "reference_point": "global_mean",  # [paper]
    "label_smoothing": 0.0,  # of objectives on pairs
}
_ESTIMATOR = {
    "draws": 8,  # [paper] 1, 2, 4 and 8 studied
    "scheme": "uniform",  # [paper]
}
_REFERENCE = {
    "mode": "precomputed",  # [paper]
    "path": "",  # [paper] the model itself
}
_OPTIMIZER = {
    "learning_rate": 1e-6,  # [paper] the example's value; the command line has 5e-6 as its default
    "schedule": "cosine",  # [paper] also "linear" and "constant"
    "warmup_fraction": 0.03,  # [paper]
    "b1": 0.9,  # [paper]
    "b2": 0.95,  # [paper]
    "weight_decay": 0.01,  # [paper]
    "clip_norm": 1.0,  # [paper]
    "moments_dtype": "float32",  # [ours]
}
_TRAIN = {
    "epochs": 1,  # [paper]
    "steps": 0,
    "global_batch_size": 32,  # [ours] the paper states one example per device and no device count
    "microbatch_tokens": 4096,  # [ours] one row per chip, what a 16 GB chip holds
    "residuals": "auto",  # [ours] the fastest that fits; the paper keeps them on the device, for one example
    "checkpoint_every": 100,  # [ours]
    "keep_checkpoints": 2,  # [ours] each is 95 GB; 0: all
    "keep_best": "eval_loss",  # [ours] where eval_every is set, the best by this stays, too; "": none
    "patience": 0,  # [ours] run to the end; else end after so many evaluations without a better one
    "eval_every": 0,  # [ours] no held-out data above
    "log_every": 1,  # [ours]
    "samples": 4,  # [ours]
    "on_bad_numbers": "stop",  # "skip": leave such steps out, up to 10 in a row
}
_SAMPLER = {  # [llada] GSM8K's settings, for the samples of the report
    "gen_length": 256,
    "steps": 256,
    "block_length": 8,
    "temperature": 0.0,
    "cfg_scale": 0.0,
    "remasking": "low_confidence",
    "logits_eos_inf": False,
    "confidence_eos_eot_inf": False,
    "threshold": 0.0,  # [ours] off: exact decoding
    "cache": "none",  # [ours]
    "early_stop": False,  # [llada] the whole response is written
    "batch_size": 8,  # [ours]
}
_JUDGE = {  # of `evaluate` and `sweep`
    "name": "verifiable",  # compares answers with the records' `answer`; "chat": a model behind an endpoint
    "model": "",  # chat: its name; "": JUDGE_MODEL of the environment
    "prompt": "",  # chat: a file, what to ask; "": elbo_kto_jax/evaluation/judge_prompt.txt
    "temperature": 0.0,  # chat: "none": none is sent
    "parallel": 8,  # chat: requests at once
    "requests_per_minute": 0.0,  # chat: 0: no limit of our own
    "timeout": 120.0,  # chat: seconds of one attempt
    "retries": 6,  # chat: of a failed request
}


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # [ours]
            "model": _MODEL,
            "data": _DATA,
            "objective": _OBJECTIVE,
            "estimator": _ESTIMATOR,
            "reference": _REFERENCE,
            "optimizer": _OPTIMIZER,
            "train": _TRAIN,
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},  # [paper] FSDP over all devices
            # [paper] full fine-tuning
            "lora": {"rank": 0, "alpha": 1.0, "base_quantization": "none", "targets": [], "path": ""},
            "sampler": _SAMPLER,
            "tasks": "",  # benchmarks of `evaluate`, "gsm8k,arc_challenge"; their settings: configs/tasks.py
            "benchmarks": {"table": "", "limit": 0},  # "": configs/tasks.py; examples per task, 0: all
            "judge": _JUDGE,
            "trackers": ["tensorboard"],
        }
    )
