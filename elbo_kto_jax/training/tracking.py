"""The trackers of a run (config.trackers), each in a thread of its own: none keeps a step waiting, or ends a run.

A tracker gets what metrics.jsonl gets. One that raises is off for this start of the run, with a warning. The next start
first sends it the lines of metrics.jsonl that it lacks, as it does for a tracker that is new. WORKDIR/trackers.json has
the key under which each knows the run, so that a restart goes on with it, and how far it came:

    {"wandb": {"key": "k3x0p2vd", "step": 120}}    without "step" while it works, and after a kill: as far as the lines
                                                   of metrics.jsonl go
"""

import contextlib
import copy
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax import trackers
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, from_json
from elbo_kto_jax.runtime.messages import reason
from elbo_kto_jax.runtime.metric_names import THROUGHPUT, tag
from elbo_kto_jax.trackers.protocol import Run, Tracker
from elbo_kto_jax.trackers.tensorboard import FOLDER as TENSORBOARD

log = logging.getLogger(__name__)
FILE = "trackers.json"
_CLOSE_WITHIN = 60.0  # seconds, in which a tracker may send what is left when the run ends
Row = Mapping[str, Any]  # a line of metrics.jsonl
Task = Callable[[Tracker], None]


def check(names: Sequence[str]) -> None:
    """Checks, before a model is loaded, that the trackers of a config can work.

    Raises:
      UserError: there is none of a name, or a package or a login is missing.
    """
    trackers.check_names(names)

    def check_each() -> None:
        for name in names:
            trackers.check(name)

    processes.first(check_each)


