"""The working folder of a run: who works in it, its config and inputs, and the metrics that survive a restart.

workdir/config.json    config      the whole resolved config
                       versions    of jax and of this package
                       moment      when the run began, which is what chat templates are told that ask for the time
                       inputs      digests of what the result depends on, by config key (training/inputs.py)
                       revisions   of data sets of the Hub: the commits that were read
                       files       the files that were read, with their sizes and digests
                       longer      how the run was made longer, each time that it was
                       provenance  of every start: command line, commit, versions, devices (provenance.py)
                       unfinished  the command that began it with --overwrite, until it is done
workdir/log.txt        what the log said, with times, start by start (runlog.py)
workdir/.lock          while a command is at work (lock.py)
"""

import contextlib
import datetime
import json
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

import elbo_kto_jax
from elbo_kto_jax.runtime import lock, processes, provenance
from elbo_kto_jax.runtime.config import Config, differences
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, files_below, is_leftover, is_taken, remove_tree, to_json, writing
from elbo_kto_jax.runtime.going_on import MAY_CHANGE, changes_of_a_run, longer
from elbo_kto_jax.runtime.older_configs import as_written_now
from elbo_kto_jax.runtime.runlog import LOG, RunLog, recording
from elbo_kto_jax.runtime.spool import Spool, spooling

log = logging.getLogger(__name__)
CONFIG = "config.json"
NOTHING: Mapping[str, str] = MappingProxyType({})
METRICS = "metrics.jsonl"
# What commands make in a working folder, those of `sweep` included.
_FILES = (LOG, METRICS, "samples.json", "trackers.json", "report.html", "table.csv", "table.md")
_TRACKERS = ("tensorboard", "wandb")  # that write here
_FOLDERS = ("checkpoints", *_TRACKERS, "reference", "reference_eval", "not_finite", "cells", "answers", "judge")


@contextlib.contextmanager
def open_workdir(workdir: Path, config: Config, overwrite: bool, command: str) -> Iterator["Workdir"]:
    """Holds `workdir` for `command`; what the folder holds is not touched before `Workdir.claim`.

    With `overwrite`, what another command left there is replaced. A run that the same command began with --overwrite
    and has not finished goes on: so a job that was stopped loses nothing when it is queued again.

    Raises:
      UserError: another command is at work in it; or it holds a run of a different config (the differences are shown),
        or something else; or the processes of this job have different folders of that name.
    """
    processes.first(lambda: _refuse_foreign(workdir))
    with lock.inside(workdir, "--workdir"), spooling(workdir) as spool, recording() as run_log:
        found: list[dict | None] = [None]
        processes.first(lambda: found.append(_read(workdir, config, overwrite, command)))
        yield Workdir(workdir, config, overwrite, command, processes.json_of_first(found[-1]), run_log, spool)


def look_into(workdir: Path, config: Config, overwrite: bool, command: str) -> tuple[dict | None, datetime.datetime]:
    """What config.json says of the run with which `command` would go on in `workdir`, and the moment of that run.

    None: it would begin a new one, now. Nothing is touched.

    Raises:
      UserError: as `open_workdir`.
    """
    found: list[dict | None] = [None]

    def look() -> None:
        _refuse_foreign(workdir)
        lock.check_free(workdir, "--workdir")
        found.append(_read(workdir, config, overwrite, command))
        if found[-1] is not None or not overwrite:  # what --overwrite deletes may be of any kind
            _check_kinds(workdir)

    processes.first(look)
    record = processes.json_of_first(found[-1])
    return record, _moment(record)


