"""A grid of evaluations: checkpoints x tasks x sampler settings x draws, in one table and one report.

    python -m elbo_kto_jax.sweep --config=configs/eval_sweep.py --workdir=DIR

The axes are the lists of config.sweep. A task takes the axes that its result depends on: what generates takes those of
the sampler, what estimates a likelihood the numbers of draws. A cell of the grid is one such evaluation. Its prompts
(or masked rows) are spread over all devices, so that every device works whatever the grid looks like, and one program
serves all cells with equal settings. A checkpoint is loaded once for all of its cells.

    DIR/config.json            the grid; another one in the same folder is refused
    DIR/cells/NAME/            result.json and what `evaluate` and `score` write; a cell that has a result of the same
                               settings, weights and data (by their content) is not evaluated again
    DIR/answers/, DIR/judge/   answers and verdicts that cells share
    DIR/table.csv, table.md, report.html
"""

import argparse
import csv
import dataclasses
import datetime
import io
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elbo_kto_jax import cli, evaluate, score
from elbo_kto_jax.data.chat import make_repeatable
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.evaluation import kept
from elbo_kto_jax.evaluation.messages import one_line, shown
from elbo_kto_jax.reports.sweep import write_sweep_report
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.config import SweepConfig
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.runtime.workdir import open_workdir, stop_on_signal
from elbo_kto_jax.sampling.respond import Checkpoint

WIN_RATE, ELBO, EXACT_ELBO = evaluate.WIN_RATE, "elbo", "exact_elbo"
COLUMNS = ("cell", "checkpoint", "task", "sampler", "draws", "metric", "value", "low", "high", "seconds")

_SHOWN = 200  # characters of a value in table.md; table.csv has them all


@dataclasses.dataclass(frozen=True)
class Cell:
    """One evaluation of the grid.

    Attributes:
      name: of its folder.
      checkpoint: as config.sweep names it.
      task: WIN_RATE, ELBO, EXACT_ELBO or a task of lm-evaluation-harness.
      sampler: the keys of config.sampler that it replaces; None where nothing is sampled.
      draws: masks per example or answer; None: the task's own, or none at all.
      settings: all that its result depends on.
    """

    name: str
    checkpoint: str
    task: str
    sampler: Mapping[str, Any] | None
    draws: int | None
    settings: Mapping[str, Any]


def main(argv: list[str]) -> dict[str, Any]:
    flags, config = _parser().parse(argv)
    run = _Run(flags, config)
    with open_workdir(run.workdir, config, flags.overwrite, "sweep") as folder:
        folder.claim({}, {})  # each cell knows what it depends on
        run.moment = folder.moment
        summary = _fill(run)
        folder.finish()
    return summary


def _fill(run: "_Run") -> dict[str, Any]:
    """Evaluates the cells that are left, and writes the tables after each."""
    done = {cell.name: result for cell in run.cells if (result := run.result(cell))}
    left = [cell for cell in run.cells if cell.name not in done]
    cli.log.info("%d cells, %d of them done", len(run.cells), len(done))
    with stop_on_signal() as stop_requested, tqdm(total=len(run.cells), initial=len(done), desc="cells") as bar:
        if not processes.several():  # where there are several, all must ask at the same point
            run.stop_requested = stop_requested
        for cell in run.evaluated(left):
            done[cell.name] = run.result(cell)
            bar.update()
            _write_tables(run, done)
            if stop_requested() and len(done) < len(run.cells):
                raise Interrupted(f"{len(done)} of {len(run.cells)} cells are done, the same command goes on")
    return _write_tables(run, done)


