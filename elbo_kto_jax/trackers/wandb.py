"""Weights & Biases. Its own variables (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME ...) work as usual."""

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.extras import import_extra
from elbo_kto_jax.runtime.messages import reason
from elbo_kto_jax.trackers.protocol import KEY, PROJECT, Run

FOLDER = "wandb"  # of the working folder, unless WANDB_DIR names another


def check() -> None:
    """Raises UserError where the client is not installed, or is to work online and nobody is logged in."""
    wandb = import_extra("wandb", f"{KEY}: 'wandb'", "the client of Weights & Biases", "wandb")
    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    wrong = "not logged in to Weights & Biases"
    try:
        if wandb.login(prompt=False, verify=False):  # without credentials its `init` would ask for them in the terminal
            return
    except Exception as error:  # a key of another form, say
        wrong = reason(error)
    raise UserError(
        f"{KEY}: 'wandb': {wrong}; run `wandb login`, set WANDB_API_KEY, or work without a network with "
        "WANDB_MODE=offline"
    )


def begin(run: Run) -> "WandB":
    return WandB(run)


class WandB:
    """A run at Weights & Biases."""

    def __init__(self, run: Run):
        self._wandb = importlib.import_module("wandb")
        said = {"WANDB_PROJECT": ("project", PROJECT), "WANDB_NAME": ("name", run.name)}
        if "://" not in str(run.folder):
            said["WANDB_DIR"] = ("dir", str(run.folder))
        options: dict[str, Any] = dict(option for variable, option in said.items() if variable not in os.environ)
        if run.key:
            options |= {"id": run.key, "resume": "allow"}
        self._run = self._wandb.init(
            **options,
            reinit="create_new",  # a program that trains may have a run of its own
            settings=self._wandb.Settings(console="off"),  # it would take the streams of the whole process
        )
        self._run.config.update(dict(run.config), allow_val_change=True)
        self.key = str(self._run.id)
        self.sent = -1  # also where the server has lost the run
        if self._run.resumed:
            self.sent = self._run.step - 1
        elif self._run.offline:
            self.sent = stored(Path(os.environ.get("WANDB_DIR", run.folder)), self.key, run.sent)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, step: int, when: str, samples: Sequence[Mapping[str, str]]) -> None:
        columns = ["prompt", "before", "after"]
        rows = [[sample.get(name) for name in columns] for sample in samples]
        self._log(step, {"samples": self._wandb.Table(columns=columns, data=rows)})

    def report(self, step: int, file: Path) -> None:
        self._log(step, {"report": self._wandb.Html(file.read_text(encoding="utf-8"), inject=False)})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        """Logs at `step`, or at the run's own where that is further: W&B drops what goes back."""
        self._run.log(values, step=max(step, self._run.step))


def stored(folder: Path, key: str, otherwise: int) -> int:
    """The last step that the files of a run have; `otherwise` where there is no file.

    The client writes them every few seconds, and without a network it does not look into those of earlier starts.
    """
    files = list((folder / FOLDER).glob(f"*-{key}/*.wandb"))
    if not files:
        return otherwise
    protocol, steps = importlib.import_module("wandb.proto.wandb_internal_pb2"), [-1]
    for file in files:
        for content in records(file.read_bytes()):
            record = protocol.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
    return max(steps)


def records(content: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: those of LevelDB's log format, after 7 bytes that tell the version.

    Blocks of 32,768 bytes hold pieces with a checksum (4 bytes), a length (2), and a kind (1): whole, first, middle,
    last. The end may be missing, where the client was killed.
    """
    start, pieces = 7, b""
    while start + 7 <= len(content):
        if (left := 2**15 - start % 2**15) < 7:
            start += left
            continue
        size, kind = int.from_bytes(content[start + 4 : start + 6], "little"), content[start + 6]
        piece = content[start + 7 : start + 7 + size]
        if kind not in (1, 2, 3, 4) or len(piece) < size:
            return
        pieces = piece if kind in (1, 2) else pieces + piece
        start += 7 + size
        if kind in (1, 4):
            yield pieces