class Tracking:
    """What a run tells its trackers. Nothing is told in other processes than the first.

    A tracker begins with the first thing that it is told: a start that finds everything done adds nothing to it.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        config: Mapping[str, Any],
        first_step: int,
        rows: Sequence[Row],
        growing: Path | None = None,
    ):
        """See the class.

        Args:
          names: config.trackers.
          folder: of the run, for trackers.json.
          config: of the run.
          first_step: after which this start goes on.
          rows: of metrics.jsonl as they were found.
          growing: where files are written that grow; None: in `folder`.

        Raises:
          UserError: trackers.json is damaged.
        """
        self._workers: list[_Worker] = []
        if not processes.is_first():
            return
        marks = _Marks(folder / FILE)
        last = max((row["step"] for row in rows), default=-1)
        if TENSORBOARD not in marks.found and (folder / TENSORBOARD).is_dir():
            marks.found[TENSORBOARD] = {"step": last}  # of a version that had no other tracker
        for name in dict.fromkeys(names):
            mark = marks.found.get(name)
            sent = -1 if mark is None else mark.get("step", last)
            run = Run(growing or folder, copy.deepcopy(config), first_step, (mark or {}).get("key", ""), sent)
            lacks = sent < last or (mark is not None and "step" not in mark)
            self._workers.append(_Worker(name, run, rows, marks, lacks=lacks))

    def metrics(self, row: Row) -> None:
        """Tells of a line of metrics.jsonl."""
        for worker in self._workers:
            worker.tell(worker.sender(row))

    def samples(self, step: int, when: str, samples: Sequence[Mapping[str, str]]) -> None:
        """Tells of answers; see `Tracker.samples`."""
        copies = [dict(sample) for sample in samples]
        for worker in self._workers:
            worker.tell(lambda tracker: tracker.samples(step, when, copies))

    def report(self, step: int, file: Path) -> None:
        """Tells of report.html those who were told something in this start, or lack something of an earlier one."""
        for worker in self._workers:
            if worker.has_begun or worker.lacks:
                worker.tell(lambda tracker: tracker.report(step, file))

    def close(self, finished: bool) -> None:
        """Waits until all is sent, a minute at most; `finished`: the run is, and was not interrupted."""
        deadline = time.monotonic() + _CLOSE_WITHIN
        for worker in self._workers:
            worker.end(finished)
        for worker in self._workers:
            worker.wait(max(deadline - time.monotonic(), 0.0))


class _Worker:
    """One tracker and its thread.

    Attributes:
      lacks: whether it has not all of what earlier starts of the run told.
    """

    def __init__(self, name: str, run: Run, rows: Sequence[Row], marks: "_Marks", *, lacks: bool):
        self.lacks = lacks
        self._name, self._run, self._rows, self._marks = name, run, rows, marks
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._sent = run.sent  # the last step whose metrics the tracker has
        self._before: Row = {}

    @property
    def has_begun(self) -> bool:
        return self._thread.ident is not None

    def tell(self, task: Task) -> None:
        if not self.has_begun:
            self._thread.start()
        self._tasks.put(task)

    def sender(self, row: Row) -> Task:
        """What sends a line of metrics.jsonl to the tracker, unless it has that step already."""

        def send(tracker: Tracker) -> None:
            values, self._before = {**row, **_throughput(self._before, row)}, row
            if row["step"] > self._sent:
                shown = {tag(name): value for name, value in values.items() if name != "step" and _is_finite(value)}
                tracker.metrics(row["step"], shown)
                self._sent = row["step"]

        return send

    def end(self, finished: bool) -> None:
        if self.has_begun:
            self._tasks.put(lambda tracker: tracker.close(finished))
            self._tasks.put(None)

    def wait(self, seconds: float) -> None:
        """Waits for the end of the thread."""
        if self.has_begun:
            self._thread.join(seconds)
        if self._thread.is_alive():
            self._keep_step()
            log.warning("tracker %s: too slow to take what is left; the next start sends it", self._name)

    def _work(self) -> None:
        tracker = None
        try:
            tracker = trackers.begin(self._name, self._run)
            self._sent = tracker.sent
            self._marks.keep(self._name, key=tracker.key)
            for row in self._rows:
                if row["step"] <= self._run.step:
                    self.sender(row)(tracker)
            self._before = {}  # what a start needs to compile is no throughput
            while (task := self._tasks.get()) is not None:
                task(tracker)
        except (Exception, SystemExit) as error:
            log.warning(
                "tracker %s: %s; the run goes on without it, and the next start sends what is missing",
                self._name,
                reason(error),
            )
            if tracker is not None:
                with contextlib.suppress(Exception, SystemExit):
                    tracker.close(False)
        if tracker is not None or self._run.key:
            self._keep_step()

    def _keep_step(self) -> None:
        with contextlib.suppress(UserError):  # a full disk, say, of which the run itself will hear
            self._marks.keep(self._name, step=self._sent)


class _Marks:
    """WORKDIR/trackers.json."""

    def __init__(self, file: Path):
        self._file, self._lock = file, threading.Lock()
        self.found: dict[str, dict[str, Any]] = {}
        if file.is_file():
            try:
                self.found = {name: dict(mark) for name, mark in from_json(file.read_bytes()).items()}
                if not all(type(mark.get("step", 0)) is int for mark in self.found.values()):
                    raise ValueError("step")
            except (ValueError, TypeError, AttributeError):
                raise UserError(f"{file}: damaged; remove it (trackers will begin new runs)") from None

    def keep(self, name: str, **mark: Any) -> None:
        with self._lock:
            self.found[name] = {"key": self.found.get(name, {}).get("key", ""), **mark}
            atomic_write(self._file, json.dumps(self.found, indent=1) + "\n")


def _throughput(before: Row, row: Row) -> dict[str, float]:
    """Tokens and examples per second between two lines of metrics.jsonl; nothing without the first of them."""
    totals = {name: name.removesuffix("_per_second") for name in THROUGHPUT}
    if not {"seconds", *totals.values()} <= before.keys() & row.keys():
        return {}
    seconds = row["seconds"] - before["seconds"]
    return {name: (row[total] - before[total]) / seconds for name, total in totals.items()} if seconds > 0 else {}


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)
