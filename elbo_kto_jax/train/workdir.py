"""The working folder of a run: its config, and the metrics that survive a restart."""

import contextlib
import json
import logging
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
from elbo_kto_jax.config import Config, differences
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.files import atomic_write, check_writable, is_leftover, to_json, writing

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"


def open_workdir(workdir: Path, config: Config, overwrite: bool) -> None:
    """Creates `workdir` for this config, or goes on in it where it holds the same config.

    Raises:
      UserError: the folder holds a run of a different config (the differences are shown), or something else.
    """
    file = workdir / "config.json"
    check_writable(workdir, "--workdir")
    if overwrite and file.is_file():
        # The config goes last: until then the folder is known as that of a run, should this be interrupted.
        for child in sorted(workdir.iterdir(), key=lambda child: child == file):
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    if file.is_file():
        try:
            old = dict(json.loads(file.read_text())["config"])
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
    """metrics.jsonl and tensorboard/: one entry per logged step; a restart drops those that it will write again."""

    def __init__(self, workdir: Path, first_step: int):
        self._path = workdir / METRICS
        if jax.process_index() == 0:
            for left in filter(is_leftover, workdir.iterdir()):
                left.unlink()
        kept = [row for row in read_metrics(workdir) if row["step"] <= first_step]
        atomic_write(self._path, "".join(to_json(row) + "\n" for row in kept))
        self._file = self._path.open("a")
        # Not SummaryWriter: its thread dies of a full disk, and the run would wait for it for ever.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._tensorboard = EventsWriter(str(workdir / "tensorboard" / "events"))
        self._event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))  # purges what stands later

    def write(self, row: dict) -> None:
        with writing(self._path):
            self._file.write(to_json(row) + "\n")
            self._file.flush()
            scalars = [Summary.Value(tag=k, simple_value=v) for k, v in row.items() if k != "step" and v is not None]
            self._event(step=row["step"], summary=Summary(value=scalars))

    def _event(self, **content) -> None:
        self._tensorboard.write_event(Event(wall_time=time.time(), **content))
        self._tensorboard.flush()

    def close(self) -> None:
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

    A second signal acts as usual.
    """
    received = []

    def handle(number, _):
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