class _Run:
    """A sweep's grid, checked as far as that is possible without the weights, and what its cells share."""

    def __init__(self, flags: argparse.Namespace, config: SweepConfig):
        self.flags, self.config, self.workdir = flags, config, Path(flags.workdir)
        self.stop_requested: Callable[[], bool] = bool  # no, until there is somebody to ask
        self.moment = datetime.datetime.now()  # until the working folder says when the sweep began
        sweep = config.sweep
        _check_axes(config)
        flags.limit = sweep.limit
        harness_tasks = [task for task in sweep.tasks if task not in (WIN_RATE, ELBO, EXACT_ELBO)]
        loaded = evaluate.load_benchmarks(harness_tasks, flags, config, "config.sweep.tasks")
        self._benchmarks = dict(zip(harness_tasks, loaded, strict=True))
        for task, benchmark in self._benchmarks.items():
            for overrides in sweep.sampler:
                config.with_sampler({**benchmark.settings.sampler, **overrides}, f"task {task} with {overrides}")
        if WIN_RATE in sweep.tasks:
            for key in ("baseline", "prompts"):
                if not getattr(sweep, key):
                    raise UserError(f"config.sweep.{key}: missing; the task {WIN_RATE!r} needs it")
            self._prompts = evaluate.read_prompts(sweep.prompts, "config.sweep.prompts")
            self._judge = evaluate.make_judge(
                flags, self._prompts, self.workdir / "judge", lambda: self.stop_requested()
            )
            self._judge_settings = evaluate.describe_judge(flags)
        if {ELBO, EXACT_ELBO} & set(sweep.tasks):
            if not sweep.data:
                raise UserError(f"config.sweep.data: missing; the tasks {ELBO!r} and {EXACT_ELBO!r} need it")
            self._data_digest = _digest_of_records(sweep.data)
        sources = [*sweep.checkpoints, *([sweep.baseline] if WIN_RATE in sweep.tasks else [])]
        self._models = {source: kept.pin(source, self._flag(source)) for source in dict.fromkeys(sources)}
        self._open: Checkpoint | None = None
        self.cells = list(self._plan())

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell, where there is a complete one of the same settings."""
        found = kept.read_json(self._folder(cell) / "result.json")
        return found if found and found.get("settings") == kept.as_json(cell.settings) else None

    def evaluated(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        """Evaluates the cells, checkpoint by checkpoint, and yields each when its result is written."""
        if any(cell.task == WIN_RATE for cell in cells):  # before the others, so that one model is in memory at a time
            for overrides in {to_json(cell.sampler): cell.sampler for cell in cells if cell.task == WIN_RATE}.values():
                self._answers(self.config.sweep.baseline, overrides)
        for cell in sorted(cells, key=lambda cell: self.config.sweep.checkpoints.index(cell.checkpoint)):
            cli.log.info("cell %s: %s", cell.name, cell.checkpoint)
            began = time.monotonic()
            metrics = self._evaluate(cell)
            result = {"settings": cell.settings, "metrics": metrics, "seconds": time.monotonic() - began}
            atomic_write(self._folder(cell) / "result.json", f"{to_json(result)}\n")
            yield cell

    def _plan(self) -> Iterator[Cell]:
        sweep = self.config.sweep
        for source in sweep.checkpoints:
            for task in sweep.tasks:
                for overrides, draws in self._axes(task):
                    name = _cell_name(source, task, overrides, draws)
                    yield Cell(name, source, task, overrides, draws, self._settings(source, task, overrides, draws))

    def _axes(self, task: str) -> list[tuple[Mapping[str, Any] | None, int | None]]:
        """(sampler, draws) of every cell of a task."""
        sampled = [(overrides, None) for overrides in self.config.sweep.sampler]
        drawn = [(None, draws) for draws in self.config.sweep.draws or [None]]
        if task in (WIN_RATE, ELBO, EXACT_ELBO):
            return {WIN_RATE: sampled, ELBO: drawn, EXACT_ELBO: [(None, None)]}[task]
        benchmark = self._benchmarks[task]
        return (sampled if benchmark.generates else []) + (drawn if benchmark.compares else [])

    def _settings(
        self, source: str, task: str, overrides: Mapping[str, Any] | None, draws: int | None
    ) -> dict[str, Any]:
        settings = {**self._model_settings(source), "task": task, "sampler": overrides, "draws": draws}
        if task == WIN_RATE:
            baseline = self._models[self.config.sweep.baseline].content
            return {**settings, "baseline": baseline, "prompts": self._prompts.digest, "judge": self._judge_settings}
        if task in (ELBO, EXACT_ELBO):
            return {**settings, "data": self._data_digest}
        benchmark = self._benchmarks[task]
        row = dataclasses.asdict(benchmark.settings)
        return {**settings, "row": row, "content": benchmark.content, "limit": self.config.sweep.limit}

    def _model_settings(self, source: str) -> dict[str, Any]:
        """The weights and everything of the config that an evaluation may read; devices do not change a result."""
        other = ("sweep", "mesh", "train")
        config = {key: value for key, value in self.config.to_dict().items() if key not in other}
        return {"checkpoint": self._models[source].content, "config": config}

    def _evaluate(self, cell: Cell) -> list[dict[str, Any]]:
        if cell.task == WIN_RATE:
            return self._win_rate(cell)
        if cell.task in (ELBO, EXACT_ELBO):
            return self._elbo(cell)
        benchmark = self._benchmarks[cell.task]
        row = benchmark.settings
        row = dataclasses.replace(row, sampler={**row.sampler, **(cell.sampler or {})}, draws=cell.draws or row.draws)
        found = evaluate.run_benchmark(
            benchmark._replace(settings=row),
            self._opened(cell.checkpoint),
            self.config,
            self.flags,
            self._folder(cell) / f"{benchmark.name}.json",
        )
        return [
            _metric(name, value, found.get(name.replace(",", "_stderr,")))
            for name, value in found.items()
            if "_stderr," not in name
        ]

    def _win_rate(self, cell: Cell) -> list[dict[str, Any]]:
        sweep = self.config.sweep
        comparison = evaluate.Comparison(
            (cell.checkpoint, sweep.baseline),
            self._prompts,
            self._answers(cell.checkpoint, cell.sampler),
            self._answers(sweep.baseline, cell.sampler),
        )
        found = evaluate.compare(comparison, self._judge, self._folder(cell))
        low, high = found["ci95"]
        return [{"metric": "adjusted_win_rate", "value": found["adjusted_win_rate"], "low": low, "high": high}]

    def _answers(self, source: str, overrides: Mapping[str, Any]) -> list[str]:
        """The answers of a checkpoint to the prompts of the win rate; written down, since several cells need them."""
        config = self.config.with_sampler(overrides, "config.sweep.sampler")
        return kept.answers(
            self.workdir / "answers",
            self._models[source],
            self._prompts.records,
            self._prompts.digest,
            config,
            lambda: self._opened(source),
        )

    def _elbo(self, cell: Cell) -> list[dict[str, Any]]:
        checkpoint = self._opened(cell.checkpoint)
        estimator = dataclasses.replace(self.config.estimator, draws=cell.draws or self.config.estimator.draws)
        model = dataclasses.replace(self.config.model, param_dtype=self.config.model.dtype)  # as they are in memory
        config = dataclasses.replace(self.config, estimator=estimator, model=model)
        options = argparse.Namespace(
            checkpoint=checkpoint.source, data=config.sweep.data, exact=cell.task == EXACT_ELBO, skip_bad_records=False
        )
        rows = list(score.score_records(config, options, checkpoint.params, self.moment))
        atomic_write(self._folder(cell) / "elbo.jsonl", "".join(f"{to_json(row)}\n" for row in rows))
        errors = [row["stderr"] for row in rows]
        # Of the estimate, over masks; with one draw a record there is no telling.
        error = None if None in errors else float(np.sqrt(np.sum(np.square(errors))) / len(rows))
        return [_metric("mean_elbo", float(np.mean([row["elbo"] for row in rows])), error)]

    def _opened(self, source: str) -> Checkpoint:
        """The checkpoint; the one before it is dropped, so that one set of weights is in memory."""
        model = self._models[source]
        if self._open is None or self._open.source != model.folder:
            self._open = None
            self._open = model.load(self.config)
            make_repeatable(self._open.tokenizer, self.moment, source)
        return self._open

    def _flag(self, source: str) -> str:
        return f"config.sweep.{'checkpoints' if source in self.config.sweep.checkpoints else 'baseline'}"

    def _folder(self, cell: Cell) -> Path:
        return self.workdir / "cells" / cell.name


def _check_axes(config: SweepConfig) -> None:
    """Raises UserError where an axis is empty, says something twice, or has a sampler setting that does not work."""
    for axis in ("checkpoints", "tasks", "sampler", "draws"):
        values = getattr(config.sweep, axis)
        if not values and axis != "draws":
            raise UserError(f"config.sweep.{axis}: empty; list at least one")
        for i, value in enumerate(values):
            if value in values[:i]:
                raise UserError(f"config.sweep.{axis}: lists {shown(value)} twice")
    for overrides in config.sweep.sampler:
        config.with_sampler(overrides, f"config.sweep.sampler: {overrides}")


def _cell_name(source: str, task: str, overrides: Mapping[str, Any] | None, draws: int | None) -> str:
    """A folder's name for people, and a digest for cells whose names look alike."""
    axes = [f"K={draws}"] if draws else [f"{key}={value}" for key, value in (overrides or {}).items()]
    words = "_".join([Path(source).name, Path(task).stem, *axes])
    readable = "".join(c if c.isalnum() or c in "._=-" else "-" for c in words)[:80]
    return f"{readable}_{kept.digest(to_json([source, task, overrides, draws]).encode())[:8]}"


