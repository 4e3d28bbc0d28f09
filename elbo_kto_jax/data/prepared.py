"""A data set that was checked and tokenised: its columns, in memory or in a folder from which they are mapped.

    FOLDER/KEY/description.json    files, notes, skipped records, and a hash of every column and of itself
    FOLDER/KEY/COLUMN              an array (data/columns.py)
    FOLDER/.KEY.lock               while a process prepares KEY: others wait, and then read what it made

KEY is a hash of everything that the columns depend on: the bytes of the files, how texts are read, tokenizer, template,
versions. So what is read is never that of other data. A folder appears under its name when it is whole, and is read
after a look at the hashes; a damaged one is made anew.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from elbo_kto_jax.data.columns import DTYPES, Columns
from elbo_kto_jax.runtime import lock, paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, writing

log = logging.getLogger(__name__)
FORMAT = 1
_DTYPES = {**DTYPES, "kept": "?"}
_DESCRIPTION = "description.json"
_END = ".tmp"  # of the name of a folder that is being made
Digests = dict[str, tuple[int, str]]  # file -> its bytes and their BLAKE2b


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A data set.

    Attributes:
      columns: see data/columns.py; `kept`: whether the record counts, for its id may have been used before.
      files: where the records stand.
      skipped: a line for each bad record that was left out.
      notes: what was read in another way than it is written, in lines for the log.
      digests: of the files, where they were made.
      revisions: of a data set of the Hub, see `sources.Source`.
    """

    columns: Columns
    files: tuple[Path, ...]
    skipped: list[str]
    notes: list[str]
    digests: Digests
    revisions: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Sink:
    """Where columns are written as they come: memory, or a folder."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype)] for name, dtype in DTYPES.items()}
        self._files: dict[str, BinaryIO] = {}
        if folder is not None:
            with writing(folder):
                self._files = {name: (folder / name).open("wb") for name in DTYPES}

    def add(self, columns: Columns) -> None:
        """Appends to every column."""
        if self._folder is None:
            for name, parts in self._parts.items():
                parts.append(columns[name])
            return
        with writing(self._folder):
            for name, file in self._files.items():
                file.write(columns[name].data)

    def columns(self) -> dict[str, np.ndarray]:
        """All that was written; nothing can be added any more."""
        if self._folder is None:
            return {name: np.concatenate(parts) for name, parts in self._parts.items()}
        with writing(self._folder):
            self.close()
        return {name: mapped(self._folder / name, DTYPES[name]) for name in DTYPES}

    def replace(self, columns: Columns) -> dict[str, np.ndarray]:
        """Puts columns in the place of those that were written, and returns them."""
        if self._folder is None:
            return dict(columns)
        for name, values in columns.items():
            atomic_write(self._folder / name, values.tobytes())
        return {name: mapped(self._folder / name, _DTYPES[name]) for name in columns}

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def mapped(file: Path, dtype: str) -> np.ndarray:
    """The array in a file, of which only what is looked at is in memory."""
    if not file.stat().st_size:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(file, dtype, "r"))


def digest_files(files: Sequence[Path]) -> Digests:
    """Size and BLAKE2b of every file, by its path as text.

    Raises:
      UserError: one cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(map(str, files), pool.map(_digest_file, files), strict=True))


def _digest_file(file: Path) -> tuple[int, str]:
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16))
            return opened.tell(), digest.hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None