class Workdir:
    """A working folder in use.

    Attributes:
      path: the folder.
      moment: when the run began: what chat templates are told that ask for the time.
      revisions: data set of the Hub, as the config names it -> the commit with which the run began.
      spool: where its files are that grow.
      inputs: config key -> what the run's result depends on there -> its digest (training/inputs.py).
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        overwrite: bool,
        command: str,
        found: dict | None,
        run_log: RunLog,
        spool: Spool,
    ):
        """`found`: what config.json says of the run that goes on; None: a new one begins."""
        self.path, self._log, self.spool = path, run_log, spool
        self._found, self._mark = found, {"unfinished": command} if overwrite else {}
        self.moment = _moment(found)
        moment = self.moment.isoformat()
        versions = {"jax": jax.__version__, "elbo_kto_jax": elbo_kto_jax.__version__}
        new: dict[str, Any] = {"config": config.to_dict(), "versions": versions, "moment": moment, **self._mark}
        begun = {**(found or {}), "config": new["config"], "moment": moment}
        extension = longer(as_written_now(found["config"]), new["config"]) if found is not None else ""
        if extension:
            begun["longer"] = [*begun.get("longer", []), extension]
            rate = f"the rate now follows the {config.optimizer.schedule} schedule of its new length"
            log.info("the run becomes longer (%s); %s", extension, rate)
        self._record = {**new, "inputs": {}, "files": {}} if found is None else begun
        self.revisions: dict[str, str] = dict(self._record.get("revisions", {}))
        self.inputs: dict[str, dict] = dict(self._record.get("inputs", {}))
        self._start: dict = {}
        self._tell_of_changes(versions)

    def claim(
        self, inputs: Mapping[str, Mapping], files: Mapping[str, Mapping], revisions: Mapping[str, str] = NOTHING
    ) -> None:
        """Makes the folder that of this run, or goes on in it where it has the same inputs.

        Args:
          inputs: see the attribute; those of parameters come later, through `check`.
          files: path -> size and digest of the files that were read.
          revisions: see the attribute; a run that goes on keeps its own.

        Raises:
          UserError: `check`.
        """
        self._start = provenance.of_this_start()
        if self._found is not None or not self._mark:  # what --overwrite deletes may be of any kind
            _check_kinds(self.path)
        if self._found is None:
            processes.first(self._delete_other)
        if self._found is None:
            self._record["files"] = dict(files)
            self._record["provenance"] = [self._start]
        elif "inputs" not in self._found:
            self._record["files"] = dict(files)
            log.warning(
                "%s has no digests, as it is of an earlier version: nothing tells whether data, tokenizer and weights "
                "are those with which the run began; from now on they must stay as they are",
                self.path / CONFIG,
            )
        self.revisions = {**revisions, **self.revisions}
        if self.revisions:
            self._record["revisions"] = self.revisions
        self.check(inputs)
        if not (self.path / CONFIG).is_file():
            raise UserError(
                f"--workdir={self.path}: process 0 has made it, process {jax.process_index()} does not see it; "
                "name a folder on a file system that all machines share"
            )
        processes.first(lambda: self._log.begin(self.spool.local(LOG), f"start: {provenance.in_words(self._start)}"))

    def go_on(self) -> None:
        """Says in config.json with what a run goes on, once nothing can refuse that any more."""
        if self._found is not None:
            self._record["provenance"] = [*self._record.get("provenance", []), self._start]
            processes.first(self._write)

    def check(self, inputs: Mapping[str, Mapping]) -> None:
        """Compares `inputs` with those with which the run began, and keeps those that are new.

        Raises:
          UserError: what differs, and what to do.
        """
        refuse_other_inputs(self.path, self.inputs, inputs, overwrite=bool(self._mark))
        for key, now in inputs.items():
            self.inputs[key] = {**self.inputs.get(key, {}), **now}
        self._record["inputs"] = self.inputs
        processes.first(self._write)
        others = processes.json_of_first(self.inputs)
        if others != self.inputs:
            lines = [line for key, now in self.inputs.items() for line in _changes(key, others.get(key, {}), now)]
            raise UserError(f"process {jax.process_index()} reads other inputs than process 0 ({_shown(lines)})")

    def finish(self) -> None:
        """Says that the run is finished: --overwrite would start it again."""
        if self._record.pop("unfinished", None) is not None:
            processes.first(self._write)

    def _tell_of_changes(self, versions: Mapping[str, str]) -> None:
        if self._found is None:
            return
        if changes := differences(dict(self._found.get("versions", {})), versions, "version"):
            log.warning("going on under another version, results may differ in their last digits: %s", _shown(changes))
        if self._mark:
            log.info("--overwrite: going on with the run that this command began; delete %s to start again", self.path)

    def _delete_other(self) -> None:
        file = self.path / CONFIG
        if file.is_file():
            # Until everything is deleted the folder is known as that of a run, with which nothing goes on.
            atomic_write(file, json.dumps({"config": None, "deleted": True}) + "\n")
            keep = [file, self.path / lock.LOCK_FILE, *([] if self._mark else [self.path / LOG])]
            for child in sorted(self.path.iterdir()):
                if child not in keep:
                    remove_tree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

    def _write(self) -> None:
        text = json.dumps(self._record, indent=2) + "\n"
        file = self.path / CONFIG
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            atomic_write(file, text)


def _read(workdir: Path, config: Config, overwrite: bool, command: str) -> dict | None:
    """What config.json says of the run in `workdir` that this command goes on with; None: it begins a new one."""
    _refuse_foreign(workdir)
    file = workdir / CONFIG
    if not file.is_file():
        return None
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
        changes = changes_of_a_run(found["config"], config.to_dict())
        _check_record(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        if overwrite:
            return None
        raise _damaged(file) from None
    if overwrite:
        return None if changes or found.get("unfinished") != command else found
    if changes:
        raise UserError(
            f"--workdir={workdir} holds a run of another config ({_shown(changes)});\n"
            f"a run may go on with other {MAY_CHANGE}; choose another --workdir, or pass --overwrite to delete that run"
        )
    return found if _has_results(workdir) else None


def _check_kinds(workdir: Path) -> None:
    """Raises UserError where a file stands in the place of a folder of a run, or the other way round."""
    for name in (*_FILES, *_FOLDERS):
        found = workdir / name
        if is_taken(found) and not (found.is_dir() if name in _FOLDERS else found.is_file()):
            kind = "folder" if name in _FOLDERS else "file"
            raise UserError(f"{found}: not a {kind}; remove it or choose another --workdir")


def _moment(found: Mapping | None) -> datetime.datetime:
    """When a run began, of which config.json says `found`; None: now."""
    now = datetime.datetime.now().replace(microsecond=0).isoformat()
    return datetime.datetime.fromisoformat(processes.json_of_first((found or {}).get("moment", now)))


def _has_results(workdir: Path) -> bool:
    """Whether anything but the description of a run stands in its folder: until then its inputs may change."""
    ours = (CONFIG, LOG, lock.LOCK_FILE)
    return any(not is_leftover(file) and file.name not in ours for file in files_below(workdir))


def refuse_other_inputs(
    workdir: Path, began: Mapping[str, Mapping], now: Mapping[str, Mapping], *, overwrite: bool
) -> None:
    """Raises UserError where inputs (see `Workdir`) differ from those with which a run began; what is new may be."""
    changes = [line for key, found in now.items() for line in _changes(key, began.get(key, {}), found)]
    if changes:
        remedy = "delete the folder to start again" if overwrite else "pass --overwrite to delete that run"
        raise UserError(
            f"--workdir={workdir} holds a run that began with other inputs ({_shown(changes)});\n"
            f"put back what it began with, choose another --workdir, or {remedy}"
        )


def _check_record(found: dict) -> None:
    """Raises one of many errors where what config.json says beside the config is not of the form that is written."""
    datetime.datetime.fromisoformat(found.get("moment", "2000-01-01"))
    for part in [
        found.get("versions", {}),
        found.get("files", {}),
        found.get("revisions", {}),
        *found.get("inputs", {}).values(),
    ]:
        part.items()
    if not isinstance(found.get("provenance", []), list):
        raise TypeError("provenance")


def _refuse_foreign(workdir: Path) -> None:
    """Raises UserError where `workdir` is neither new nor the folder of a run."""
    if not workdir.exists() or (workdir / CONFIG).is_file():
        return
    if not workdir.is_dir() or not all(is_leftover(c) or c.name == lock.LOCK_FILE for c in workdir.iterdir()):
        raise UserError(f"--workdir={workdir} exists and is not the folder of a run; choose another")


def _damaged(file: Path) -> UserError:
    return UserError(f"{file}: damaged; pass --overwrite to start the run again from nothing")


def _changes(key: str, began: Mapping, now: Mapping) -> list[str]:
    """What differs between the inputs of the config key `key` when the run began and now, in words."""
    names = sorted(name for name in began.keys() & now.keys() if began[name] != now[name])
    counts = [f"{key}: {began[name]} {name} -> {now[name]}" for name in names if isinstance(now[name], int)]
    # With other examples everything about them differs.
    return counts or ([f"{key}: {', '.join(names)}"] if names else [])


def _shown(changes: Sequence[str]) -> str:
    return "; ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")


class MetricsLog:
    """metrics.jsonl: one line per logged step. A restart drops those that it will write again.

    Processes other than the first write nothing.
    """

    def __init__(self, workdir: Path, first_step: int, spool: Spool):
        self._spool = spool
        self._writes = processes.is_first()
        if not self._writes:
            return
        self._path = workdir / METRICS
        for left in filter(is_leftover, workdir.iterdir()):
            left.unlink()
        kept = [row for row in read_metrics(workdir) if row["step"] <= first_step]
        file = spool.local(METRICS)
        atomic_write(file, "".join(to_json(row) + "\n" for row in kept))
        self._file = file.open("a", encoding="utf-8")
        spool.save()

    def write(self, row: dict) -> None:
        if not self._writes:
            return
        with writing(self._path):
            self._file.write(to_json(row) + "\n")
            self._file.flush()
        self._spool.grown()

    def save(self) -> None:
        """What was written is where a restart will look for it."""
        if self._writes:
            self._spool.save()

    def close(self) -> None:
        if self._writes:
            with writing(self._path):
                self._file.close()
            self._spool.save()


def read_metrics(workdir: Path) -> list[dict]:
    """The rows of metrics.jsonl; lines that are no such row (the last one may be cut off by a crash) are left out."""
    path = workdir / METRICS
    rows, lines = [], path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        row = None
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            log.warning("%s:%d: damaged line left out of the report", path, number)
    return rows


@contextlib.contextmanager
def stop_on_signal() -> Iterator:
    """Within it, SIGTERM and SIGINT set a flag instead of killing; yields the function that reads the flag.

    A signal to any process is one to all (processes.together). A second signal acts as usual.
    """
    received = []

    def handle(number, _):
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield processes.together(lambda: bool(received))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
