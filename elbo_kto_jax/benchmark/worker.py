"""Our side of a benchmark, in a process of its own so that its peak memory is its own.

The first line of stdin is {"config": ..., "records": n}, and one JSON request per line follows. Each is answered by one
JSON line; that to the first says with what we compute:

    {"do": "peak"}                             flops: FLOP/s of a large float32 matrix product
    {"do": "reference"}                        elbo: B_ref of every record, nats
    {"do": "train", "elbo_ref": [...]}         loss, rewards (nats), reference_point, grad_norm of one optimizer step

"one_pass": true or false says how many passes such a step takes over its micro-batches; without it, the config does.
"""

import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from elbo_kto_jax.config import Config
from elbo_kto_jax.model.llada import abstract_params
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.train import state as train_state
from elbo_kto_jax.train.setup import prepare
from elbo_kto_jax.train.step import Batch, build_programs, score, train_step

_PEAK_SIZE, _PEAK_TRIES = 2048, 5


def main() -> None:
    setting = json.loads(sys.stdin.readline())
    config, records = Config.from_mapping(setting["config"]), np.arange(setting["records"])
    rules.split_cpu(config.mesh)
    setup = prepare(config, skip_bad=False)
    draws = config.estimator.draws
    tx = train_state.optimizer(config.optimizer, 100)
    shardings = train_state.state_shardings(tx, abstract_params(setup.model), setup.mesh)
    programs = build_programs(
        setup.model,
        setup.mesh,
        num_examples=len(records),
        draws=draws,
        objective=config.objective,
        one_pass_microbatches=config.train.one_pass_microbatches,
        tx=tx,
        shardings=shardings,
    )
    passes = {None: config.train.one_pass_microbatches, True: sys.maxsize, False: 1}
    params = setup.load_params(config.model.path, "--config.model.path")

    def reference(batch: Batch, request: dict) -> Callable[[], dict]:
        def run() -> dict:
            estimates = score(programs, params, [programs.place_rows(rows) for rows in batch.micro_batches])
            return {"elbo": np.asarray(estimates).reshape(-1, draws).mean(axis=1).tolist()}

        return run

    def train(batch: Batch, request: dict) -> Callable[[], dict]:
        state = train_state.init_state(tx, jax.tree.map(jnp.copy, params), shardings)  # steps donate it
        elbo_ref = np.repeat(np.asarray(request["elbo_ref"], np.float32), draws)
        asked = programs._replace(one_pass_microbatches=passes[request.get("one_pass")])

        def run() -> dict:
            new, metrics = jax.block_until_ready(train_step(asked, state, batch, elbo_ref))
            del new
            rewards = np.asarray(metrics.pop("reward"))
            return {"rewards": rewards.tolist(), **{name: float(value) for name, value in metrics.items()}}

        return run

    answer = {"jax": jax.__version__}
    while True:
        print(json.dumps(answer), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        if request["do"] == "peak":
            answer = {"flops": matrix_peak()}
            continue
        run = {"reference": reference, "train": train}[request["do"]](setup.data.batch_of(records), request)
        began = time.perf_counter()
        answer = run()
        answer["seconds"] = time.perf_counter() - began
        answer["peak_bytes"] = peak_bytes()


def peak_bytes() -> int:
    """The largest resident set that this process has had; on Linux ru_maxrss starts at that of the parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def matrix_peak() -> float:
    """FLOP/s of a large float32 matrix product, the best of a few."""
    x = jnp.ones((_PEAK_SIZE, _PEAK_SIZE))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    product(x).block_until_ready()
    seconds = []
    for _ in range(_PEAK_TRIES):
        began = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * _PEAK_SIZE**3 / min(seconds)


if __name__ == "__main__":
    main()
