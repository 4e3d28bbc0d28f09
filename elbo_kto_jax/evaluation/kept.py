"""What an evaluation keeps, so that the same command goes on after an end at any point: answers, and what is done.

Everything is keyed by the content that it depends on: of the checkpoint's files, the prompts, the settings. Names and
times of files tell nothing: other weights may be put in their place.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import elbo_kto_jax
from elbo_kto_jax.checkpoints.content import content_of
from elbo_kto_jax.checkpoints.folders import locate
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.config import Config, differences
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, check_writable, to_json
from elbo_kto_jax.runtime.messages import one_line
from elbo_kto_jax.sampling.respond import Checkpoint, open_checkpoint, respond

_STATE = "evaluation.json"
_BATCHES = 8  # of the sampler, whose answers are written down together


def digest(content: bytes) -> str:
    """32 hexadecimal digits of the content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, or the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


# Checkpoints.


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A checkpoint as it is now: a training run that goes on saves later steps, which this does not mean.

    Attributes:
      source: as the user names it.
      folder: where its files are.
      content: digest of all of them.
      flag: the flag or config key that named it, for messages.
    """

    source: str
    folder: str
    content: str
    flag: str

    def load(self, config: Config) -> Checkpoint:
        """See `open_checkpoint`."""
        return open_checkpoint(self.folder, config, flag=self.flag)


def pin(source: str, flag: str) -> Pinned:
    """The checkpoint at `source` with the digest of its files.

    Raises:
      UserError: there is none.
    """
    folder = locate(source, flag, weights=True)
    return Pinned(source, str(folder), content_of(folder), flag)


# Answers.


def answers(
    folder: Path,
    model: Pinned,
    records: Sequence[Record],
    prompts: str,
    config: Config,
    opened: Callable[[], Checkpoint],
) -> list[str]:
    """The model's answers to the prompts of `records`, in their order; what `folder` has of them is not made again.

    Args:
      folder: of the answers, one file for each model and setting.
      model: who answers.
      records: the prompts.
      prompts: digest of their file.
      config: its `sampler`, `seed` and `model`.
      opened: opens the model; called where an answer is missing.

    Raises:
      UserError: see `respond`.
    """
    tree = config.to_dict()
    settings = {
        "checkpoint": model.content,
        "prompts": prompts,
        "seed": config.seed,
        "model": {key: value for key, value in tree["model"].items() if key != "path"},
        "sampler": tree["sampler"],
        "version": elbo_kto_jax.__version__,
    }
    path = folder / f"{digest(to_json(settings).encode())}.json"
    found = _known(path, settings, len(records))
    # Prompts of like lengths share a batch, and the longest come first, so that one that does not fit is soon refused.
    missing = [i for i, text in enumerate(found) if text is None]
    missing.sort(key=lambda i: len(str(records[i].prompt)), reverse=True)
    if missing:
        checkpoint, size = opened(), _BATCHES * config.sampler.batch_size
        for start in range(0, len(missing), size):
            some = missing[start : start + size]
            for i, text in zip(some, respond(checkpoint, [records[i] for i in some], config).texts, strict=True):
                found[i] = text
            if processes.is_first():
                atomic_write(path, f"{to_json({'settings': settings, 'answers': found})}\n")
    return [text for text in found if text is not None]  # all of them


def _known(path: Path, settings: Mapping[str, Any], count: int) -> list[str | None]:
    """The answers that were written down, None for those that were not; the same ones in every process."""
    stored = read_json(path) or {}
    found = stored.get("answers")
    if not isinstance(found, list) or len(found) != count or stored.get("settings") != as_json(settings):
        found = [None] * count
    texts = [text if isinstance(text, str) else None for text in found]
    known = processes.of_first(np.array([text is not None for text in texts]))
    if any(is_known and text is None for is_known, text in zip(known, texts, strict=True)):
        raise UserError(f"{path}: process 0 has answers there that another does not see; share the folder between them")
    return [text if is_known else None for is_known, text in zip(known, texts, strict=True)]


def as_json(value: Any) -> Any:
    """A value as it is read back from JSON."""
    return json.loads(to_json(value))


# Parts of an evaluation.


def is_of_evaluation(out: Path) -> bool:
    """Whether an evaluation, finished or not, has written into the folder."""
    return (out / _STATE).is_file()


def is_unfinished(out: Path) -> bool:
    """Whether an evaluation in the folder ended early, so that the same command goes on."""
    asked, done = _names(read_json(out / _STATE))
    return bool(asked - done)


def _names(state: Mapping[str, Any] | None) -> tuple[set[str], set[str]]:
    """The parts that an evaluation was asked for, and those that are done."""
    asked, done = ((state or {}).get(key) for key in ("asked", "done"))
    asked, done = ({*map(str, names)} if isinstance(names, list) else set() for names in (asked, done))
    return asked, done


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the results that a command is asked for: its files, and all that they depend on.

    Where only the judge differs, an evaluation that is not finished still goes on: its answers are the same.
    """

    files: Sequence[Path]
    settings: Mapping[str, Any]


