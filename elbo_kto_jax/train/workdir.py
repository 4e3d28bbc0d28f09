"""The working folder of a run: its config, and the metrics that survive a restart."""

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

import elbo_kto_jax
from elbo_kto_jax import processes
from elbo_kto_jax.config import Config, differences
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.files import atomic_write, check_writable, is_leftover, to_json, writing

log = logging.getLogger(__name__)
CONFIG = "config.json"
METRICS = "metrics.jsonl"
# What commands make in a working folder, those of `sweep` included.
_FILES = (METRICS, "samples.json", "report.html", "table.csv", "table.md")
_FOLDERS = ("checkpoints", "tensorboard", "reference", "reference_eval", "not_finite", "cells", "answers", "judge")


def open_workdir(workdir: Path, config: Config, overwrite: bool) -> None:
    """Creates `workdir` for this config, or goes on in it where it holds the same config.

    Raises:
      UserError: the folder holds a run of a different config (the differences are shown), or something else; or the
        processes of this job have different folders of that name.
    """
    check_writable(workdir, "--workdir")
    processes.first(lambda: _open(workdir, workdir / CONFIG, config, overwrite))
    for name in (*_FILES, *_FOLDERS):
        found = workdir / name
        if os.path.lexists(found) and not (found.is_dir() if name in _FOLDERS else found.is_file()):
            raise UserError(
                f"{found}: not a {'folder' if name in _FOLDERS else 'file'}; remove it or choose another --workdir"
            )
    if not (workdir / CONFIG).is_file():
        raise UserError(
            f"--workdir={workdir}: process 0 has made it, process {jax.process_index()} does not see it; "
            "name a folder on a file system that all machines share"
        )


def _open(workdir: Path, file: Path, config: Config, overwrite: bool) -> None:
    if overwrite and file.is_file():
        # The config goes last: until then the folder is known as that of a run, should this be interrupted.
        for child in sorted(workdir.iterdir(), key=lambda child: child == file):
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    if file.is_file():
        try:
            old = dict(json.loads(file.read_bytes())["config"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}: damaged; pass --overwrite to start the run again from nothing") from None
        changes = differences(old, config.to_dict())
        if changes:
            shown = ", ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")
            raise UserError(
                f"--workdir={workdir} holds a run of another config ({shown});\n"
                "choose another --workdir, or pass --overwrite to delete that run"
            )
    elif workdir.exists() and (not workdir.is_dir() or not all(map(is_leftover, workdir.iterdir()))):
        raise UserError(f"--workdir={workdir} exists and is not the folder of a run; choose another")
    else:
        versions = {"jax": jax.__version__, "elbo_kto_jax": elbo_kto_jax.__version__}
        atomic_write(file, json.dumps({"config": config.to_dict(), "versions": versions}, indent=2) + "\n")


class MetricsLog:
    """metrics.jsonl and tensorboard/: one entry per logged step; a restart drops those that it will write again.

    Processes other than the first write nothing.
    """

    def __init__(self, workdir: Path, first_step: int):
        self._writes = processes.is_first()
        if not self._writes:
            return
        self._path = workdir / METRICS
        for left in filter(is_leftover, workdir.iterdir()):
            left.unlink()
        kept = [row for row in read_metrics(workdir) if row["step"] <= first_step]
        atomic_write(self._path, "".join(to_json(row) + "\n" for row in kept))
        self._file = self._path.open("a", encoding="utf-8")
        # Not SummaryWriter: its thread dies of a full disk, and the run would wait for it for ever.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._tensorboard = EventsWriter(str(workdir / "tensorboard" / "events"))
        self._event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))  # purges what stands later

    def write(self, row: dict) -> None:
        if not self._writes:
            return
        with writing(self._path):
            self._file.write(to_json(row) + "\n")
            self._file.flush()
            scalars = [
                Summary.Value(tag=name, simple_value=value)
                for name, value in row.items()
                if name != "step" and value is not None and math.isfinite(value)
            ]
            self._event(step=row["step"], summary=Summary(value=scalars))

    def _event(self, **content) -> None:
        self._tensorboard.write_event(Event(wall_time=time.time(), **content))
        self._tensorboard.flush()

    def close(self) -> None:
        if not self._writes:
            return
        with writing(self._path):
            self._file.close()
            self._tensorboard.close()


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
