"""The tasks of a sweep, behind one protocol: which settings each takes, what its results depend on, and how it runs."""

import dataclasses
import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from elbo_kto_jax.data.chat import make_repeatable
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.evaluation import benchmarks, judges, kept
from elbo_kto_jax.evaluation.comparison import Comparison, compare
from elbo_kto_jax.evaluation.evaluation import WIN_RATE
from elbo_kto_jax.evaluation.prompts import read_prompts
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.runtime.grid import SweepConfig
from elbo_kto_jax.runtime.messages import shown
from elbo_kto_jax.sampling.respond import Checkpoint, check_sampler, encode_prompts
from elbo_kto_jax.scoring.records import Names, Request, check_records, score_records

ELBO, EXACT_ELBO = "elbo", "exact_elbo"


class Setting(NamedTuple):
    """Where a cell stands on the axes that its task takes."""

    sampler: Mapping[str, Any] | None = None  # the keys of config.sampler that it replaces; None: nothing is sampled
    draws: int | None = None  # masks per example or answer; None: the task's own, or none at all


@dataclasses.dataclass(frozen=True)
class Cell:
    """One evaluation of the grid.

    Attributes:
      name: of its folder.
      checkpoint: as config.sweep names it.
      task: the name of its task.
      sampler: see `Setting`.
      draws: see `Setting`.
      settings: all that its result depends on.
    """

    name: str
    checkpoint: str
    task: str
    sampler: Mapping[str, Any] | None
    draws: int | None
    settings: Mapping[str, Any]

    @property
    def where(self) -> str:
        """Where it stands in the grid, for messages: the keys and values of config.sweep."""
        axes = {"sampler": self.sampler, "draws": self.draws, "tasks": self.task, "checkpoints": self.checkpoint}
        return ", ".join(f"config.sweep.{key} {shown(value)}" for key, value in axes.items() if value is not None)


class Shared:
    """What the cells of a sweep share: one model in memory, and answers that are written down.

    Attributes:
      models: the checkpoints of the sweep as they are now, by name.
      moment: what chat templates are told that ask for the time.
      stop_requested: whether the user wants the sweep to end.
    """

    def __init__(self, config: SweepConfig, workdir: Path):
        self.config, self.workdir = config, workdir
        self.models: dict[str, kept.Pinned] = {}
        self.moment = datetime.datetime.now()  # until the working folder says when the sweep began
        self.stop_requested: Callable[[], bool] = bool  # no, until there is somebody to ask
        self._open: Checkpoint | None = None

    def opened(self, source: str) -> Checkpoint:
        """The checkpoint; the one before it is dropped, so that one set of weights is in memory."""
        model = self.models[source]
        if self._open is None or self._open.source != model.folder:
            self._open = None
            self._open = model.load(self.config)
            make_repeatable(self._open.tokenizer, self.moment, source)
        return self._open


@runtime_checkable
class SweepTask(Protocol):
    """A task of the grid.

    Attributes:
      name: as config.sweep.tasks has it.
      baselines: checkpoints that it needs beside the one of the cell.
    """

    @property
    def name(self) -> str: ...

    @property
    def baselines(self) -> tuple[str, ...]: ...

    def settings_of_grid(self) -> list[Setting]:
        """The settings of its cells, for each checkpoint."""

    def depends_on(self) -> dict[str, Any]:
        """What its results depend on, beside checkpoint, config and setting."""

    def check(self, cell: Cell, model: Checkpoint) -> None:
        """Raises UserError where `model`, the cell's or a baseline, cannot do what the cell asks; reads no weights."""

    def prepare(self, cells: Sequence[Cell]) -> None:
        """Does what several of the cells need, before the first of them."""

    def evaluate(self, cell: Cell, folder: Path) -> list[dict[str, Any]]:
        """The metrics of a cell (metric, value, low, high); the details go into `folder`."""


