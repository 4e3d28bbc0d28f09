"""What a tracker is: a place where runs can be watched, beside metrics.jsonl (docs/trackers.md).

A file NAME.py of this folder is the tracker "NAME" of config.trackers. It has two functions:

    check()                 raises UserError where the tracker cannot work: a package or a login is missing; called
                            before a model is loaded
    begin(run) -> Tracker   begins to track a run, or goes on with it

Whatever else a tracker raises turns it off for this start of the run, with a warning (training/tracking.py). All its
methods are called in one thread, which is not the one that trains.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

KEY = "config.trackers"
PROJECT = "elbo_kto_jax"  # under which runs stand where the environment names no other


@dataclasses.dataclass(frozen=True)
class Run:
    """What a tracker is told of a run.

    Attributes:
      folder: the working folder, whose name is that of the run.
      config: the whole config, nested.
      step: after which this start goes on; 0: with the first step.
      key: `Tracker.key` of an earlier start; "": this tracker has not begun to track the run.
      sent: the last step whose metrics the tracker has, as far as is known; -1: none.
    """

    folder: Path
    config: Mapping[str, Any]
    step: int
    key: str
    sent: int

    @property
    def name(self) -> str:
        return self.folder.name


@runtime_checkable
class Tracker(Protocol):
    """A run that is being tracked.

    Attributes:
      key: under which the tracker knows the run, so that a restart goes on with it.
      sent: the last step whose metrics it has: `Run.sent`, or what it knows better.
    """

    key: str
    sent: int

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Adds finite values of a step by their tags, such as "train/loss". Steps grow."""

    def samples(self, step: int, when: str, samples: Sequence[Mapping[str, str]]) -> None:
        """Adds the answers after `step`: texts `prompt`, `before` and, where they are known already, `after`.

        `when` is "before" or "after", which of them are new.
        """

    def report(self, step: int, file: Path) -> None:
        """Adds the page report.html of the run after `step`."""

    def close(self, finished: bool) -> None:
        """Hands over what is left; `finished`: the run is, and was not interrupted."""
