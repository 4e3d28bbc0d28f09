"""Does a run fit a slice of TPUs, how fast can it be at most, and which settings make it faster.

All times are bounds: no chip was asked. Of one program on one chip,

    seconds = max(FLOPs / peak, HBM bytes / HBM bandwidth, overlapped bytes / link bandwidth)
              + exposed bytes / link bandwidth

where overlapped and exposed collectives are those that the compiler lets run beside other work and those for which it
waits. A step is the sum of its programs over its micro-batches, and

    mfu_bound = model FLOPs / (chips x peak x seconds of a step)

with the model FLOPs of whole rows: as many forward passes' worth (models/flops.py) as the method cannot do without, 3
for the gradient (2 where adapters are trained, whose own matrices are not counted), 1 for the estimates where they need
a pass of their own (a batch of more than train.one_pass_microbatches), and 1 where the reference is online; half of a
row's tokens are scored. What rematerialisation computes again is work of the program, not of the model. Rows that a
batch does not fill lower the tokens per second, not the mfu_bound.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from elbo_kto_jax import objectives
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.flops import forward_flops, layer_matrices
from elbo_kto_jax.planning import hlo
from elbo_kto_jax.planning.chips import Topology, larger
from elbo_kto_jax.planning.programs import Compiled, DoesNotFit, compile_programs, topology_devices
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError

log = logging.getLogger(__name__)
PACKED = 0.95  # of the positions of packed rows hold text; measured on kto-mix, at least so many


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a run has to get through; rows are those of the whole mesh."""

    steps: int
    rows: int  # of a step
    micro_batches: int  # of a step
    rows_at_once: int
    tokens: float  # of text in a step
    one_pass: bool  # a step keeps all its micro-batches for one pass over them; else it takes two

    @property
    def waiting(self) -> int:
        """The micro-batches that wait for their backward pass at once; 0 in two passes."""
        return self.micro_batches if self.one_pass else 0

    def row_fill(self, length: int) -> float:
        """The part of a step's positions that holds text."""
        return self.tokens / (self.micro_batches * self.rows_at_once * length)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one run of a program, at best."""

    compute: float
    hbm: float
    overlapped: float
    exposed: float

    @property
    def total(self) -> float:
        return max(self.compute, self.hbm, self.overlapped) + self.exposed


def workload(config: Config, shards: int, examples: int, mean_tokens: float) -> Workload:
    """The steps of a run over so many examples of that length, for a mesh that splits rows into `shards`."""
    length, batch = config.data.max_length, config.train.global_batch_size
    segments = batch * config.estimator.draws
    tokens = segments * min(mean_tokens, length)
    rows = max(1, math.ceil(tokens / (length * PACKED))) if config.data.packing else segments
    at_once = max(1, config.train.microbatch_tokens // length) * shards
    steps = config.train.steps or config.train.epochs * math.ceil(examples / batch)
    micro_batches = math.ceil(rows / at_once)
    one_pass = micro_batches <= config.train.one_pass_microbatches
    return Workload(steps, rows, micro_batches, at_once, tokens, one_pass)


def program_seconds(program: Compiled, topology: Topology, estimate: hlo.Cost) -> Seconds:
    """The bound of one program; `estimate` stands in for a program that the compiler does not print."""
    cost, chip = program.cost or estimate, topology.chip

    def communication(overlapped: bool) -> float:
        return sum(
            c.bytes * c.times / topology.bandwidth(c.group) for c in cost.collectives if c.overlapped == overlapped
        )

    return Seconds(cost.flops / chip.flops, program.hbm_bytes / chip.hbm, communication(True), communication(False))


def model_passes(config: Config, one_pass: bool) -> int:
    """How many forward passes' worth of FLOPs a step cannot do without."""
    needs = objectives.build(config.objective).needs
    online = needs.reference and config.reference.mode == "online"
    return 3 - bool(config.lora.rank) + (needs.scores and not one_pass) + online


def row_flops(model: ModelConfig, length: int) -> float:
    """FLOPs of a forward pass over one whole row of which half is scored."""
    return forward_flops(model, np.array([length]), np.array([length / 2]))


def plan(config: Config, model: ModelConfig, topology: Topology, examples: int, mean_tokens: float) -> dict[str, Any]:
    """Compiles every program and says what became of it; see the module.

    Raises:
      UserError: the settings do not fit together.
      DoesNotFit: the compiler refused a program.
    """
    devices = topology_devices(topology)
    mesh = mesh_sizes(config, len(devices))
    work = workload(config, mesh["data"] * mesh["fsdp"], examples, mean_tokens)
    compiled = list(compile_programs(config, model, devices, waiting=work.waiting, sampler=True))
    return result(config, model, topology, work, compiled, examples, mean_tokens)