class Progress:
    """Which parts of an evaluation are done, in a file beside them.

    An evaluation that ended early goes on, whether or not it is to overwrite something: it does not overwrite what it
    wrote itself. Once it is finished, its files stay as they are unless the user says otherwise.
    """

    def __init__(self, out: Path, parts: Mapping[str, Part], overwrite: bool):
        """Begins the evaluation, or goes on with it.

        Raises:
          UserError: there are files of another evaluation, or of one that is finished, and `overwrite` is not given.
        """
        self._file, self._parts, self.done = out / _STATE, parts, set[str]()
        self._others: dict[str, Any] = {}  # settings of results that other commands wrote into the same folder
        processes.first(lambda: self._begin(out, overwrite))
        names = list(parts)
        done = processes.of_first(np.array([name in self.done for name in names]))
        self.done = {name for name, is_done in zip(names, done, strict=True) if is_done}

    def finish(self, name: str) -> None:
        """The part is done, and its files are written."""
        self.done.add(name)
        if processes.is_first():
            self._write()

    def _begin(self, out: Path, overwrite: bool) -> None:
        check_writable(out, "--out")
        stored = read_json(self._file) or {}
        settings = stored.get("settings")
        before: dict[str, Any] = settings if isinstance(settings, dict) else {}
        asked, done = _names(stored)
        wanted = as_json({name: part.settings for name, part in self._parts.items()})
        self._others = {name: value for name, value in before.items() if name not in wanted}
        if asked == wanted.keys() and done < asked and _is_same(before, wanted, done):
            self.done = done
        else:
            self._refuse_existing(before, wanted, overwrite)
        self._write()

    def _refuse_existing(self, before: Mapping[str, Any], wanted: Mapping[str, Any], overwrite: bool) -> None:
        for name, part in self._parts.items():
            for file in part.files:
                if not file.exists() or overwrite:
                    continue
                changes = differences(before[name], wanted[name], name) if isinstance(before.get(name), dict) else []
                of_what = f", of another evaluation ({one_line('; '.join(changes))})" if changes else ""
                raise UserError(f"--out: {file} exists already{of_what}; choose another name or pass --overwrite")

    def _write(self) -> None:
        settings = {**self._others, **{name: part.settings for name, part in self._parts.items()}}
        state = {"asked": sorted(self._parts), "done": sorted(self.done), "settings": settings}
        atomic_write(self._file, f"{to_json(state)}\n")


def _is_same(before: Mapping[str, Any], wanted: Mapping[str, Any], done: set[str]) -> bool:
    """Whether the evaluation that was begun is the wanted one; the judge may be another while nothing is judged."""
    return all(
        before.get(name) == settings
        or (name not in done and _without_judge(before.get(name)) == _without_judge(settings))
        for name, settings in wanted.items()
    )


def _without_judge(settings: Any) -> Any:
    return {key: value for key, value in settings.items() if key != "judge"} if isinstance(settings, dict) else settings
