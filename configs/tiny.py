"""A tiny model on a CPU in minutes: the settings of the quickstart (launch/quickstart.sh).

`tiny.py:sft` is the fine-tuning that makes the quickstart's starting model, `tiny.py` the alignment of that. The values
were chosen on the quickstart's task, where every example has 24 tokens; all others are those of kto_mix.py.
"""

from ml_collections import ConfigDict

from elbo_kto_jax.runtime import recipes


def get_config(objective: str = "elbo_kto") -> ConfigDict:
    config = recipes.load("kto_mix")
    config.model.path = ""  # given on the command line
    config.model.dtype = "float32"  # CPUs are no faster in bfloat16
    config.model.remat = "none"  # memory is no concern
    config.data.train = ""  # given on the command line
    config.data.max_length = 128  # five examples to a packed row
    config.data.append_eot = True  # the model has to learn where an answer ends
    config.objective.name = objective
    # The log-ratio of an answer of six tokens is a few nats. With the 0.1 of long answers it saturates tens of nats
    # away from the reference, where a tiny model has lost good answers along with bad ones.
    config.objective.beta = 1.0
    # Half of the answers are bad and lose tens of nats. The batch's mean follows them down, good answers then saturate,
    # and nothing holds them: from there rounding decides whether they are lost as well.
    config.objective.reference_point = "zero"
    config.estimator.draws = 2  # rewards need less noise
    config.estimator.scheme = "stratified"
    config.optimizer.learning_rate = 1.5e-4  # keeps what was learnt; with less, rounding decides how far 240 steps get
    config.train.epochs = 0  # `steps` counts
    config.train.steps = 240
    config.train.global_batch_size = 32  # with the draws, 64 sequences a step
    config.train.microbatch_tokens = 1664  # 13 rows, which hold them
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.sampler = {
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
    }
    if objective == "sft":
        config.estimator.draws = 1  # fine-tuning averages over examples anyway
        config.optimizer.learning_rate = 5e-3  # from random weights, and as far as a tiny model bears
        config.optimizer.warmup_fraction = 0.1
        config.train.steps = 800
        config.train.global_batch_size = 64
    return config