def result(
    config: Config,
    model: ModelConfig,
    topology: Topology,
    work: Workload,
    compiled: Sequence[Compiled],
    examples: int,
    mean_tokens: float,
) -> dict[str, Any]:
    """The plan, given the compiled programs."""
    mesh, length = mesh_sizes(config, topology.devices), config.data.max_length
    shards = mesh["data"] * mesh["fsdp"]
    seconds = {
        program.name: program_seconds(program, topology, estimated_cost(program.name, config, model, mesh))
        for program in compiled
        if program.name != "sampler"
    }
    scoring, learning = ("forward", "backward") if work.one_pass else ("score", "grad")
    needs = objectives.build(config.objective).needs
    pass_seconds = work.micro_batches * seconds[scoring].total
    step = (
        (pass_seconds if work.one_pass or needs.scores else 0.0)
        + work.micro_batches * seconds[learning].total
        + seconds["update"].total
        + (pass_seconds if needs.reference and config.reference.mode == "online" else 0.0)
    )
    before = work.steps * pass_seconds if needs.reference and config.reference.mode == "precomputed" else 0.0
    rows_per_chip = work.micro_batches * work.rows_at_once / shards / mesh["tensor"]
    useful = model_passes(config, work.one_pass) * rows_per_chip * row_flops(model, length)
    tallest = max(compiled, key=lambda program: program.bytes_per_chip)
    chips = topology.devices // topology.chip.devices
    return {
        "fits": tallest.bytes_per_chip <= topology.chip.usable_bytes,
        "bytes_per_chip": tallest.bytes_per_chip,
        "usable_bytes_per_chip": int(topology.chip.usable_bytes),
        "mfu_bound": useful / (topology.chip.flops * step),
        "tokens_per_second_bound": work.tokens / step,
        "chip_hours_bound": (before + work.steps * step) * chips / 3600,
        "compile_seconds": sum(program.compile_seconds for program in compiled),
        "topology": topology.name,
        "mesh": mesh,
        "settings": {
            "remat": config.model.remat,
            "dtype": config.model.dtype,
            "param_dtype": config.model.param_dtype,
            "microbatch_tokens": config.train.microbatch_tokens,
            "one_pass_microbatches": config.train.one_pass_microbatches,
        },
        "step": {
            "seconds": step,
            "one_pass": work.one_pass,
            "rows": work.rows,
            "micro_batches": work.micro_batches,
            "rows_at_once": work.rows_at_once,
            "row_fill": work.row_fill(length),
            "model_flops_per_chip": useful,
        },
        "data": {"examples": examples, "mean_tokens": mean_tokens, "steps": work.steps, "reference_seconds": before},
        "assumed": {
            "peak_flops": topology.chip.flops,
            "hbm_bytes_per_second": topology.chip.hbm,
            "link_bytes_per_second": topology.chip.link,
            "all_chips_bytes_per_second": topology.bandwidth(topology.devices),
            "one_axis_bytes_per_second": topology.bandwidth(max(topology.sides) * topology.chip.devices),
        },
        "programs": {program.name: _figures(program, seconds.get(program.name)) for program in compiled},
    }


def _figures(program: Compiled, seconds: Seconds | None) -> dict[str, Any]:
    figures = {key: value for key, value in dataclasses.asdict(program).items() if key not in ("name", "cost")} | {
        "bytes_per_chip": program.bytes_per_chip
    }
    if seconds is not None:
        figures["seconds"] = dataclasses.asdict(seconds) | {"total": seconds.total}
    figures["flops"] = program.cost.flops if program.cost else None
    if program.cost:
        figures["collectives"] = {
            kind: {
                "overlapped_bytes": program.cost.sent([kind], overlapped=True),
                "exposed_bytes": program.cost.sent([kind], overlapped=False),
            }
            for kind in hlo.KINDS
            if program.cost.sent([kind])
        }
    return figures


# Estimates, made before anything is compiled: they order the candidates of a search, and no more.


def mesh_sizes(config: Config, devices: int) -> dict[str, int]:
    """The sizes that a config's mesh takes on so many devices."""
    sizes = dataclasses.asdict(config.mesh)
    given = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: devices // given if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise UserError(f"config.mesh: {sizes} does not use exactly the {devices} devices of the slice")
    return sizes


def parameters(model: ModelConfig) -> int:
    """Numbers in all parameters."""
    return sum(row.size for row in registry.parameters(model).values())


def adapters(model: ModelConfig, rank: int) -> int:
    """Weights in the adapters of all matrices of the blocks."""
    shapes = [row.shape for row in registry.parameters(model).values() if row.is_matrix]
    return sum(layers * rank * (rows + columns) for layers, rows, columns in shapes)


