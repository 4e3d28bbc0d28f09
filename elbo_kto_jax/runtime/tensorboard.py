"""Event files for TensorBoard: the metrics in groups, throughput, and config and samples as text.

A start of a run begins its file with the first thing that it has to say: one that finds everything done adds none.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elbo_kto_jax.runtime.files import writing
from elbo_kto_jax.runtime.metric_names import THROUGHPUT, tag

FOLDER = "tensorboard"


class TensorBoard:
    """The event file of one start of a run, in the folder tensorboard/ of its working folder.

    tensorboardX is imported when the file is begun, for it imports torch where that is installed.
    """

    def __init__(self, workdir: Path, first_step: int, config: Mapping[str, Any], *, writes: bool = True):
        """`first_step`: what stands after it is of a start that was killed, and is not shown; `config`: as text."""
        self._folder, self._first_step, self._config, self._writes = workdir / FOLDER, first_step, config, writes
        self._writer: Any = None
        self._before: Mapping[str, Any] = {}

    def scalars(self, row: Mapping[str, Any]) -> None:
        """Adds a line of metrics.jsonl, and the throughput since the line before; what is not finite is left out.

        Raises:
          UserError: the disk is full and the like.
        """
        values = {**row, **_throughput(self._before, row)}
        self._before = row
        self._add(
            row["step"],
            [
                {"tag": tag(name), "simple_value": value}
                for name, value in values.items()
                if name != "step" and value is not None and math.isfinite(value)
            ],
        )

    def text(self, name: str, text: str, step: int) -> None:
        """Adds a text, which is shown as it stands.

        Raises:
          UserError: the disk is full and the like.
        """
        self._add(step, [_text(name, text)])

    def close(self) -> None:
        if self._writer is not None:
            with writing(self._folder):
                self._writer.close()
            self._writer = None

    def _add(self, step: int, values: list[dict[str, Any]]) -> None:
        if not self._writes:
            return
        with writing(self._folder):
            if self._writer is None:
                self._begin()
            self._event(step=step, summary={"value": values})

    def _begin(self) -> None:
        # Not SummaryWriter: its thread dies of a full disk, and the run would wait for it for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(self._folder / "events"))
        self._event(step=self._first_step + 1, session_log={"status": SessionLog.START})  # purges what stands later
        config = _text("config", json.dumps(self._config, indent=2, ensure_ascii=False))
        self._event(step=self._first_step, summary={"value": [config]})

    def _event(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), **content))
        self._writer.flush()


def _throughput(before: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    """Tokens and examples per second between two lines of metrics.jsonl; nothing without the first of them."""
    totals = {name: name.removesuffix("_per_second") for name in THROUGHPUT}
    if not {"seconds", *totals.values()} <= before.keys() & row.keys():
        return {}
    seconds = row["seconds"] - before["seconds"]
    return {name: (row[total] - before[total]) / seconds for name, total in totals.items()} if seconds > 0 else {}


def _text(name: str, text: str) -> dict[str, Any]:
    """The value of a summary that TensorBoard's page "Text" shows; an indented block is no markup there."""
    block = "\n".join(f"    {line}" for line in text.split("\n"))
    return {
        "tag": name,
        "metadata": {"plugin_data": {"plugin_name": "text"}},
        "tensor": {
            "dtype": "DT_STRING",
            "string_val": [block.encode("utf-8", "backslashreplace")],
            "tensor_shape": {"dim": [{"size": 1}]},
        },
    }
