"""A grid of evaluations: every checkpoint, with every task, at every setting that the task's result depends on.

The axes are the lists of config.sweep. A cell is one checkpoint, one task (sweep_tasks.py) and one setting. All are
checked before the first one runs. A cell that has a result of the same settings, weights and data, by their content, is
not evaluated again; so a grid may grow (runtime/growth.py).
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elbo_kto_jax.checkpoints.load import check_weights
from elbo_kto_jax.data.chat import make_repeatable
from elbo_kto_jax.evaluation import kept
from elbo_kto_jax.evaluation.sweep_tables import write_tables
from elbo_kto_jax.evaluation.sweep_tasks import Cell, Setting, Shared, SweepTask, tasks_of
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.runtime.grid import SweepConfig
from elbo_kto_jax.runtime.messages import shown
from elbo_kto_jax.runtime.workdir import open_workdir, stop_on_signal

log = logging.getLogger(__name__)
_NOT_OF_A_RESULT = ("sweep", "mesh", "train", "judge", "benchmarks", "trackers")  # groups of the config


def sweep(config: SweepConfig, workdir: Path, *, allow_code: bool, overwrite: bool) -> dict[str, Any]:
    """Evaluates the cells of config.sweep that have no result yet, and writes the tables; the summary.

    Args:
      config: the grid, and the config that its cells share.
      workdir: see elbo_kto_jax/sweep.py.
      allow_code: whether tasks may execute what the model writes.
      overwrite: whether what another command left in `workdir` is deleted.

    Raises:
      UserError: the grid, a model, the prompts, the data, the judge or a task has to be mended.
      Interrupted: SIGTERM or SIGINT came; cells that are done keep their results.
    """
    grid = Grid(config, workdir, allow_code)
    grid.check()
    with open_workdir(workdir, config, overwrite, "sweep") as folder:
        folder.claim({}, {})  # each cell knows what it depends on
        folder.go_on()
        grid.shared.moment = folder.moment
        summary = _fill(grid)
        folder.finish()
    return summary


def _fill(grid: "Grid") -> dict[str, Any]:
    """Evaluates the cells that are left, and writes the tables after each."""
    done = {cell.name: result for cell in grid.cells if (result := grid.result(cell))}
    left = [cell for cell in grid.cells if cell.name not in done]
    log.info("%d cells, %d of them done", len(grid.cells), len(done))
    with stop_on_signal() as stop_requested, tqdm(total=len(grid.cells), initial=len(done), desc="cells") as bar:
        if not processes.several():  # where there are several, all must ask at the same point
            grid.shared.stop_requested = stop_requested
        for cell in grid.evaluated(left):
            if result := grid.result(cell):  # written just now
                done[cell.name] = result
            bar.update()
            write_tables(grid.workdir, grid.config, grid.cells, done)
            if stop_requested() and len(done) < len(grid.cells):
                raise Interrupted(f"{len(done)} of {len(grid.cells)} cells are done, the same command goes on")
    return write_tables(grid.workdir, grid.config, grid.cells, done)


class Grid:
    """The cells of a sweep.

    Attributes:
      config: of the sweep.
      workdir: its folder.
      shared: what the cells share.
      cells: all of them.
    """

    def __init__(self, config: SweepConfig, workdir: Path, allow_code: bool):
        _check_axes(config)
        limited = dataclasses.replace(config.benchmarks, limit=config.sweep.limit)
        self.config, self.workdir = dataclasses.replace(config, benchmarks=limited), workdir
        self.shared = Shared(self.config, workdir)
        self._tasks = tasks_of(self.config, self.shared, allow_code)
        baselines = [source for task in self._tasks.values() for source in task.baselines]
        sources = dict.fromkeys([*config.sweep.checkpoints, *baselines])
        self.shared.models = {source: kept.pin(source, self._flag(source)) for source in sources}
        self.cells = list(self._plan())

    def check(self) -> None:
        """Checks the cells that are left as far as that is possible without the weights.

        Raises:
          UserError: a model cannot run one of them; the cell is named by its keys and values.
        """
        left = [cell for cell in self.cells if self.result(cell) is None]
        for source, model in self.shared.models.items():
            concerned = [c for c in left if source in (c.checkpoint, *self._tasks[c.task].baselines)]
            if not concerned:
                continue
            check_weights(model.folder, model.flag)
            opened = model.load(self.config)  # without its weights
            make_repeatable(opened.tokenizer, self.shared.moment, source)
            for cell in {(c.task, to_json([c.sampler, c.draws])): c for c in reversed(concerned)}.values():
                try:
                    self._tasks[cell.task].check(cell, opened)
                except UserError as error:
                    raise UserError(f"{dataclasses.replace(cell, checkpoint=source).where}: {error}") from error

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell, where there is a complete one of the same settings."""
        found = kept.read_json(self._folder(cell) / "result.json")
        return found if found and found.get("settings") == kept.as_json(cell.settings) else None

    def evaluated(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        """Evaluates the cells, checkpoint by checkpoint, and yields each when its result is written."""
        for name, task in self._tasks.items():
            task.prepare([cell for cell in cells if cell.task == name])
        for cell in sorted(cells, key=lambda cell: self.config.sweep.checkpoints.index(cell.checkpoint)):
            log.info("cell %s: %s", cell.name, cell.checkpoint)
            began = time.monotonic()
            metrics = self._evaluate(cell)
            result = {"settings": cell.settings, "metrics": metrics, "seconds": time.monotonic() - began}
            atomic_write(self._folder(cell) / "result.json", f"{to_json(result)}\n")
            yield cell

    def _evaluate(self, cell: Cell) -> list[dict[str, Any]]:
        return self._tasks[cell.task].evaluate(cell, self._folder(cell))

    def _plan(self) -> Iterator[Cell]:
        for source in self.config.sweep.checkpoints:
            for name, task in self._tasks.items():
                for setting in task.settings_of_grid():
                    cell = _cell_name(source, name, setting.sampler, setting.draws)
                    yield Cell(
                        cell, source, name, setting.sampler, setting.draws, self._settings(source, task, setting)
                    )

    def _settings(self, source: str, task: SweepTask, setting: Setting) -> dict[str, Any]:
        """All that the result of a cell depends on; devices do not change it."""
        tree = {key: value for key, value in self.config.to_dict().items() if key not in _NOT_OF_A_RESULT}
        model = {"checkpoint": self.shared.models[source].content, "config": tree}
        return {**model, "task": task.name, "sampler": setting.sampler, "draws": setting.draws, **task.depends_on()}

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
        config.with_sampler(overrides, f"config.sweep.sampler: {shown(overrides)}")


def _cell_name(source: str, task: str, overrides: Mapping[str, Any] | None, draws: int | None) -> str:
    """A folder's name for people, and a digest for cells whose names look alike."""
    axes = [f"K={draws}"] if draws else [f"{key}={value}" for key, value in (overrides or {}).items()]
    words = "_".join([Path(source).name, Path(task).stem, *axes])
    readable = "".join(c if c.isalnum() or c in "._=-" else "-" for c in words)[:80]
    return f"{readable}_{kept.digest(to_json([source, task, overrides, draws]).encode())[:8]}"
