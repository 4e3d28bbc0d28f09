"""Does the choice of masks show in the win rate? python -m launch.compare_estimators --workdir=DIR

The quickstart's alignment with every mask scheme of --schemes and number of draws of --draws, from the quickstart's
base model of each seed, everything else equal; then the win rate of each against that base.

    WORKDIR/seed-S/                        bash launch/quickstart.sh --seed=S: data, base model, and its own alignment
    WORKDIR/seed-S/cells/SCHEME-K/         the alignment, its evaluation, result.json
    WORKDIR/table.csv, table.json          per cell: win rate over the seeds, and the difference to uniform's, paired
                                           by seed; 95% t intervals over the seeds

A cell that has its result is not run again, so the same command goes on where it was interrupted, and more seeds,
schemes or draws can be added later.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tqdm import tqdm

from elbo_kto_jax import cli, evaluate
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.files import atomic_write, to_json
from elbo_kto_jax.train import __main__ as train
from launch import quickstart


def main(argv: list[str]) -> dict[str, Any]:
    flags = cli.Flags("launch.compare_estimators", "Win rates of the quickstart by mask scheme and number of draws.")
    flags.add_argument("--workdir", default="runs/estimators", help="working folder (default: %(default)s)")
    flags.add_argument("--seeds", type=str, default="0,1,2,3,4", help="of data, model and masks (default: %(default)s)")
    flags.add_argument(
        "--schemes", type=str, default="uniform,balanced", help="estimator.scheme (default: %(default)s)"
    )
    flags.add_argument("--draws", type=str, default="1,2,4,8", help="estimator.draws (default: %(default)s)")
    options, _ = flags.parse(argv)
    workdir = Path(options.workdir)
    seeds, draws = _numbers(options.seeds, "--seeds"), _numbers(options.draws, "--draws")
    schemes = options.schemes.split(",")
    cells = [(seed, scheme, k) for seed in seeds for scheme in schemes for k in draws]
    missing = [cell for cell in cells if not _result_file(workdir, *cell).is_file()]
    cli.log.info("%d of %d cells have to be run", len(missing), len(cells))
    for seed, scheme, k in tqdm(missing, desc="cells", unit="cell"):
        run_cell(workdir, seed, scheme, k)
    results = {cell: json.loads(_result_file(workdir, *cell).read_bytes()) for cell in cells}
    rows = table(results, seeds, schemes, draws)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(workdir / "table.csv", text.getvalue())
    cells_found = [
        {"seed": seed, "scheme": scheme, "draws": k, **result} for (seed, scheme, k), result in results.items()
    ]
    atomic_write(workdir / "table.json", to_json({"rows": rows, "cells": cells_found}) + "\n")
    return {"cells": len(cells), "run": len(missing), "table": str(workdir / "table.csv"), "rows": rows}


def _numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag}={text}: expected whole numbers with commas between them") from None


def _result_file(workdir: Path, seed: int, scheme: str, draws: int) -> Path:
    return workdir / f"seed-{seed}" / "cells" / f"{scheme}-{draws}" / "result.json"


def run_cell(workdir: Path, seed: int, scheme: str, draws: int) -> None:
    """Aligns the base model of a seed, which is made first if need be, and evaluates it against that."""
    home, file = workdir / f"seed-{seed}", _result_file(workdir, seed, scheme, draws)
    if not (home / "evaluation" / "report.html").is_file():  # the last that the quickstart writes
        quickstart.main([f"--workdir={home}", f"--seed={seed}"])
    common = [f"--config={quickstart.CONFIG}", f"--config.seed={seed}"]
    aligned = train.main(
        [
            *common,
            f"--config.model.path={home / 'base'}",
            f"--config.data.train={home / 'data' / 'feedback.jsonl'}",
            f"--config.estimator.scheme={scheme}",
            f"--config.estimator.draws={draws}",
            f"--workdir={file.parent / 'aligned'}",
        ]
    )
    result = evaluate.main(
        [
            *common,
            f"--checkpoint={aligned['checkpoint']}",
            f"--baseline={home / 'base'}",
            f"--prompts={home / 'data' / 'prompts.jsonl'}",
            f"--out={file.parent / 'evaluation'}",
            "--overwrite",
        ]
    )
    kept = ("adjusted_win_rate", "ci95", "comparisons")
    atomic_write(file, to_json({key: result[key] for key in kept} | {"loss": aligned["loss"]}) + "\n")


def table(results: dict, seeds: list[int], schemes: list[str], draws: list[int]) -> list[dict[str, Any]]:
    """A row per scheme and number of draws: means over the seeds, with 95% t intervals (NaN for one seed)."""
    rates = {
        (scheme, k): np.array([results[seed, scheme, k]["adjusted_win_rate"] for seed in seeds])
        for scheme in schemes
        for k in draws
    }
    rows = []
    for (scheme, k), found in rates.items():
        row = {"scheme": scheme, "draws": k, "seeds": len(seeds), **_mean("adjusted_win_rate", found)}
        if "uniform" in schemes:
            row |= _mean("minus_uniform", found - rates["uniform", k])
        rows.append(row)
    return rows


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    margin = stats.t.ppf(0.975, max(1, len(values) - 1)) * error
    mean = float(np.mean(values))
    return {name: mean, f"{name}_low": mean - float(margin), f"{name}_high": mean + float(margin)}


if __name__ == "__main__":
    cli.run(main)
