"""Our side of a benchmark, in a process of its own so that its peak memory is its own.

The first line of stdin is {"config": ..., "records": n}, and one JSON request per line follows. Each is answered by one
JSON line; that to the first says with what we compute:

    {"do": "peak"}                             flops: FLOP/s of a large matrix product in the config's dtype
    {"do": "reference"}                        elbo: B_ref of every record, nats
    {"do": "train", "elbo_ref": [...]}         loss, rewards (nats), reference_point, grad_norm of one optimizer step

"residuals" says where such a step keeps them, as config.train.residuals does; without it, the config says so. A request
that needs more memory than there is is answered by {"too_large": "..."}.
"""

import functools
import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elbo_kto_jax.models.layers import matmul_precision
from elbo_kto_jax.models.network import abstract_params
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.scoring.scorer import Kept, Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training.setup import prepare
from elbo_kto_jax.training.step import Batch, build_programs, train_step

_PEAK_SIZES = {"cpu": (2048, 1)}  # of a square matrix, and products at a stretch
_LARGE = (8192, 10)  # for everything that is no CPU
_PEAK_TRIES = 5


def main() -> None:
    setting = json.loads(sys.stdin.readline())
    config, records = Config.from_mapping(setting["config"]), np.arange(setting["records"])
    rules.split_cpu(config.mesh)
    setup = prepare(config, skip_bad=False)
    draws = config.estimator.draws
    tx = train_state.optimizer(config.optimizer, 100)
    shardings = train_state.state_shardings(tx, abstract_params(setup.model), setup.mesh, setup.model.config)
    scorer = setup.scorer()
    programs = build_programs(scorer, setup.objective, draws=draws, tx=tx, shardings=shardings)
    scorers: dict[Kept | None, Scorer] = {None: scorer}
    params = setup.load_params(config.model.path, "--config.model.path")

    def reference(batch: Batch, request: dict) -> Callable[[], dict]:
        def run() -> dict:
            return {"elbo": np.asarray(scorer(params, batch.micro_batches)).reshape(-1, draws).mean(axis=1).tolist()}

        return run

    def train(batch: Batch, request: dict) -> Callable[[], dict]:
        state = train_state.init_state(tx, jax.tree.map(jnp.copy, params), shardings)  # steps donate it
        elbo_ref = np.repeat(np.asarray(request["elbo_ref"], np.float32), draws)
        way: Kept | None = request.get("residuals")
        if way is not None and way not in scorers:
            scorers[way] = scorer.keeping(way)
        asked = programs._replace(scorer=scorers[way])

        def run() -> dict:
            new, metrics = jax.block_until_ready(train_step(asked, state, batch, elbo_ref))
            del new
            rewards = np.asarray(metrics.pop("reward"))
            return {"rewards": rewards.tolist(), **{name: float(value) for name, value in metrics.items()}}

        return run

    answer: dict[str, Any] = {"jax": jax.__version__}
    while True:
        print(json.dumps(answer), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        if request["do"] == "peak":
            answer = {"flops": matrix_peak(config.model.dtype)}
            continue
        run = {"reference": reference, "train": train}[request["do"]](setup.data.batch_of(records), request)
        answer = timed(run)


def timed(run: Callable[[], dict]) -> dict:
    """The answer of `run`, its seconds, and this process's peak memory; or that there is not enough memory for it."""
    began = time.perf_counter()
    try:
        answer = run()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"too_large": str(error).splitlines()[0]}
    return answer | {"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The largest memory that this process has had: of the accelerator, or the resident set.

    On Linux ru_maxrss starts at that of the parent, so the resident set is read elsewhere.
    """
    statistics = jax.local_devices()[0].memory_stats()
    if statistics:
        return statistics["peak_bytes_in_use"]
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))
        if found is None:
            raise ValueError(f"{status}: expected a line VmHWM")
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def matrix_peak(dtype: str) -> float:
    """FLOP/s of a large matrix product, the best of a few."""
    size, repeats = _PEAK_SIZES.get(jax.default_backend(), _LARGE)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(functools.partial(jnp.matmul, precision=matmul_precision(dtype)))
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(_PEAK_TRIES):
        began = time.perf_counter()
        jax.block_until_ready([product(x, x) for _ in range(repeats)])
        seconds.append((time.perf_counter() - began) / repeats)
    return 2 * size**3 / min(seconds)


if __name__ == "__main__":
    main()
