"""Several processes that run one program: start-up, who writes, agreement, and an end when one of them is lost.

Every process of a job runs the same command. Where it learns of the others, first match:

    --coordinator=HOST:PORT --num-processes=N --process-id=I    or JAX_COORDINATOR_ADDRESS, _NUM_PROCESSES, _PROCESS_ID
    SLURM                       a step of `srun` with more than one task; on GPUs one task per device
    TPU VM slice, GKE, XPK      machines with TPU chips: their metadata server, or TPU_WORKER_HOSTNAMES and MEGASCALE_*

Process 0 writes every file but Orbax's. A process that fails leaves at once; one that is killed, or whose machine is
lost, is noticed LOST_AFTER seconds later at the latest, and the others end with an error. The same command, with
another number of processes if need be, goes on from the latest checkpoint.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from elbo_kto_jax.runtime.errors import UserError

log = logging.getLogger(__name__)
START_WITHIN = 300  # seconds that the processes wait for each other at the start
LOST_AFTER = 60  # seconds without a sign of life after which a process counts as lost
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of this job. Must come before anything runs on a device; one process alone needs nothing.

    Raises:
      UserError: the flags or variables do not fit together, or this process cannot listen or find the others.
    """
    if jax.distributed.is_initialized():
        return
    found = arguments((coordinator, num_processes, process_id), os.environ)
    if found is None:
        return
    # jax itself ends a process that waits in vain, with a long message after this one.
    log.info("waiting up to %d seconds for the other processes of this job", START_WITHIN)
    # On CPUs, two programs at once would wait for each other's collectives.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=START_WITHIN,
            heartbeat_timeout_seconds=LOST_AFTER,
            shutdown_timeout_seconds=LOST_AFTER,
        )
    except (ValueError, RuntimeError) as error:
        if not found and "coordinator_address" in str(error):
            return  # TPU chips, but neither a metadata server nor GKE's variables: one machine
        reason = str(error).splitlines()[0]
        raise UserError(
            f"this process cannot join the others of its job ({reason});\n"
            "check --coordinator, --num-processes and --process-id where they are given"
        ) from error
    if not is_first():
        # Bars of the others would only repeat those of process 0.
        init = tqdm.__init__

        def init_silent(self: tqdm, *args: Any, **options: Any) -> None:
            init(self, *args, **{**options, "disable": True})

        tqdm.__init__ = init_silent


def arguments(
    flags: tuple[str | None, int | None, int | None], environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` has to be told; nothing where it finds out itself; None: one process.

    Raises:
      UserError: some of the flags or variables are missing or wrong.
    """
    values = [environment.get(name) if flag is None else flag for name, flag in zip(_VARIABLES, flags, strict=True)]
    if any(value is not None for value in values):
        coordinator = "" if values[0] is None else str(values[0])
        try:
            num_processes, process_id = (int(number) for number in values[1:] if number is not None)
        except ValueError:  # one is missing, or is no number
            num_processes, process_id = 0, 0
        if not coordinator or ":" not in coordinator or not 0 <= process_id < num_processes:
            raise UserError(
                "expected --coordinator=HOST:PORT, --num-processes=N and --process-id=0..N-1 together (or "
                f"{', '.join(_VARIABLES)}), got {', '.join(map(str, values))}"
            )
        if num_processes == 1:
            return None
        return {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return {"cluster_detection_method": "slurm"}
    # jax sets TPU_ML_PLATFORM, when it is imported, where there are TPU chips.
    if "TPU_ML_PLATFORM" in environment and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return {}
    return None


def several() -> bool:
    """Whether this job has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which writes files and the summary; also where it is the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def first(action: Callable[[], Any]) -> None:
    """Process 0 does `action` while the others wait.

    Raises:
      UserError: in every process, where it failed in process 0.
    """
    failed = None
    if is_first():
        try:
            action()
        except Exception as error:  # whatever it is, the others must hear of it
            failed = error
    if several() and not multihost_utils.broadcast_one_to_all(np.int32(failed is None)) and failed is None:
        raise UserError("process 0 could not go on; its message says why")
    if failed is not None:
        raise failed


def of_first(tree: Any) -> Any:
    """The arrays of process 0 in every process; shapes and dtypes are equal in all of them."""
    return jax.tree.map(np.array, multihost_utils.broadcast_one_to_all(tree)) if several() else tree


def json_of_first(value: Any) -> Any:
    """The value of process 0, which JSON can hold, in every process."""
    if not several():
        return value
    text = json.dumps(value).encode()
    size = int(of_first(np.int32(len(text))))
    mine = np.frombuffer(text[:size].ljust(size), np.uint8)  # the others' only has to have the size
    return json.loads(of_first(mine).astype(np.uint8).tobytes())


def together(asked_here: Callable[[], bool]) -> Callable[[], bool]:
    """Whether any process was asked to do something (to stop, say), so that all of them do it at the same point.

    With several processes the answer is that to the question of the call before, so that no device waits for the host;
    all of them must call it equally often, and between the same programs.
    """
    if not several():
        return asked_here
    mesh = Mesh(np.array(jax.devices()), ("all",))
    split, everywhere = NamedSharding(mesh, P("all")), NamedSharding(mesh, P())
    any_of = jax.jit(jnp.max, out_shardings=everywhere)
    votes = []

    def asked_anywhere() -> bool:
        mine = np.full(jax.local_device_count(), asked_here(), np.int32)
        votes.append(any_of(jax.make_array_from_process_local_data(split, mine)))
        return len(votes) > 1 and bool(votes.pop(0))

    return asked_anywhere
