"""Which settings make a run fit a slice, and faster: candidates in the order of their estimates, compiled."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import Any

from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.memory import step_bytes
from elbo_kto_jax.planning.chips import Topology, larger
from elbo_kto_jax.planning.estimate import estimated_step
from elbo_kto_jax.planning.plan import result, ways
from elbo_kto_jax.planning.programs import DoesNotFit, compile_programs, topology_devices
from elbo_kto_jax.planning.workload import mesh_sizes, workload
from elbo_kto_jax.runtime.config import Config, Dtype, Mesh, Remat

log = logging.getLogger(__name__)

# Dtypes of parameters and of Adam's moments, the most exact first.
_STORED: tuple[tuple[Dtype, Dtype], ...] = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))


def would_fit(config: Config, model: ModelConfig, topology: Topology, examples: int, mean_tokens: float) -> str:
    """Words for what would fit, where the config as it is does not; by estimate."""
    hints = []
    for other in larger(topology):
        mesh = mesh_sizes(dataclasses.replace(config, mesh=_flexible(config)), other.devices)
        work = workload(config, mesh["data"] * mesh["fsdp"], examples, mean_tokens)
        if step_bytes(config, model, mesh, work.waiting) < other.chip.usable_bytes:
            hints.append(f"--topology={other.name}")
            break
    asked = dataclasses.replace(config, mesh=Mesh(**mesh_sizes(config, topology.devices)))

    def needs(option: Config) -> float:
        mesh = mesh_sizes(option, topology.devices)
        work = workload(option, mesh["data"] * mesh["fsdp"], examples, mean_tokens)
        return step_bytes(option, model, mesh, work.waiting)

    # The compiler may refuse what the estimate takes for small enough; so no advice needs as much as what was asked.
    most = min(map(needs, ways(asked, model, dataclasses.asdict(asked.mesh), topology, examples, mean_tokens)))
    options = candidates(asked, model, topology, examples, mean_tokens)
    if smaller := next((option for option in options if needs(option) < most), None):
        hints.append(" ".join(changes(asked, smaller)))
    if not hints:
        return "nothing that --search knows fits this slice"
    return f"by estimate {' or '.join(hints)} would; --search compiles and tells"


def _flexible(config: Config) -> Mesh:
    """The mesh with what is left for fsdp."""
    return dataclasses.replace(config.mesh, fsdp=-1, data=max(1, config.mesh.data), tensor=max(1, config.mesh.tensor))


def candidates(
    config: Config, model: ModelConfig, topology: Topology, examples: int, mean_tokens: float
) -> Iterator[Config]:
    """Configs that fit the slice by estimate, the fastest first; more exact dtypes before others."""
    found: list[tuple[int, float, int, Config]] = []
    devices, length = topology.devices, config.data.max_length
    splits = [
        (devices // (fsdp * tensor), fsdp, tensor)
        for tensor in (1, 2, 4)
        for fsdp in (2**i for i in range(devices.bit_length()))
        if devices % (fsdp * tensor) == 0 and model.n_kv_heads % tensor == 0 and model.d_model % fsdp == 0
    ]
    remats: tuple[Remat, ...] = ("full", "attention", "most", "dots")
    for split, rows, remat, stored in itertools.product(splits, (1, 2, 3, 4, 8), remats, _STORED):
        asked = with_settings(config, split, rows * length, remat, stored)
        mesh = mesh_sizes(asked, devices)
        for option in ways(asked, model, mesh, topology, examples, mean_tokens):
            work = workload(option, mesh["data"] * mesh["fsdp"], examples, mean_tokens)
            if step_bytes(option, model, mesh, work.waiting) <= topology.chip.usable_bytes:
                seconds = estimated_step(option, model, topology, work, mesh)
                found.append((_STORED.index(stored), seconds, len(found), option))
                break  # of the ways that fit, the fastest
    for *_, option in sorted(found, key=lambda item: item[:3]):
        yield option


def with_settings(
    config: Config, split: tuple[int, int, int], tokens: int, remat: Remat, stored: tuple[Dtype, Dtype]
) -> Config:
    """The config with another mesh (data, fsdp, tensor), micro-batch, rematerialisation, and stored dtypes."""
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **dict(zip(("data", "fsdp", "tensor"), split, strict=True))),
        train=dataclasses.replace(config.train, microbatch_tokens=tokens),
        model=dataclasses.replace(config.model, remat=remat, param_dtype=stored[0]),
        optimizer=dataclasses.replace(config.optimizer, moments_dtype=stored[1]),
    )


def changes(config: Config, other: Config) -> list[str]:
    """The flags that turn one config into the other."""
    pairs = [
        *(
            (f"mesh.{axis}", getattr(config.mesh, axis), getattr(other.mesh, axis))
            for axis in ("data", "fsdp", "tensor")
        ),
        ("train.microbatch_tokens", config.train.microbatch_tokens, other.train.microbatch_tokens),
        ("model.remat", config.model.remat, other.model.remat),
        ("model.param_dtype", config.model.param_dtype, other.model.param_dtype),
        ("optimizer.moments_dtype", config.optimizer.moments_dtype, other.optimizer.moments_dtype),
    ]
    return [f"--config.{key}={new}" for key, old, new in pairs if old != new]


def search(
    config: Config, model: ModelConfig, topology: Topology, examples: int, mean_tokens: float, most: int
) -> tuple[dict[str, Any] | None, Config, list[dict[str, Any]]]:
    """The fastest plan among the first `most` candidates, its config, and a line for each that was compiled.

    Candidates that the compiler refuses do not count.
    """
    best: dict[str, Any] | None = None
    chosen, tried = config, list[dict[str, Any]]()
    devices = topology_devices(topology)
    for option in itertools.islice(candidates(config, model, topology, examples, mean_tokens), 4 * most):
        flags = changes(config, option)
        mesh = mesh_sizes(option, len(devices))
        work = workload(option, mesh["data"] * mesh["fsdp"], examples, mean_tokens)
        log.info("candidate: %s", " ".join(flags) or "the config as it is")
        try:
            compiled = list(compile_programs(option, model, topology, devices, work, sampler=False))
        except DoesNotFit as refusal:
            log.info("does not fit: %s", refusal)
            tried.append({"flags": flags, "fits": False, "why": str(refusal)})
            continue
        found = result(option, model, topology, work, compiled, examples, mean_tokens)
        keys = ("fits", "bytes_per_chip", "mfu_bound", "text_mfu_bound", "tokens_per_second_bound")
        tried.append({"flags": flags, **{key: found[key] for key in keys}})
        if found["fits"] and (best is None or found["tokens_per_second_bound"] > best["tokens_per_second_bound"]):
            best, chosen = found, option
        if sum(attempt["fits"] for attempt in tried) == most:
            break
    return best, chosen, tried
