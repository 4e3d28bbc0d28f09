"""A tiny model on a CPU in minutes: the settings of the quickstart (launch/quickstart.sh).

`tiny.py:sft` is the fine-tuning that makes the quickstart's starting model, `tiny.py` the alignment of that. The values
were chosen on the quickstart's task, where every example has 24 tokens; those of the method itself are kto_mix.py's,
but for beta and the reference point.
"""

from ml_collections import ConfigDict


def get_config(objective: str = "elbo_kto") -> ConfigDict:
    fine_tuning = objective == "sft"
    return ConfigDict(
        {
            "seed": 0,
            "model": {
                "path": "",  # given on the command line
                "dtype": "float32",  # CPUs are no faster in bfloat16
                "param_dtype": "float32",
                "mask_token_id": -1,  # what config.json, the tokenizer or the authors say
                "remat": "none",  # memory is no concern
            },
            "data": {
                "train": "",  # given on the command line
                "eval": "",
                "max_length": 128,  # five examples to a packed row
                "packing": True,
                "append_eot": True,  # the model has to learn where an answer ends
                "desirable_fraction": 1.0,
                "undesirable_fraction": 1.0,
            },
            "objective": {
                "name": objective,
                # The log-ratio of an answer of six tokens is a few nats. With the 0.1 of long answers it saturates
                # tens of nats away from the reference, where a tiny model has lost good answers along with bad ones.
                "beta": 1.0,
                "desirable_weight": 1.0,
                "undesirable_weight": 1.0,
                # Half of the answers are bad and lose tens of nats. The batch's mean follows them down, good answers
                # then saturate, and nothing holds them: from there rounding decides whether they are lost as well.
                "reference_point": "zero",
                "label_smoothing": 0.0,  # of objectives on pairs
            },
            "estimator": {
                "draws": 1 if fine_tuning else 2,  # fine-tuning averages over examples anyway; rewards need less noise
                "scheme": "stratified",
            },
            "reference": {"mode": "precomputed", "path": ""},  # "": the model that training starts from
            "optimizer": {
                # From random weights, and as far as a tiny model bears; then an alignment that keeps what was learnt.
                "learning_rate": 5e-3 if fine_tuning else 1e-4,
                "warmup_fraction": 0.1 if fine_tuning else 0.03,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
            },
            "train": {
                "epochs": 0,  # `steps` counts
                "steps": 800 if fine_tuning else 240,
                "global_batch_size": 64 if fine_tuning else 32,  # with the draws, 64 sequences a step
                "microbatch_tokens": 1664,  # 13 rows, which hold them
                "one_pass_microbatches": 1,
                "checkpoint_every": 100,
                "eval_every": 0,
                "log_every": 1,
                "samples": 4,
                "on_bad_numbers": "stop",  # "skip": leave such steps out, up to 10 in a row
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "lora": {"rank": 0, "alpha": 1.0, "base_quantization": "none"},
            "sampler": {
                "gen_length": 6,  # five letters and the end of the turn
                "steps": 6,
                "block_length": 6,
                # Temperature 1 and a random order of positions: a model of two minds answers either way, as often as it
                # has learnt to. Greedy decoding shows the likelier way alone, and confident positions first favour one.
                "temperature": 1.0,
                "cfg_scale": 0.0,
                "remasking": "random",
                "logits_eos_inf": False,
                "confidence_eos_eot_inf": False,
                "threshold": 0.0,
                "cache": "none",
                "early_stop": False,
                "batch_size": 125,
            },
            "tasks": "",  # benchmarks of `evaluate`, "gsm8k,arc_challenge"; their settings: configs/tasks.py
        }
    )