class Cache:
    """Prepared data sets in a folder.

    Attributes:
      folder: it is made when it is needed.
    """

    def __init__(self, folder: Path, is_shared: bool):
        """`is_shared`: other runs may keep theirs there, too."""
        self.folder, self._is_shared = folder, is_shared
        self._used: set[str] = set()

    def is_usable(self) -> bool:
        """Whether the folder is there, or can be made, and written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
        else:
            reason = "" if os.access(self.folder, os.W_OK) else "Permission denied"
        if reason:
            log.warning("%s: prepared records cannot be kept there (%s); set config.data.cache", self.folder, reason)
        return not reason

    def usable_folder(self) -> Path | None:
        """The folder, if it was needed and can be used."""
        return self.folder if self._used else None

    def get(self, about: Mapping[str, Any], prepare: Callable[[Path], Prepared]) -> Prepared:
        """The data set that depends on `about`, from the folder, else as `prepare` makes it in a new folder.

        Raises:
          UserError: `prepare`, or nothing can be written.
        """
        text = json.dumps({**about, "format": FORMAT}, sort_keys=True)
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._used.add(key)
        place = self.folder / key
        found = _open(place)
        if found is not None:
            return found
        with lock.waiting(self.folder / f".{key}{lock.LOCK_FILE}", f"another process prepares {place}") as is_alone:
            found = _open(place)
            if found is not None:
                return found
            if is_alone:
                for left in self.folder.glob(f".{key}-*{_END}"):
                    shutil.rmtree(left, ignore_errors=True)
            return self._make(place, prepare)

    def _make(self, place: Path, prepare: Callable[[Path], Prepared]) -> Prepared:
        folder = self.folder / f".{place.name}-{secrets.token_hex(4)}{_END}"
        try:
            with writing(folder):
                folder.mkdir()
            made = prepare(folder)
            _describe(folder, made)
            if place.exists() and not lock.remove(place, self.folder / f".{place.name}-{secrets.token_hex(4)}{_END}"):
                raise FileExistsError(place)  # a damaged one that another process reads
            with writing(place):
                os.rename(folder, place)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        lock.read(place)
        log.info("prepared records are kept in %s", place)
        return made

    def remove_others(self) -> None:
        """Removes what is not of this run, unless the folder is shared."""
        if self._is_shared or not self.folder.is_dir():
            return
        for other in self.folder.iterdir():
            if other.name not in self._used and (other / _DESCRIPTION).is_file():
                with contextlib.suppress(OSError):
                    log.info("removed: %s has prepared records of something else", other)
                    lock.remove(other, self.folder / f".{other.name}-{secrets.token_hex(4)}{_END}")
                    (self.folder / f".{other.name}{lock.LOCK_FILE}").unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(place: Path | None = None) -> Iterator[Path]:
    """A folder for columns that are not kept: it is gone afterwards, and what is mapped of it stays.

    It is in `place`, or where the system has its temporary files.
    """
    with tempfile.TemporaryDirectory(_END, ".elbo_kto_jax-", place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _describe(folder: Path, made: Prepared) -> None:
    content = {
        "files": list(map(str, made.files)),
        "skipped": made.skipped,
        "notes": made.notes,
        "digests": made.digests,
        "sums": {name: _digest_file(folder / name)[1] for name in _DTYPES},
    }
    text = json.dumps(content)
    atomic_write(folder / _DESCRIPTION, json.dumps({"content": text, "sum": _sum(text)}))


def _sum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _open(place: Path) -> Prepared | None:
    """What is in a folder; None: nothing, or it is damaged."""
    if not (place / _DESCRIPTION).is_file() or not lock.read(place):
        return None
    try:
        outer = json.loads((place / _DESCRIPTION).read_bytes())
        content = json.loads(outer["content"])
        if _sum(outer["content"]) != outer["sum"]:
            raise ValueError(_DESCRIPTION)
        for name in _DTYPES:
            if _digest_file(place / name)[1] != content["sums"][name]:
                raise ValueError(name)
        digests = {file: (size, digest) for file, (size, digest) in content["digests"].items()}
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: damaged (%s); the records are prepared again", place, error)
        return None
    columns = {name: mapped(place / name, dtype) for name, dtype in _DTYPES.items()}
    log.info("prepared records are read from %s", place)
    return Prepared(columns, tuple(map(paths.at, content["files"])), content["skipped"], content["notes"], digests)
