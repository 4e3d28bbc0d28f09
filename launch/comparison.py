"""What the comparisons on the quickstart's task share: a cell is one alignment and its win rate against its base.

    WORKDIR/seed-S/                   bash launch/quickstart.sh --seed=S: data, base model, and its own alignment
    WORKDIR/seed-S/cells/NAME/        the alignment, its evaluation, result.json
    WORKDIR/table.csv, table.json     means over the seeds, with 95% t intervals

A cell that has its result is not run again, so the same command goes on where it was interrupted, and more seeds or
cells can be added later.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tqdm import tqdm

from elbo_kto_jax import cli, evaluate, quickstart, train
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json

_KEPT = ("adjusted_win_rate", "ci95", "comparisons")


def numbers(text: str, flag: str) -> list[int]:
    """The whole numbers of a flag, with commas between them.

    Raises:
      UserError: it is something else.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag}={text}: expected whole numbers with commas between them") from None


def run_cells(
    workdir: Path, seeds: Sequence[int], cells: Sequence[str], arguments: Callable[[Path, str], list[str]]
) -> tuple[dict[tuple[int, str], dict[str, Any]], int]:
    """The results by (seed, name of the cell), and how many had to be run.

    `arguments` are those of `train` for a cell, given the folder of its seed.
    """
    every = [(seed, cell) for seed in seeds for cell in cells]
    missing = [(seed, cell) for seed, cell in every if not _result_file(workdir, seed, cell).is_file()]
    cli.log.info("%d of %d cells have to be run", len(missing), len(every))
    for seed, cell in tqdm(missing, desc="cells", unit="cell"):
        run_cell(workdir, seed, cell, arguments)
    return {(s, c): json.loads(_result_file(workdir, s, c).read_bytes()) for s, c in every}, len(missing)


def _result_file(workdir: Path, seed: int, cell: str) -> Path:
    return workdir / f"seed-{seed}" / "cells" / cell / "result.json"


def run_cell(workdir: Path, seed: int, cell: str, arguments: Callable[[Path, str], list[str]]) -> None:
    """Aligns the base model of a seed, which is made first if need be, and evaluates it against that."""
    home, file = workdir / f"seed-{seed}", _result_file(workdir, seed, cell)
    if not (home / "evaluation" / "report.html").is_file():  # the last that the quickstart writes
        quickstart.main([f"--workdir={home}", f"--seed={seed}"])
    common = [f"--config={quickstart.CONFIG}", f"--config.seed={seed}"]
    model = f"--config.model.path={home / 'base'}"
    aligned = train.main([*common, model, *arguments(home, cell), f"--workdir={file.parent / 'aligned'}"])
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
    atomic_write(file, to_json({key: result[key] for key in _KEPT} | {"loss": aligned["loss"]}) + "\n")


def write_tables(workdir: Path, rows: list[dict[str, Any]], cells: list[dict[str, Any]]) -> Path:
    """Writes the rows as table.csv, and with the cells as table.json; returns the former."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(workdir / "table.csv", text.getvalue())
    atomic_write(workdir / "table.json", to_json({"rows": rows, "cells": cells}) + "\n")
    return workdir / "table.csv"


def interval(name: str, values: np.ndarray) -> dict[str, float]:
    """The mean over the seeds as `name`, and the ends of its 95% t interval (NaN for one seed)."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    margin = stats.t.ppf(0.975, max(1, len(values) - 1)) * error
    mean = float(np.mean(values))
    return {name: mean, f"{name}_low": mean - float(margin), f"{name}_high": mean + float(margin)}
