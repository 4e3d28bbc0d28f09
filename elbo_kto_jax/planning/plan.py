"""Does a run fit a slice of TPUs, and how fast can it be at most.

All times are bounds: no chip was asked. Of one program on one chip,

    seconds = max(FLOPs / peak, HBM bytes / HBM bandwidth, overlapped bytes / link bandwidth,
                  residuals' bytes / bandwidth to the host)
              + exposed bytes / link bandwidth

where overlapped and exposed collectives are those that the compiler lets run beside other work and those for which it
waits. A step is the sum of its programs over its micro-batches, and

    mfu_bound = model FLOPs / (chips x peak x seconds of a step)
    text_mfu_bound = the part of them that goes into text, over the same

with the model FLOPs of whole rows, empty positions included: as many forward passes' worth (models/flops.py) as the
method cannot do without, 3 for the gradient (2 where adapters are trained, whose own matrices are not counted), 1 for
the estimates where they need a pass of their own (train.residuals="recompute"), and 1 where the reference is online;
half of a row's tokens are scored. What rematerialisation computes again is work of the program, not of the model. Of
text, the sequences count alone, each attending to itself. Positions that a batch leaves empty lower the text_mfu_bound
and the tokens per second, not the mfu_bound. The batch is a typical one (workload.py); whether the run fits is said by
the longest rows, which other batches may have.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from elbo_kto_jax import objectives
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.memory import step_bytes
from elbo_kto_jax.planning import hlo
from elbo_kto_jax.planning.chips import Topology
from elbo_kto_jax.planning.estimate import estimated_cost, row_flops, text_flops
from elbo_kto_jax.planning.programs import Compiled, DoesNotFit, compile_programs, topology_devices, versions
from elbo_kto_jax.planning.workload import Workload, mesh_sizes, workload
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.training.residuals import fastest_first

log = logging.getLogger(__name__)
_HOPELESS = 1.25  # times the usable memory, by estimate: not worth minutes of compilation


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one run of a program, at best."""

    compute: float
    hbm: float
    overlapped: float
    exposed: float
    host: float = 0.0  # of residuals, to the host's memory or from there

    @property
    def total(self) -> float:
        return max(self.compute, self.hbm, self.overlapped, self.host) + self.exposed


def program_seconds(program: Compiled, topology: Topology, estimate: hlo.Cost) -> Seconds:
    """The bound of one program; `estimate` stands in for a program that the compiler does not print."""
    cost, chip = program.cost or estimate, topology.chip

    def communication(overlapped: bool) -> float:
        found = [c for c in cost.collectives if c.overlapped == overlapped]
        return max(
            sum(c.bytes * c.times / topology.bandwidth(c.group) for c in found if axis in c.axes) for axis in hlo.BOTH
        )

    return Seconds(
        compute=cost.flops / chip.flops,
        hbm=program.hbm_bytes / chip.hbm,
        overlapped=communication(True),
        exposed=communication(False),
        host=program.transferred / chip.host,
    )


def model_passes(config: Config, one_pass: bool) -> int:
    """How many forward passes' worth of FLOPs a step cannot do without."""
    needs = objectives.build(config.objective).needs
    online = needs.reference and config.reference.mode == "online"
    return 3 - bool(config.lora.rank) + (needs.scores and not one_pass) + online


def step_seconds(config: Config, work: Workload, seconds: Mapping[tuple[str, int], Seconds]) -> tuple[float, float]:
    """The bound of a step and of scoring the reference before the first one; for `seconds` see `result`."""

    def over_micro_batches(name: str) -> float:
        return sum(seconds[name, length].total for length in work.row_lengths)

    scoring, learning = ("forward", "backward") if work.one_pass else ("score", "grad")
    needs = objectives.build(config.objective).needs
    pass_seconds = over_micro_batches(scoring)
    step = (
        (pass_seconds if work.one_pass or needs.scores else 0.0)
        + over_micro_batches(learning)
        + seconds["update", 0].total
        + (pass_seconds if needs.reference and config.reference.mode == "online" else 0.0)
    )
    before = work.steps * pass_seconds if needs.reference and config.reference.mode == "precomputed" else 0.0
    return step, before