def tasks_of(config: SweepConfig, shared: Shared, allow_code: bool) -> dict[str, SweepTask]:
    """The tasks of config.sweep.tasks, by name and in order.

    Raises:
      UserError: one cannot be run.
    """
    ours: dict[str, Callable[[], SweepTask]] = {
        WIN_RATE: lambda: WinRate(config, shared),
        ELBO: lambda: Elbo(ELBO, config, shared),
        EXACT_ELBO: lambda: Elbo(EXACT_ELBO, config, shared),
    }
    names = [name for name in config.sweep.tasks if name not in ours]
    loaded = benchmarks.load(names, config, allow_code=allow_code, flag="config.sweep.tasks")
    others = {name: Harness(name, found, config, shared, allow_code) for name, found in zip(names, loaded, strict=True)}
    return {name: others[name] if name in others else ours[name]() for name in config.sweep.tasks}


class WinRate:
    """The win rate of each checkpoint against config.sweep.baseline, at each setting of the sampler."""

    name = WIN_RATE

    def __init__(self, config: SweepConfig, shared: Shared):
        for key in ("baseline", "prompts"):
            if not getattr(config.sweep, key):
                raise UserError(f"config.sweep.{key}: missing; the task {WIN_RATE!r} needs it")
        self._config, self._shared, self.baselines = config, shared, (config.sweep.baseline,)
        self._prompts = read_prompts(config.sweep.prompts, "config.sweep.prompts", config.sweep.limit)
        self._judge = judges.make(
            config.judge, self._prompts, shared.workdir / "judge", lambda: shared.stop_requested()
        )

    def settings_of_grid(self) -> list[Setting]:
        return [Setting(sampler=overrides) for overrides in self._config.sweep.sampler]

    def depends_on(self) -> dict[str, Any]:
        baseline = self._shared.models[self._config.sweep.baseline].content
        judge = judges.describe(self._config.judge)
        return {"baseline": baseline, "prompts": self._prompts.digest, "judge": judge}

    def check(self, cell: Cell, model: Checkpoint) -> None:
        encode_prompts(model, self._prompts.records, self._config.with_sampler(cell.sampler or {}, "sampler"))

    def prepare(self, cells: Sequence[Cell]) -> None:
        """Has the baseline answer, before the others, so that one model is in memory at a time."""
        for overrides in {to_json(cell.sampler): cell.sampler for cell in cells}.values():
            self._answers(self._config.sweep.baseline, overrides or {})

    def evaluate(self, cell: Cell, folder: Path) -> list[dict[str, Any]]:
        baseline, overrides = self._config.sweep.baseline, cell.sampler or {}
        found = compare(
            Comparison(
                (cell.checkpoint, baseline),
                self._prompts,
                self._answers(cell.checkpoint, overrides),
                self._answers(baseline, overrides),
            ),
            self._judge,
            folder,
        )
        low, high = found["ci95"]
        return [{"metric": "adjusted_win_rate", "value": found["adjusted_win_rate"], "low": low, "high": high}]

    def _answers(self, source: str, overrides: Mapping[str, Any]) -> list[str]:
        """The answers of a checkpoint to the prompts; written down, since several cells need them."""
        return kept.answers(
            self._shared.workdir / "answers",
            self._shared.models[source],
            self._prompts.records,
            self._prompts.digest,
            self._config.with_sampler(overrides, "config.sweep.sampler"),
            lambda: self._shared.opened(source),
        )


