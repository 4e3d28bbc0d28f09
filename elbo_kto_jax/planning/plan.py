"""Does a run fit a slice of TPUs, and how fast can it be at most.

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
from collections.abc import Mapping, Sequence
from typing import Any

from elbo_kto_jax import objectives
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.planning import hlo
from elbo_kto_jax.planning.chips import Topology
from elbo_kto_jax.planning.estimate import estimated_cost, row_flops
from elbo_kto_jax.planning.programs import Compiled, compile_programs, topology_devices, versions
from elbo_kto_jax.planning.workload import Workload, mesh_sizes, workload
from elbo_kto_jax.runtime.config import Config


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


def step_seconds(config: Config, work: Workload, seconds: Mapping[str, Seconds]) -> tuple[float, float]:
    """The bound of a step, given those of its programs, and of scoring the reference before the first one."""
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
    return step, before


def plan(config: Config, model: ModelConfig, topology: Topology, examples: int, mean_tokens: float) -> dict[str, Any]:
    """Compiles every program and says what became of it; see the module.

    Raises:
      UserError: the settings do not fit together.
      DoesNotFit: the compiler refused a program.
    """
    devices = topology_devices(topology)
    mesh = mesh_sizes(config, len(devices))
    work = workload(config, mesh["data"] * mesh["fsdp"], examples, mean_tokens)
    found = compile_programs(config, model, devices, topology=topology, waiting=work.waiting, sampler=True)
    compiled = list(found)
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
    step, before = step_seconds(config, work, seconds)
    rows_per_chip = work.micro_batches * work.rows_at_once / shards / mesh["tensor"]
    useful = model_passes(config, work.one_pass) * rows_per_chip * row_flops(model, length)
    tallest = max(compiled, key=lambda program: program.bytes_per_chip)
    chips = topology.devices // topology.chip.devices
    return {
        "fits": tallest.bytes_per_chip <= topology.chip.usable_bytes,
        "tallest": tallest.name,
        "bytes_per_chip": tallest.bytes_per_chip,
        "usable_bytes_per_chip": int(topology.chip.usable_bytes),
        "mfu_bound": useful / (topology.chip.flops * step),
        "tokens_per_second_bound": work.tokens / step,
        "chip_hours_bound": (before + work.steps * step) * chips / 3600,
        "compile_seconds": sum(program.compile_seconds for program in compiled),
        "versions": versions(),
        "topology": topology.name,
        "mesh": mesh,
        "settings": _settings(config),
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
        "assumed": _assumed(topology),
        "programs": {program.name: _figures(program, seconds.get(program.name)) for program in compiled},
    }


def _settings(config: Config) -> dict[str, Any]:
    """The settings that a search changes, beside the mesh."""
    return {
        "remat": config.model.remat,
        "dtype": config.model.dtype,
        "param_dtype": config.model.param_dtype,
        "moments_dtype": config.optimizer.moments_dtype,
        "microbatch_tokens": config.train.microbatch_tokens,
        "one_pass_microbatches": config.train.one_pass_microbatches,
    }


def _assumed(topology: Topology) -> dict[str, float]:
    """What the bounds take a chip and its links to be capable of."""
    return {
        "peak_flops": topology.chip.flops,
        "hbm_bytes_per_second": topology.chip.hbm,
        "link_bytes_per_second": topology.chip.link,
        "all_chips_bytes_per_second": topology.bandwidth(topology.devices),
        "one_axis_bytes_per_second": topology.bandwidth(max(topology.sides) * topology.chip.devices),
    }


def _figures(program: Compiled, seconds: Seconds | None) -> dict[str, Any]:
    """What a plan says of one program."""
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