def _metric(name: str, value: float, error: float | None) -> dict[str, Any]:
    """A metric with the 95% interval of its standard error, where it has one."""
    margin = math.nan if error is None else 1.96 * error
    return {"metric": name, "value": value, "low": value - margin, "high": value + margin}


def _write_tables(run: _Run, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
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
        for cell in run.cells
        if (result := done.get(cell.name))
        for metric in result["metrics"]
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table, report = run.workdir / "table.csv", run.workdir / "report.html"
    atomic_write(table, text.getvalue())
    atomic_write(table.with_suffix(".md"), _markdown(rows))
    write_sweep_report(
        report, title="Evaluation sweep", config=run.config.to_dict(), rows=rows, cells=len(run.cells), done=len(done)
    )
    return {
        "cells": len(run.cells),
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


def _digest_of_records(data: str) -> str:
    """A digest of what a data set says now: a file, a folder or a hub data set."""
    records = read_records(data, needs=("prompt", "completion"), flag="config.sweep.data").records
    return kept.digest("".join(f"{to_json([r.id, r.prompt, r.completion])}\n" for r in records).encode())


def _parser() -> cli.Flags:
    parser = cli.Flags("elbo_kto_jax.sweep", "A grid of evaluations, resumable, in one table and one report.")
    parser.add_config(workdir=True, kind=SweepConfig)
    evaluate.add_judge_flags(parser)
    evaluate.add_task_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="delete what another command left in --workdir")
    return parser


if __name__ == "__main__":
    cli.run(main)
