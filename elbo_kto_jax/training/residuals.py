"""Where a step keeps its residuals between forward and backward pass (config.train.residuals).

    "recompute"   nowhere: two passes, of which the second computes them again, a fifth to a quarter of a step
    "device"      on the devices: one pass; memory grows with the number of micro-batches
    "host"        in the host's memory: one pass, in the devices' memory of "recompute"
    "auto"        the first of device, host, recompute that fits and pays

The gradient is the same, up to rounding. An objective whose gradient needs no score takes one pass in any case.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.memory import residual_bytes, step_bytes
from elbo_kto_jax.objectives.protocol import Needs
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.config import Config, Remat
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.scoring.scorer import Kept

log = logging.getLogger(__name__)
_ROOM = 0.85  # of a memory: an estimate may fill so much of it
_GPU_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # of the environment: GB that GPUs may use of the host, 64 unless told
_TOO_MUCH = "train.residuals=%s: needs about %.1f GiB, more than %.0f%% of the memory of the %s, %.1f GiB"
_GIB = 2**30


def fastest_first(needs: Needs, remat: Remat) -> list[Kept]:
    """The ways that pay for an objective and for what a layer keeps (config.model.remat).

    Without scores "recompute" computes nothing twice. What the others keep takes longer to move to the host and
    back than to compute again: thirteen times the bytes of "full", in LLaDA-8B.
    """
    if not needs.scores:
        return ["recompute"]
    if remat in ("full", "attention"):
        return ["device", "host", "recompute"]
    return ["device", "recompute"]


class Memory(NamedTuple):
    """What this process's devices have, in bytes."""

    device: float  # each
    host: float  # together; 0: they cannot reach the host's memory
    devices: int


def memory_of(devices: Sequence[jax.Device]) -> Memory:
    """What these devices of this process report; one that reports nothing has its part of the RAM."""
    ram = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    each = (devices[0].memory_stats() or {}).get("bytes_limit", ram / len(devices))
    if "pinned_host" not in {memory.kind for memory in devices[0].addressable_memories()}:
        ram = 0.0
    elif devices[0].platform == "gpu":
        ram = min(ram, float(os.environ.get(_GPU_LIMIT, 64)) * 1e9)
    return Memory(each, ram, len(devices))


def shards_of(mesh: Mesh) -> dict[str, int]:
    """Over how many devices a mesh splits the model's dimension (fsdp, of one axis or two) and widths (tensor)."""
    tensor = mesh.shape["tensor"]
    return {"fsdp": mesh.size // mesh.shape["data"] // tensor, "tensor": tensor}


def where_to_keep(
    config: Config, model: ModelConfig, mesh: Mapping[str, int], memory: Memory, needs: Needs, micro_batches: int
) -> Kept:
    """Where a run keeps the residuals of a step of so many micro-batches: as the config says, or the fastest that fits.

    `mesh` has the sizes of the axes fsdp and tensor.

    Raises:
      UserError: the devices cannot use the host's memory, and the config says that they shall.
    """
    asked = config.train.residuals
    if asked == "host" and not memory.host:
        raise UserError("config.train.residuals: these devices cannot use the host's memory; set 'auto' or 'recompute'")
    if asked != "auto":
        return asked
    needed = {
        "device": step_bytes(config, model, mesh, micro_batches),
        "host": memory.devices * micro_batches * residual_bytes(config, model, mesh["tensor"]),
    }
    has = {"device": memory.device, "host": memory.host}
    *ways, last = fastest_first(needs, config.model.remat)
    for way in ways:
        if needed[way] <= _ROOM * has[way]:
            break
        log.info(_TOO_MUCH, way, needed[way] / _GIB, 100 * _ROOM, way, has[way] / _GIB)
    else:
        way = last
    found = processes.json_of_first(way)
    log.info("train.residuals=auto: %s, the fastest that fits by estimate", found)
    return found
