"""Answers of a `generate` that has not ended: a folder beside its output, so that the same command goes on.

    OUT.unfinished/settings.json   all that the answers depend on
    OUT.unfinished/NUMBER.json     the answers to some of the prompts, and what they took

It is gone when OUT is written.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import elbo_kto_jax
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.runtime import paths, processes
from elbo_kto_jax.runtime.config import Config, differences
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, is_leftover, remove_tree, to_json

log = logging.getLogger(__name__)
_SETTINGS = "settings.json"


def settings_of_answers(content: str, records: Sequence[Record], infill: bool, config: Config) -> dict[str, Any]:
    """All that the answers to `records` depend on; `content` is the digest of the checkpoint's files."""
    asked = "".join(f"{to_json([one.id, one.prompt, one.completion if infill else None])}\n" for one in records)
    tree = config.to_dict()
    settings = {
        "checkpoint": content,
        "prompts": hashlib.blake2b(asked.encode(), digest_size=16).hexdigest(),
        "infill": infill,
        "version": elbo_kto_jax.__version__,
        "config": {
            "seed": config.seed,
            "model": {key: value for key, value in tree["model"].items() if key != "path"},
            "sampler": tree["sampler"],
        },
    }
    return json.loads(to_json(settings))


def folder_of(out: str) -> Path:
    return paths.at(f"{out}.unfinished")


class Unfinished:
    """The answers so far, in parts that are numbered from 0.

    Attributes:
      parts: those that were kept; process 0 has them, others only their numbers.
    """

    def __init__(self, out: str, settings: Mapping[str, Any], overwrite: bool):
        """Goes on where there are answers with these settings.

        Raises:
          UserError: there are answers with others, and `overwrite` is not given; or something that is no such folder.
        """
        self._folder = folder_of(out)
        self.parts: dict[int, Any] = {}
        processes.first(lambda: self._open(settings, overwrite))
        numbers = processes.json_of_first(sorted(self.parts))
        self.parts = {number: self.parts.get(number) for number in numbers}

    def keep(self, number: int, part: Mapping[str, Any]) -> None:
        """Writes a part down."""
        self.parts[number] = part
        if processes.is_first():
            atomic_write(self._folder / f"{number}.json", f"{to_json(part)}\n")

    def finish(self) -> None:
        """The output is written."""
        if processes.is_first():
            remove_tree(self._folder, ignore_errors=True)

    def _open(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        before = _read(self._folder / _SETTINGS)
        if before == settings:
            for file in self._folder.glob("*.json"):
                part = _read(file) if file.stem.isdecimal() else None
                if part is not None:
                    self.parts[int(file.stem)] = part
            return
        if self._folder.is_dir() and any(not is_leftover(child) for child in self._folder.iterdir()):
            self._refuse_other(before, settings, overwrite)
            remove_tree(self._folder)
        atomic_write(self._folder / _SETTINGS, f"{to_json(settings)}\n")

    def _refuse_other(self, before: dict[str, Any] | None, settings: Mapping[str, Any], overwrite: bool) -> None:
        if before is None:  # not even --overwrite deletes what is not ours
            raise UserError(f"{self._folder} is in the way: not what an unfinished `generate` leaves; remove it")
        if not overwrite:
            parts = {f"config.{key}": value for key, value in before.get("config", {}).items()}
            now = {f"config.{key}": value for key, value in settings["config"].items()}
            changes = differences(parts, now, "")
            changes += [f"another {key}" for key in settings if key != "config" and before.get(key) != settings[key]]
            raise UserError(
                f"{self._folder} has answers of a run that was stopped, with other settings "
                f"({'; '.join(change.lstrip('.') for change in changes[:5])});\n"
                "put those back to go on, choose another --out, or pass --overwrite to start again"
            )


def _read(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, or a crash of the machine left an empty one."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None
