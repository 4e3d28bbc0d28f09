"""What a run of `train` would be, from its config, its data and the model's config.json (train --dry-run).

The code that reads, tokenises, subsamples and packs is that of the run, and so are its refusals; no weights are opened
and nothing is written. Memory is the estimate by which train.residuals="auto" decides. Time is known where the working
folder has earlier steps of the run, or where the peak FLOP/s of the devices are known, of which a share is assumed.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from elbo_kto_jax.checkpoints.folders import STEPS_FOLDER, absolute, finished_steps, progress_of
from elbo_kto_jax.data.examples import Examples
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.flops import forward_flops
from elbo_kto_jax.models.memory import residual_bytes, step_bytes, step_memory
from elbo_kto_jax.planning.chips import CHIPS, parse_topology, peak_flops
from elbo_kto_jax.planning.plan import model_passes
from elbo_kto_jax.planning.workload import mesh_sizes
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.workdir import look_into, read_metrics, refuse_other_inputs
from elbo_kto_jax.training import inputs, tracking
from elbo_kto_jax.training.data import TrainingData
from elbo_kto_jax.training.progress import Progress
from elbo_kto_jax.training.residuals import memory_of, shards_of
from elbo_kto_jax.training.setup import Setup, check_held_out, prepare

ASSUMED_MFU = 0.35  # of the peak, for text; docs/benchmarks.md: 32% to 41% on an H100 and an H200
_DRAWS = 200_000  # that are packed to see how full rows are: some seconds


def dry_run(config: Config, workdir: Path, *, overwrite: bool, skip_bad: bool) -> dict[str, Any]:
    """The summary of a run that is not made; `in_words` makes it text.

    Raises:
      UserError: what `train` would raise before it loads weights.
    """
    check_held_out(config)
    tracking.check(config.trackers)
    record, moment = look_into(workdir, config, overwrite, "train")
    revisions = {} if record is None else record.get("revisions", {})
    setup = prepare(config, skip_bad=skip_bad, moment=moment, revisions=revisions)
    began = {} if record is None else record.get("inputs", {})
    refuse_other_inputs(workdir, began, inputs.of_setup(setup), overwrite=overwrite)
    progress = Progress() if record is None else _progress(workdir)
    progress.plan(setup.total_steps)
    ended = progress.is_out_of(config.train.patience)
    steps = _steps(setup, progress.step)
    return {
        "dry_run": True,
        "workdir": str(workdir),
        "replaces_a_run": record is None and overwrite and (workdir / "config.json").is_file(),
        **_data(setup),
        **steps,
        "stopped_early": ended and progress.step < setup.total_steps,
        "devices": {"number": jax.device_count(), "kind": jax.devices()[0].device_kind},
        "residuals": setup.residuals,
        "memory": _memory(setup),
        "checkpoint_bytes": _checkpoint_bytes(setup),
        "slices": smallest_slices(config, setup.model.config),
        **({"seconds": 0.0, "seconds_from": "the run has ended"} if ended else _time(setup, workdir, steps)),
        "config": config.to_dict(),
    }


def _progress(workdir: Path) -> Progress:
    """Where a run would go on."""
    found = finished_steps(absolute(workdir / STEPS_FOLDER))
    return Progress.restored(progress_of(max(found, key=lambda step: int(step.name)))) if found else Progress()


def _data(setup: Setup) -> dict[str, Any]:
    examples, needs = setup.data.examples, setup.objective.needs
    desirable, lengths = int(examples.is_desirable.sum()), _lengths(examples)
    found = {
        "records": examples.counts.records,
        "examples": len(examples),
        "cut": examples.counts.cut,
        "desirable": desirable if needs.labels else None,
        "undesirable": len(examples) - desirable if needs.labels else None,
        "pairs": len(examples) // 2 if needs.pairs else None,
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "data": dataclasses.asdict(examples.counts),
    }
    if setup.eval_data is not None:
        found["eval_data"] = dataclasses.asdict(setup.eval_data.examples.counts)
    return found


def _lengths(examples: Examples) -> Any:
    return examples.offsets[1:] - examples.offsets[:-1]


def _steps(setup: Setup, done: int) -> dict[str, Any]:
    """Steps, and what goes through the model in them; the figures of a step are means over those that are packed."""
    data, total, every = setup.data, setup.total_steps, setup.config.train.eval_every
    packed = min(total, max(1, _DRAWS // (data.most_examples * setup.config.estimator.draws)))
    sizes = [data.size(step) for step in range(packed)]
    tokens = sum(size.tokens for size in sizes) if packed == total else tokens_of(data, total)
    return {
        "steps": total,
        "steps_done": done,
        "steps_per_epoch": data.steps_per_epoch,
        "epochs": total / data.steps_per_epoch,
        "evaluations": total // every if setup.eval_data and every else 0,
        "tokens_of_run": tokens,  # every draw counted, as `tokens` of metrics.jsonl at the end
        "tokens_per_step": tokens / total,
        "real_token_fraction": sum(size.tokens for size in sizes) / sum(size.positions for size in sizes),
        "micro_batches_per_step": sum(size.micro_batches for size in sizes) / packed,
        "rows": data.layout.rows,
        "steps_packed": packed,
    }


def tokens_of(data: TrainingData, steps: int) -> int:
    """Tokens that go through the model in the first steps of a run, every draw counted."""
    epochs = 0 if data.is_weighted else steps // data.steps_per_epoch
    whole = epochs * data.estimator.draws * int(data.examples.offsets[-1])  # every epoch has each example once
    rest = range(epochs * data.steps_per_epoch, steps)
    return whole + sum(int(data.lengths(data.indices(step)).sum()) for step in rest)


def _memory(setup: Setup) -> dict[str, Any]:
    """Bytes by estimate, of a device and of the host, and what this process's devices have."""
    config, model, shards = setup.config, setup.model.config, shards_of(setup.mesh)
    micro_batches = setup.data.most_micro_batches()
    found = step_memory(config, model, shards, micro_batches if setup.residuals == "device" else 0)
    has = memory_of(setup.mesh.local_devices)
    on_host = setup.residuals == "host"
    host = has.devices * micro_batches * residual_bytes(config, model, shards["tensor"]) if on_host else 0
    return {
        "bytes_per_device": round(sum(found)),
        **{name: round(value) for name, value in found._asdict().items()},
        "device_has": round(has.device),
        "host_bytes": round(host),
        "host_has": round(has.host),
        "fits": sum(found) <= has.device and host <= has.host,
    }


