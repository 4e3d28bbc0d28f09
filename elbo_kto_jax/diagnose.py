"""python -m elbo_kto_jax.diagnose --config=... --checkpoint=DIR --out=DIR: bias and variance of the ELBO substitution.

On records of config.data.train, for every mask scheme and K = 1, 2, 4, 8, 16 draws (--schemes, --draws for fewer): what
the checkpoint's ELBOs, the rewards against the reference (config.reference.path, or else config.model.path), the loss
and the gradient vary by from draw to draw, what bias the value function makes of it, and what it costs.
--config.estimator.* do not matter.

    OUT/table.csv        a row per scheme and K; figures with the ends of their 95% intervals
    OUT/diagnosis.json   the same, with variances by group of parameters, label, length and hidden share
    OUT/report.html      the plots, and which scheme and how many draws to use
"""

import csv
import dataclasses
import io
import time
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from elbo_kto_jax import cli, objectives
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

SCHEMES = tuple(name for name, scheme in masks.SCHEMES.items() if scheme.unbiased)
DRAWS = (1, 2, 4, 8, 16)
_MOST_MASKS = 10_000_000  # their indices and weights are in memory, and the distinct ones among them


def main(argv: list[str]) -> dict:
    flags = cli.Flags("elbo_kto_jax.diagnose", "Measure the bias and the variance of the estimator on real records.")
    flags.add_config()
    flags.add_argument(
        "--checkpoint", required=True, help="the policy: Hugging Face folder, checkpoint or training run"
    )
    flags.add_argument("--out", required=True, metavar="DIR", help="where table.csv, diagnosis.json and report.html go")
    flags.add_argument("--records", type=int, default=32, help="drawn from config.data.train (default: %(default)s)")
    flags.add_argument("--repeats", type=int, default=8, help="sets of masks per record (default: %(default)s)")
    flags.add_argument(
        "--schemes", type=str, default=",".join(SCHEMES), help="uniform is always among them (default: all)"
    )
    flags.add_argument(
        "--draws", type=str, default=",".join(map(str, DRAWS)), help="values of K (default: %(default)s)"
    )
    flags.add_argument("--overwrite", action="store_true", help="replace earlier results")
    flags.add_argument("--skip-bad-records", action="store_true", help="count and list bad records instead of stopping")
    options, config = flags.parse(argv)
    files = {name: Path(options.out) / name for name in ("table.csv", "diagnosis.json", "report.html")}
    for file in files.values():
        cli.refuse_existing(file, options.overwrite)
    for flag in ("records", "repeats"):
        if getattr(options, flag) < 2:
            raise UserError(f"--{flag}: expected at least 2, a variance needs as many; got {getattr(options, flag)}")
    settings = _settings(options)
    if not isinstance(objectives.build(config.objective), ValueFunction):
        raise UserError(f"config.objective.name: {config.objective.name!r} has no rewards to diagnose")
    began = time.monotonic()
    if len({setting.scheme for setting in settings} - {"bernoulli"}) < 2:
        cli.log.warning("biases of the estimate are not measured: they need two of --schemes besides bernoulli")
    result = diagnose(config, options, settings)
    result["seconds"] = time.monotonic() - began

    rows = [tables.flat(row) for row in result["rows"]]
    table = io.StringIO()
    writer = csv.DictWriter(table, tables.columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(files["table.csv"], table.getvalue())
    atomic_write(files["diagnosis.json"], to_json(result) + "\n")
    write_diagnosis_report(files["report.html"], title=f"Estimator: {options.checkpoint}", result=result)
    cli.log.info("%s", result["recommendation"]["text"])
    cli.log.info("report: %s", files["report.html"])
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


def _settings(options) -> list[Setting]:
    """What --schemes and --draws ask for, schemes in the order of the config's choices."""
    schemes = {"uniform", *options.schemes.split(",")}
    if not schemes <= set(SCHEMES):
        raise UserError(f"--schemes={options.schemes}: expected some of {', '.join(SCHEMES)}")
    draws = options.draws.split(",")
    if not all(k.isdecimal() and len(k) < 10 and int(k) for k in draws):
        raise UserError(
            f"--draws={options.draws}: expected numbers of at least 1 and less than 10^9, with commas between them"
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


def diagnose(config: Config, options, settings: list[Setting]) -> dict:
    """Everything that diagnosis.json holds, but for the time that it took."""
    reference_path = config.reference.path or config.model.path
    reference_flag = "--config.reference.path" if config.reference.path else "--config.model.path"
    if not reference_path:
        raise UserError("--config.model.path: give the reference's checkpoint, which rewards are measured against")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=options.checkpoint),
        data=dataclasses.replace(config.data, eval=""),
    )
    setup = prepare(config, skip_bad=options.skip_bad_records, flags=("--checkpoint", "--config.data.train"))
    examples = setup.data.examples
    least = 2 * len(setup.objective.contrast)
    if len(examples) < least:
        raise UserError(
            f"--config.data.train={config.data.train}: expected at least {least} examples, got {len(examples)}"
        )
    records = _chosen(len(examples), options.records, len(setup.objective.contrast), config.seed)
    masks = len(records) * options.repeats * sum(setting.draws for setting in settings)
    if masks > _MOST_MASKS:
        raise UserError(
            f"{masks:.3g} masks ({len(records)} records, {options.repeats} repetitions, {len(settings)} settings), "
            f"expected at most {_MOST_MASKS}; lower --draws, --repeats or --records"
        )
    cli.log.info(
        "%d of %d examples, %d repetitions of %d settings",
        len(records),
        len(examples),
        options.repeats,
        len(settings),
    )
    policy = setup.load_params(options.checkpoint, "--checkpoint")
    reference = setup.load_params(reference_path, reference_flag)
    measurement = Measurement(setup, records, settings, setup.objective.contrast)
    values = measurement.values(policy, reference, options.repeats)
    analysis = Analysis(
        values,
        measurement.gradients(policy),
        objective=setup.objective,
        length=examples.completion_length[records].astype(np.int64),
        is_desirable=examples.is_desirable[records],
        flops={setting: _step_flops(setup, records, setting, values.hidden[setting]) for setting in settings},
        batch_size=config.train.global_batch_size,
    )
    return {
        "checkpoint": options.checkpoint,
        "reference": reference_path,
        "data": config.data.train,
        "records": len(records),
        "repeats": options.repeats,
        "masks": values.masks,
        "batch_size": config.train.global_batch_size,
        "recommendation": recommendation(analysis),
        "rows": tables.by_setting(analysis),
        "breakdown": tables.breakdown(analysis),
        "by_count": tables.by_count(analysis),
        "config": config.to_dict(),
    }


if __name__ == "__main__":
    cli.run(main)
