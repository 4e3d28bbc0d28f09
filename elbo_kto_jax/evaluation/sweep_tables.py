"""The results of a sweep as table.csv, table.md and report.html."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax.evaluation.sweep_tasks import Cell
from elbo_kto_jax.reports.sweep import write_sweep_report
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.runtime.grid import SweepConfig
from elbo_kto_jax.runtime.messages import one_line

COLUMNS = ("cell", "checkpoint", "task", "sampler", "draws", "metric", "value", "low", "high", "seconds")
_SHOWN = 200  # characters of a value in table.md; table.csv has them all


def write_tables(
    workdir: Path, config: SweepConfig, cells: Sequence[Cell], done: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """table.csv, table.md and report.html of the cells that are done; returns the summary."""
    rows = [
        {
            "cell": cell.name,
            "checkpoint": cell.checkpoint,
            "task": cell.task,
            "sampler": None if cell.sampler is None else to_json(dict(cell.sampler)),
            "draws": cell.draws,
            **metric,
            "seconds": result["seconds"],
        }
        for cell in cells
        if (result := done.get(cell.name))
        for metric in result["metrics"]
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table, report = workdir / "table.csv", workdir / "report.html"
    atomic_write(table, text.getvalue())
    atomic_write(table.with_suffix(".md"), _markdown(rows))
    write_sweep_report(
        report, title="Evaluation sweep", config=config.to_dict(), rows=rows, cells=len(cells), done=len(done)
    )
    return {
        "cells": len(cells),
        "done": len(done),
        "table": str(table),
        "markdown": str(table.with_suffix(".md")),
        "report": str(report),
    }


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [name for name in COLUMNS if name != "cell"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        values = ((f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v)) for v in map(row.get, columns))
        lines.append([_markdown_text(value) for value in values])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_text(value: str) -> str:
    """A value as it stands in a cell, whatever it says: on one line, bounded, neither HTML nor Markdown nor a link."""
    text = one_line(value, _SHOWN)
    for character, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("://", "&#58;//"), ("www.", "www&#46;")):
        text = text.replace(character, name)
    text = re.sub(r"([\\`*\[\]|~$!])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word it is only itself