def recomputed(model: ModelConfig, remat: str, length: int) -> float:
    """The part of a forward pass that the backward pass computes again."""
    layer = 2 * layer_matrices(model) + 4 * model.n_heads * model.head_dim * length  # FLOPs per token
    again = {
        "full": layer - 2 * model.d_model * model.mlp_hidden_size,  # all but ff_out, which nothing needs
        "attention": 2 * layer_matrices(model) - 2 * model.d_model * model.mlp_hidden_size,
        "dots": 0.0,
        "none": 0.0,
    }[remat]
    return again * model.n_layers * length / row_flops(model, length)


def estimated_cost(name: str, config: Config, model: ModelConfig, mesh: dict[str, int]) -> hlo.Cost:
    """FLOPs and collectives of a program if the compiler does as expected and overlaps them all."""
    length, per_chip = config.data.max_length, max(1, config.train.microbatch_tokens // config.data.max_length)
    forward = per_chip * row_flops(model, length) / mesh["tensor"]
    again = recomputed(model, config.model.remat, length)
    back = 2 - bool(config.lora.rank) + again
    passes = {"score": 1, "forward": 1, "grad": 1 + back, "backward": back, "update": 0}[name]
    whole = parameters(model) * jnp.dtype(config.model.dtype).itemsize / mesh["tensor"]
    sent = whole * (mesh["fsdp"] - 1) / mesh["fsdp"]
    gathers = {"score": 1, "forward": 1, "grad": 2, "backward": 1, "update": 0}[name]
    found = []
    if mesh["fsdp"] > 1 and gathers:
        found.append(hlo.Collective("all-gather", sent, mesh["fsdp"], True, gathers))
    if name in ("grad", "backward") and not config.lora.rank:  # adapters' gradients are small
        if mesh["fsdp"] > 1:
            found.append(hlo.Collective("reduce-scatter", sent, mesh["fsdp"], True, 1))
        if mesh["data"] > 1:
            shared = 2 * parameters(model) * 4 / mesh["tensor"] / mesh["fsdp"]
            found.append(hlo.Collective("all-reduce", shared, mesh["data"], False, 1))
    if mesh["tensor"] > 1 and gathers:
        states = 2 * per_chip * length * model.d_model * jnp.dtype(config.model.dtype).itemsize
        times = 2 * model.n_layers * (gathers + (name in ("grad", "backward")))
        found.append(hlo.Collective("all-reduce", states, mesh["tensor"], False, times))
    return hlo.Cost(passes * forward, tuple(found))


def estimated_bytes(config: Config, model: ModelConfig, mesh: dict[str, int], waiting: int) -> float:
    """Bytes per chip of the gradient's program and of what lies beside it; for `waiting` see `Workload`."""
    item, stored = jnp.dtype(config.model.dtype).itemsize, jnp.dtype(config.model.param_dtype).itemsize
    shards = mesh["fsdp"] * mesh["tensor"]
    trained = parameters(model) / shards
    base = 0.0
    if config.lora.rank:
        base = trained * (1 if config.lora.base_quantization == "int8" else item)
        trained *= adapters(model, config.lora.rank) / parameters(model)
    accumulator = 0 if waiting and config.train.one_pass_microbatches == 1 else 4
    state = trained * (3 * stored + accumulator + stored)  # parameters, Adam, accumulator, a new gradient
    tokens = max(1, config.train.microbatch_tokens // config.data.max_length) * config.data.max_length
    d, f = model.d_model, model.mlp_hidden_size / mesh["tensor"]
    attention = model.n_heads * model.head_dim / mesh["tensor"]
    kept = {
        "full": d,
        "attention": d + attention,
        "dots": 2 * d + 4 * attention + d + 2 * f,
        "none": 6 * d + 6 * attention + 5 * f,
    }[config.model.remat] * item
    head = model.d_model * model.embedding_size / mesh["tensor"] * (2 * item + 4)
    layer = 2 * 2 * layer_matrices(model) / mesh["tensor"] * item + tokens * (8 * d + 4 * f) * item
    return base + state + max(1, waiting) * tokens * model.n_layers * kept + max(head, layer) + 12 * tokens * d


def would_fit(config: Config, model: ModelConfig, topology: Topology, examples: int, mean_tokens: float) -> str:
    """Words for what would fit, where the config as it is does not; by estimate."""
    hints = []
    for other in larger(topology):
        mesh = mesh_sizes(dataclasses.replace(config, mesh=_flexible(config)), other.devices)
        work = workload(config, mesh["data"] * mesh["fsdp"], examples, mean_tokens)
        if estimated_bytes(config, model, mesh, work.waiting) < other.chip.usable_bytes:
            hints.append(f"--topology={other.name}")
            break
    best = next(iter(candidates(config, model, topology, examples, mean_tokens)), None)
    if best is not None:
        hints.append(" ".join(changes(config, best)))
    if not hints:
        return "nothing that --search knows fits this slice"
    return f"by estimate {' or '.join(hints)} would; --search compiles and tells"


def _flexible(config: Config):
    """The mesh with what is left for fsdp."""
    return dataclasses.replace(config.mesh, fsdp=-1, data=max(1, config.mesh.data), tensor=max(1, config.mesh.tensor))


def candidates(
    config: Config, model: ModelConfig, topology: Topology, examples: int, mean_tokens: float
) -> Iterator[Config]:
    """Configs that fit the slice by estimate, the fastest first; float32 parameters before bfloat16 ones."""
    found = []
    devices, length = topology.devices, config.data.max_length
    splits = [
        (devices // (fsdp * tensor), fsdp, tensor)
        for tensor in (1, 2, 4)
        for fsdp in (2**i for i in range(devices.bit_length()))
        if devices % (fsdp * tensor) == 0 and model.n_kv_heads % tensor == 0 and model.d_model % fsdp == 0
    ]
    for split, rows, remat, stored in itertools.product(
        splits, (1, 2, 4, 8), ("full", "attention", "dots"), ("float32", "bfloat16")
    ):
        option = with_settings(config, split, rows * length, remat, stored)
        mesh = mesh_sizes(option, devices)
        work = workload(option, mesh["data"] * mesh["fsdp"], examples, mean_tokens)
        if estimated_bytes(option, model, mesh, work.waiting) > topology.chip.usable_bytes:
            continue
        found.append((stored != "float32", estimated_step(option, model, topology, work, mesh), len(found), option))
    for *_, option in sorted(found, key=lambda item: item[:3]):
        yield option


def with_settings(config: Config, split: tuple[int, int, int], tokens: int, remat: str, stored: str) -> Config:
    """The config with another mesh (data, fsdp, tensor), micro-batch, rematerialisation and parameter dtype."""
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **dict(zip(("data", "fsdp", "tensor"), split, strict=True))),
        train=dataclasses.replace(config.train, microbatch_tokens=tokens),
        model=dataclasses.replace(config.model, remat=remat, param_dtype=stored),
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
    ]
    return [f"--config.{key}={new}" for key, old, new in pairs if old != new]


def estimated_step(
    config: Config, model: ModelConfig, topology: Topology, work: Workload, mesh: dict[str, int]
) -> float:
    """Seconds of a step by estimate; collectives of the update and HBM are left out."""

    def seconds(name: str) -> float:
        cost = estimated_cost(name, config, model, mesh)
        waits = {
            overlapped: sum(
                c.bytes * c.times / topology.bandwidth(c.group) for c in cost.collectives if c.overlapped == overlapped
            )
            for overlapped in (True, False)
        }
        return max(cost.flops / topology.chip.flops, waits[True]) + waits[False]

    names = ("forward", "backward") if work.one_pass else ("score", "grad")
    return work.micro_batches * sum(map(seconds, names))


def search(
    config: Config, model: ModelConfig, topology: Topology, examples: int, mean_tokens: float, most: int
) -> tuple[dict[str, Any] | None, Config, list[dict[str, Any]]]:
    """The fastest plan among the first `most` candidates, its config, and a line for each that was compiled.

    Candidates that the compiler refuses do not count.
    """
    best, chosen, tried = None, config, []
    devices = topology_devices(topology)
    for option in itertools.islice(candidates(config, model, topology, examples, mean_tokens), 4 * most):
        flags = changes(config, option)
        mesh = mesh_sizes(option, len(devices))
        work = workload(option, mesh["data"] * mesh["fsdp"], examples, mean_tokens)
        log.info("candidate: %s", " ".join(flags) or "the config as it is")
        try:
            compiled = list(compile_programs(option, model, devices, waiting=work.waiting, sampler=False))
        except DoesNotFit as refusal:
            log.info("does not fit: %s", refusal)
            tried.append({"flags": flags, "fits": False, "why": str(refusal)})
            continue
        found = result(option, model, topology, work, compiled, examples, mean_tokens)
        keys = ("fits", "bytes_per_chip", "mfu_bound", "tokens_per_second_bound")
        tried.append({"flags": flags, **{key: found[key] for key in keys}})
        if found["fits"] and (best is None or found["tokens_per_second_bound"] > best["tokens_per_second_bound"]):
            best, chosen = found, option
        if sum(attempt["fits"] for attempt in tried) == most:
            break
    return best, chosen, tried
