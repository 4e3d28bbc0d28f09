"""Event files for TensorBoard, in the folder tensorboard/ of the working folder; config and samples as text.

Every start of a run that has something to say begins a file.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax.runtime.files import writing
from elbo_kto_jax.trackers.protocol import Run

FOLDER = "tensorboard"


def check() -> None:
    """Nothing can be missing."""


def begin(run: Run) -> "TensorBoard":
    return TensorBoard(run)


class TensorBoard:
    """The event file of one start of a run. Its methods raise UserError where the disk is full and the like."""

    key = FOLDER

    def __init__(self, run: Run):
        # tensorboardX imports torch where that is installed, so it is imported here. Not its SummaryWriter: the thread
        # of that dies of a full disk, and who waits for it waits for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self.sent = min(run.sent, run.step)  # what is later is of a start that was killed, and purged
        self._folder = run.folder / FOLDER
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(self._folder / "events"))
        self._event(step=run.step + 1, session_log={"status": SessionLog.START})  # purges what stands later
        self._add(run.step, [_text("config", json.dumps(run.config, indent=2, ensure_ascii=False))])

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [{"tag": tag, "simple_value": value} for tag, value in values.items()])

    def samples(self, step: int, when: str, samples: Sequence[Mapping[str, str]]) -> None:
        texts = [f"{sample['prompt']}\n\nanswer {when} training:\n{sample[when]}" for sample in samples]
        self._add(step, [_text(f"samples/{number}", text) for number, text in enumerate(texts, start=1)])

    def report(self, step: int, file: Path) -> None:
        """TensorBoard shows no pages."""

    def close(self, finished: bool) -> None:
        with writing(self._folder):
            self._writer.close()

    def _add(self, step: int, values: list[dict[str, Any]]) -> None:
        self._event(step=step, summary={"value": values})

    def _event(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with writing(self._folder):
            self._writer.write_event(Event(wall_time=time.time(), **content))
            self._writer.flush()


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
