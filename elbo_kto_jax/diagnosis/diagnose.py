"""A diagnosis of the ELBO substitution on real records: measured, analysed, written as table, JSON and report."""

import csv
import dataclasses
import io
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from elbo_kto_jax import objectives
from elbo_kto_jax.diagnosis import tables
from elbo_kto_jax.diagnosis.analyse import Analysis
from elbo_kto_jax.diagnosis.measure import Measurement, Setting
from elbo_kto_jax.diagnosis.recommendation import recommendation
from elbo_kto_jax.diffusion import masks
from elbo_kto_jax.models.flops import forward_flops
from elbo_kto_jax.objectives.protocol import ValueFunction
from elbo_kto_jax.reports.diagnosis import write_diagnosis_report
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.training.setup import Setup, prepare

log = logging.getLogger(__name__)
SCHEMES = tuple(name for name, scheme in masks.SCHEMES.items() if scheme.unbiased)
DRAWS = (1, 2, 4, 8, 16)
FILES = ("table.csv", "diagnosis.json", "report.html")
_MOST_MASKS = 10_000_000  # their indices and weights are in memory, and the distinct ones among them


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be diagnosed.

    Attributes:
      checkpoint: the policy.
      settings: mask schemes and numbers of draws, see `settings_of`.
      records: how many of config.data.train are drawn.
      repeats: sets of masks per record and setting.
      skip_bad: count and list bad records instead of stopping.
    """

    checkpoint: str
    settings: Sequence[Setting]
    records: int
    repeats: int
    skip_bad: bool = False


def diagnose(request: Request, config: Config, out: Path) -> dict:
    """Measures bias, variance and cost of every setting, and writes FILES into `out`; the summary.

    Raises:
      UserError: the objective has no rewards, or something about the request, the models or the data has to be mended.
    """
    for name in ("records", "repeats"):
        if getattr(request, name) < 2:
            raise UserError(f"--{name}: expected at least 2, a variance needs as many; got {getattr(request, name)}")
    objective = objectives.build(config.objective)
    if not isinstance(objective, ValueFunction):
        raise UserError(f"config.objective.name: {config.objective.name!r} has no rewards to diagnose")
    began = time.monotonic()
    if len({setting.scheme for setting in request.settings} - {"bernoulli"}) < 2:
        log.warning("biases of the estimate are not measured: they need two of --schemes besides bernoulli")
    result = _result(request, config, objective)
    result["seconds"] = time.monotonic() - began
    return _write(result, {name: out / name for name in FILES})


def _write(result: dict, files: dict[str, Path]) -> dict:
    """Writes the table, the JSON file and the report; the summary."""
    rows = [tables.flat(row) for row in result["rows"]]
    table = io.StringIO()
    writer = csv.DictWriter(table, tables.columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(files["table.csv"], table.getvalue())
    atomic_write(files["diagnosis.json"], to_json(result) + "\n")
    write_diagnosis_report(files["report.html"], title=f"Estimator: {result['checkpoint']}", result=result)
    log.info("%s", result["recommendation"]["text"])
    log.info("report: %s", files["report.html"])
    return {
        "records": result["records"],
        "repeats": result["repeats"],
        "masks": result["masks"],
        "scheme": result["recommendation"]["scheme"],
        "draws": result["recommendation"]["draws"],
        "recommendation": result["recommendation"]["text"],
        "seconds": result["seconds"],
        "table": str(files["table.csv"]),
        "json": str(files["diagnosis.json"]),
        "report": str(files["report.html"]),
    }


def settings_of(schemes_text: str, draws_text: str) -> list[Setting]:
    """What --schemes and --draws ask for, schemes in the order of the config's choices.

    Raises:
      UserError: a scheme is not known, or a number of draws is none.
    """
    schemes = {"uniform", *schemes_text.split(",")}
    if not schemes <= set(SCHEMES):
        raise UserError(f"--schemes={schemes_text}: expected some of {', '.join(SCHEMES)}")
    draws = draws_text.split(",")
    if not all(k.isdecimal() and len(k) < 10 and int(k) for k in draws):
        raise UserError(
            f"--draws={draws_text}: expected numbers of at least 1 and less than 10^9, with commas between them"
        )
    return [Setting(s, k) for s in SCHEMES if s in schemes for k in sorted({int(k) for k in draws})]


def _chosen(examples: int, records: int, size: int, seed: int) -> Int64[np.ndarray, " n"]:
    """About so many of the examples, drawn at random, units of `size` neighbours whole."""
    units = np.sort(np.random.default_rng(seed).permutation(examples // size)[: max(2, records // size)])
    return (size * units[:, None] + np.arange(size)).ravel()


def _step_flops(
    setup: Setup, records: Int64[np.ndarray, " n"], setting: Setting, hidden: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """FLOPs of a step for each record, forward and backward: three times a forward pass over each draw."""
    length = np.diff(setup.data.examples.offsets)[records]
    each = [forward_flops(setup.model.config, length[n : n + 1], hidden[n : n + 1]) for n in range(len(records))]
    return 3 * setting.draws * np.array(each)


def _records(request: Request, config: Config, setup: Setup, unit: int) -> Int64[np.ndarray, " n"]:
    """The examples to measure, in units of `unit` neighbours.

    Raises:
      UserError: there are too few, or more masks than fit into memory.
    """
    count, least = len(setup.data.examples), 2 * unit
    if count < least:
        raise UserError(f"--config.data.train={config.data.train}: expected at least {least} examples, got {count}")
    records = _chosen(count, request.records, unit, config.seed)
    masks = len(records) * request.repeats * sum(setting.draws for setting in request.settings)
    if masks > _MOST_MASKS:
        raise UserError(
            f"{masks:.3g} masks ({len(records)} records, {request.repeats} repetitions, {len(request.settings)} "
            f"settings), expected at most {_MOST_MASKS}; lower --draws, --repeats or --records"
        )
    log.info(
        "%d of %d examples, %d repetitions of %d settings",
        len(records),
        count,
        request.repeats,
        len(request.settings),
    )
    return records


def _result(request: Request, config: Config, objective: ValueFunction) -> dict:
    """Everything that diagnosis.json holds, but for the time that it took."""
    reference_path = config.reference.path or config.model.path
    reference_flag = "--config.reference.path" if config.reference.path else "--config.model.path"
    if not reference_path:
        raise UserError("--config.model.path: give the reference's checkpoint, which rewards are measured against")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=request.checkpoint),
        data=dataclasses.replace(config.data, eval=""),
    )
    setup = prepare(config, skip_bad=request.skip_bad, flags=("--checkpoint", "--config.data.train"))
    examples = setup.data.examples
    records = _records(request, config, setup, len(objective.contrast))
    policy = setup.load_params(request.checkpoint, "--checkpoint")
    reference = setup.load_params(reference_path, reference_flag)
    measurement = Measurement(setup, records, request.settings, objective.contrast)
    values = measurement.values(policy, reference, request.repeats)
    analysis = Analysis(
        values,
        measurement.gradients(policy),
        objective=objective,
        length=examples.completion_length[records].astype(np.int64),
        is_desirable=examples.is_desirable[records],
        flops={setting: _step_flops(setup, records, setting, values.hidden[setting]) for setting in request.settings},
        batch_size=config.train.global_batch_size,
    )
    return {
        "checkpoint": request.checkpoint,
        "reference": reference_path,
        "data": config.data.train,
        "records": len(records),
        "repeats": request.repeats,
        "masks": values.masks,
        "batch_size": config.train.global_batch_size,
        "recommendation": recommendation(analysis),
        "rows": tables.by_setting(analysis),
        "breakdown": tables.breakdown(analysis),
        "by_count": tables.by_count(analysis),
        "config": config.to_dict(),
    }