def _checkpoint_bytes(setup: Setup) -> int:
    """Bytes of a checkpoint: what is trained, and Adam's moments."""
    whole = step_memory(setup.config, setup.model.config, {"fsdp": 1, "tensor": 1}, 0)
    return round(whole.parameters + whole.optimizer)


def smallest_slices(config: Config, model: ModelConfig) -> list[str]:
    """Of each generation of TPUs the smallest slice that holds a step by estimate, its residuals not kept."""
    found = []
    for generation, chip in CHIPS.items():
        for topology in (parse_topology(f"{generation}:{shape}") for shape in chip.shapes):
            try:
                mesh = mesh_sizes(config, topology.devices)
            except UserError:  # the config's mesh has another number of devices
                continue
            if step_bytes(config, model, mesh, 0) <= chip.usable_bytes:
                found.append(topology.name)
                break
    return found


def _time(setup: Setup, workdir: Path, steps: dict[str, Any]) -> dict[str, Any]:
    """Seconds of what is left of the run, as far as they are known, and from what."""
    left = steps["tokens_of_run"] - tokens_of(setup.data, steps["steps_done"])
    measured = _seconds_per_token(workdir) if steps["steps_done"] else None
    if measured is not None:
        return {"seconds": measured * left, "seconds_from": "earlier steps of this run"}
    kind = jax.devices()[0].device_kind
    peak = peak_flops(kind)
    if peak is None:
        return {"seconds": None, "seconds_from": f"not known: this run has no steps yet, and {kind} no known peak"}
    seconds = _flops(setup, steps, left) / (jax.device_count() * peak * ASSUMED_MFU)
    return {"seconds": seconds, "seconds_from": f"assumed: {ASSUMED_MFU:.0%} of the devices' {peak / 1e12:.0f} TFLOP/s"}


def _seconds_per_token(workdir: Path) -> float | None:
    """Of the logged steps after the first one, which waits for compilation; None: there are too few."""
    rows = [row for row in read_metrics(workdir) if "seconds" in row and "tokens" in row]
    tokens = rows[-1]["tokens"] - rows[0]["tokens"] if rows else 0
    return (rows[-1]["seconds"] - rows[0]["seconds"]) / tokens if tokens > 0 else None


def _flops(setup: Setup, steps: dict[str, Any], left: int) -> float:
    """Of so many tokens of training, the reference pass before them and the evaluations among them."""
    config, needs = setup.config, setup.objective.needs
    one_pass = setup.residuals != "recompute" or not needs.scores
    passes = model_passes(config, one_pass)
    scored_first = needs.reference and config.reference.mode == "precomputed" and not steps["steps_done"]
    total = passes * left * _flops_per_token(setup, setup.data.examples)
    total += scored_first * steps["tokens_of_run"] * _flops_per_token(setup, setup.data.examples)
    if setup.eval_data is not None:
        examples = setup.eval_data.examples
        share = 1 - steps["steps_done"] / steps["steps"]
        draws = config.estimator.draws * int(examples.offsets[-1])
        total += steps["evaluations"] * share * draws * _flops_per_token(setup, examples)
    return total


def _flops_per_token(setup: Setup, examples: Examples) -> float:
    """Of a forward pass over the examples, half of whose completions is hidden."""
    lengths = _lengths(examples)
    return forward_flops(setup.model.config, lengths, examples.completion_length / 2) / float(lengths.sum())