class Elbo:
    """The mean ELBO of config.sweep.data, estimated at each number of draws or enumerated."""

    baselines = ()

    def __init__(self, name: str, config: SweepConfig, shared: Shared):
        if not config.sweep.data:
            raise UserError(f"config.sweep.data: missing; the tasks {ELBO!r} and {EXACT_ELBO!r} need it")
        self.name, self._config, self._shared = name, config, shared
        self._digest = _digest_of_records(config.sweep.data, config.sweep.limit)
        self._checked = set[str]()

    def settings_of_grid(self) -> list[Setting]:
        if self.name == EXACT_ELBO:
            return [Setting()]
        return _settings_of_draws(self._config)

    def depends_on(self) -> dict[str, Any]:
        return {"data": self._digest}

    def check(self, cell: Cell, model: Checkpoint) -> None:
        if model.source not in self._checked:  # the number of draws makes no difference
            check_records(self._request(model), self._config, self._shared.moment)
            self._checked.add(model.source)

    def prepare(self, cells: Sequence[Cell]) -> None:
        """Nothing."""

    def evaluate(self, cell: Cell, folder: Path) -> list[dict[str, Any]]:
        checkpoint, config = self._shared.opened(cell.checkpoint), self._config
        config = dataclasses.replace(
            config,
            estimator=dataclasses.replace(config.estimator, draws=cell.draws or config.estimator.draws),
            model=dataclasses.replace(config.model, param_dtype=config.model.dtype),  # as they are in memory
        )
        rows = list(score_records(self._request(checkpoint), config, checkpoint.params, self._shared.moment))
        atomic_write(folder / "elbo.jsonl", "".join(f"{to_json(row)}\n" for row in rows))
        errors = [row["stderr"] for row in rows]
        # Of the estimate, over masks; with one draw a record there is no telling.
        error = None if None in errors else float(np.sqrt(np.sum(np.square(errors))) / len(rows))
        return [metric("mean_elbo", float(np.mean([row["elbo"] for row in rows])), error)]

    def _request(self, model: Checkpoint) -> Request:
        names = Names("config.sweep.checkpoints", "config.sweep.data", EXACT_ELBO)
        sweep = self._config.sweep
        return Request(model.source, sweep.data, exact=self.name == EXACT_ELBO, limit=sweep.limit, names=names)


class Harness:
    """A task of lm-evaluation-harness: at each setting of the sampler, at each number of draws, or at both."""

    baselines = ()

    def __init__(self, name: str, benchmark: Any, config: SweepConfig, shared: Shared, allow_code: bool):
        self.name, self._benchmark, self._config, self._shared = name, benchmark, config, shared
        self._allow_code = allow_code
        for overrides in config.sweep.sampler:
            where = f"config.sweep.sampler {overrides} with config.sweep.tasks {shown(name)}"
            config.with_sampler({**benchmark.settings.sampler, **overrides}, where)

    def settings_of_grid(self) -> list[Setting]:
        sweep = self._config.sweep
        sampled = [Setting(sampler=overrides) for overrides in sweep.sampler] if self._benchmark.generates else []
        drawn = _settings_of_draws(self._config) if self._benchmark.compares else []
        return sampled + drawn

    def depends_on(self) -> dict[str, Any]:
        return {**benchmarks.settings_of(self._benchmark), "limit": self._config.benchmarks.limit}

    def check(self, cell: Cell, model: Checkpoint) -> None:
        if self._benchmark.generates:
            overrides = {**self._benchmark.settings.sampler, **(cell.sampler or {})}
            check_sampler(model, self._config.with_sampler(overrides, "sampler"))

    def prepare(self, cells: Sequence[Cell]) -> None:
        """Nothing."""

    def evaluate(self, cell: Cell, folder: Path) -> list[dict[str, Any]]:
        row = self._benchmark.settings
        row = dataclasses.replace(row, sampler={**row.sampler, **(cell.sampler or {})}, draws=cell.draws or row.draws)
        found = benchmarks.run(
            self._benchmark._replace(settings=row),
            self._shared.opened(cell.checkpoint),
            self._config,
            allow_code=self._allow_code,
            out=folder / f"{self._benchmark.name}.json",
        )
        return [
            metric(name, value, found.get(name.replace(",", "_stderr,")))
            for name, value in found.items()
            if "_stderr," not in name
        ]


def _settings_of_draws(config: SweepConfig) -> list[Setting]:
    """A setting for each number of draws; where there is none, that of the task."""
    return [Setting(draws=draws) for draws in config.sweep.draws] or [Setting()]


def metric(name: str, value: float, error: float | None) -> dict[str, Any]:
    """A metric with the 95% interval of its standard error, where it has one."""
    margin = math.nan if error is None else 1.96 * error
    return {"metric": name, "value": value, "low": value - margin, "high": value + margin}


def _digest_of_records(data: str, limit: int) -> str:
    """A digest of what a data set (a file, a folder or of the hub) says now; with a `limit`, its first records."""
    records = read_records(data, needs=("prompt", "completion"), flag="config.sweep.data", limit=limit).records
    return kept.digest("".join(f"{to_json([r.id, r.prompt, r.completion])}\n" for r in records).encode())
