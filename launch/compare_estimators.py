"""Does the choice of masks show in the win rate? python -m launch.compare_estimators --workdir=DIR

The quickstart's alignment with every mask scheme of --schemes and number of draws of --draws, from the quickstart's
base model of each seed, everything else equal; then the win rate of each against that base, and its difference to
uniform's, paired by seed. launch/comparison.py has the files.
"""

from pathlib import Path
from typing import Any

import numpy as np

from elbo_kto_jax import cli
from elbo_kto_jax.runtime import paths
from launch import comparison

_RATE = "--config.optimizer.learning_rate=1e-4"  # low enough that not every K learns the task


def main(argv: list[str]) -> dict[str, Any]:
    flags = cli.Flags("launch.compare_estimators", "Win rates of the quickstart by mask scheme and number of draws.")
    flags.add_argument("--workdir", default="runs/estimators", help="working folder (default: %(default)s)")
    flags.add_argument("--seeds", type=str, default="0,1,2,3,4", help="of data, model and masks (default: %(default)s)")
    flags.add_argument(
        "--schemes", type=str, default="uniform,balanced", help="estimator.scheme (default: %(default)s)"
    )
    flags.add_argument("--draws", type=str, default="1,2,4,8", help="estimator.draws (default: %(default)s)")
    options = flags.parse_flags(argv)
    workdir, schemes = paths.here(options.workdir, "--workdir"), options.schemes.split(",")
    seeds, draws = comparison.numbers(options.seeds, "--seeds"), comparison.numbers(options.draws, "--draws")
    settings = {f"{scheme}-{k}": (scheme, k) for scheme in schemes for k in draws}

    def arguments(home: Path, cell: str) -> list[str]:
        scheme, k = settings[cell]
        data = f"--config.data.train={home / 'data' / 'feedback.jsonl'}"
        return [data, f"--config.estimator.scheme={scheme}", f"--config.estimator.draws={k}", _RATE]

    results, ran = comparison.run_cells(workdir, seeds, list(settings), arguments)
    rows = table(results, seeds, settings)
    cells = [
        {"seed": seed, "scheme": settings[cell][0], "draws": settings[cell][1], **result}
        for (seed, cell), result in results.items()
    ]
    file = comparison.write_tables(workdir, rows, cells)
    return {"cells": len(results), "run": ran, "table": str(file), "rows": rows}


def table(results: dict, seeds: list[int], settings: dict[str, tuple[str, int]]) -> list[dict[str, Any]]:
    """A row per scheme and number of draws: means over the seeds, with 95% t intervals (NaN for one seed)."""
    rates = {
        setting: np.array([results[seed, cell]["adjusted_win_rate"] for seed in seeds])
        for cell, setting in settings.items()
    }
    rows = []
    for (scheme, k), found in rates.items():
        row = {
            "scheme": scheme,
            "draws": k,
            "seeds": len(seeds),
            **comparison.interval("adjusted_win_rate", found),
        }
        if ("uniform", k) in rates:
            row |= comparison.interval("minus_uniform", found - rates["uniform", k])
        rows.append(row)
    return rows


if __name__ == "__main__":
    cli.run(main)