def plan(config: Config, model: ModelConfig, topology: Topology, examples: int, mean_tokens: float) -> dict[str, Any]:
    """Compiles every program and says what became of it; see the module.

    Where the config leaves it open where residuals are kept, the first way that fits, of the fastest first.

    Raises:
      UserError: the settings do not fit together.
      DoesNotFit: the compiler refused a program.
    """
    devices = topology_devices(topology)
    mesh = mesh_sizes(config, len(devices))
    for option in ways(config, model, mesh, topology, examples, mean_tokens):
        work = workload(option, mesh["data"] * mesh["fsdp"], examples, mean_tokens)
        is_last = option.train.residuals == "recompute" or option == config
        try:
            compiled = list(compile_programs(option, model, topology, devices, work, sampler=True))
        except DoesNotFit as refusal:
            if is_last:
                raise
            log.info("train.residuals=%s does not fit: %s", option.train.residuals, refusal)
            continue
        found = result(option, model, topology, work, compiled, examples, mean_tokens)
        if found["fits"] or is_last:
            return found
        log.info("train.residuals=%s does not fit", option.train.residuals)
    raise AssertionError("the last way is always returned or refused")


def ways(
    config: Config, model: ModelConfig, mesh: dict[str, int], topology: Topology, examples: int, mean_tokens: float
) -> list[Config]:
    """The config with each place of residuals that it allows, the fastest first; not those far from fitting."""
    if config.train.residuals != "auto":
        return [config]
    options = []
    for residuals in fastest_first(objectives.build(config.objective).needs, config.model.remat):
        option = dataclasses.replace(config, train=dataclasses.replace(config.train, residuals=residuals))
        work = workload(option, mesh["data"] * mesh["fsdp"], examples, mean_tokens)
        size = step_bytes(option, model, mesh, work.waiting)
        if size <= _HOPELESS * topology.chip.usable_bytes or residuals == "recompute":
            options.append(option)
    return options


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
    mesh, longest = mesh_sizes(config, topology.devices), config.data.max_length
    seconds = {  # by the name of a program, and how long the rows are that it takes
        (program.name, program.length): program_seconds(
            program, topology, estimated_cost(program.name, config, model, mesh, program.length)
        )
        for program in compiled
        if program.name != "sampler"
    }
    step, before = step_seconds(config, work, seconds)
    passes, peak = model_passes(config, work.one_pass) / topology.devices, topology.chip.flops
    useful = passes * work.rows_at_once * sum(row_flops(model, length) for length in work.row_lengths)
    of_text = passes * text_flops(model, work.lengths)
    tallest = max(compiled, key=lambda program: program.bytes_per_chip)
    chips = topology.devices // topology.chip.devices
    return {
        "fits": tallest.bytes_per_chip <= topology.chip.usable_bytes,
        "tallest": tallest.name,
        "bytes_per_chip": tallest.bytes_per_chip,
        "usable_bytes_per_chip": int(topology.chip.usable_bytes),
        "mfu_bound": useful / (peak * step),
        "text_mfu_bound": of_text / (peak * step),
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
            "row_lengths": list(work.row_lengths),
            "row_fill": work.row_fill,
            "visited_blocks": work.visited_blocks,
            "model_flops_per_chip": useful,
            "text_flops_per_chip": of_text,
        },
        "data": {"examples": examples, "mean_tokens": mean_tokens, "steps": work.steps, "reference_seconds": before},
        "assumed": _assumed(topology),
        "programs": {
            program.label(longest): _figures(program, seconds.get((program.name, program.length)))
            for program in compiled
        },
    }


def _settings(config: Config) -> dict[str, Any]:
    """The settings that a search changes, beside the mesh."""
    return {
        "remat": config.model.remat,
        "dtype": config.model.dtype,
        "param_dtype": config.model.param_dtype,
        "moments_dtype": config.optimizer.moments_dtype,
        "microbatch_tokens": config.train.microbatch_tokens,
        "residuals": config.train.residuals,
    }


def _assumed(topology: Topology) -> dict[str, float]:
    """What the bounds take a chip and its links to be capable of."""
    return {
        "peak_flops": topology.chip.flops,
        "hbm_bytes_per_second": topology.chip.hbm,
        "link_bytes_per_second": topology.chip.link,
        "host_bytes_per_second": topology.chip.host,
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
