"""The ids of the records of a data set: given ones must be unique, the others are made of the content."""

import collections
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from elbo_kto_jax.data import forms
from elbo_kto_jax.data.bad_records import BadRecordError, show
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.runtime.errors import UserError


def content_name(record: Record) -> str:
    """The id of a record that has none, but for copies: the hash of what it says."""
    content = json.dumps([record.prompt, record.completion, record.label], separators=(",", ":"))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


class Ids:
    """Gives every record of a data set its id, and finds ids that were given twice and files that repeat others.

    Attributes:
      unnamed: file -> its records without an id.
    """

    def __init__(self) -> None:
        self.unnamed: collections.Counter[Path] = collections.Counter()
        self._where: dict[str, str] = {}  # id -> its record
        self._copies: collections.Counter[str] = collections.Counter()  # content hash -> records so far
        self._first_file: dict[str, Path] = {}  # content hash -> file of the first of them
        self._repeated: collections.Counter[tuple[Path, Path]] = collections.Counter()  # (file, the earlier one)

    def assign(self, names: Sequence[tuple[str, bool]], file: Path, number: int) -> list[str]:
        """The ids of the records of row `number` of `file`.

        Args:
          names: (id, True) where one is given, (`content_name`, False) elsewhere.

        Raises:
          BadRecordError: a given id was used before.
        """
        where = f"{file}:{number}"
        for name, is_given in names:
            if is_given and name in self._where:
                raise BadRecordError(f"field `id`: {show(name)} is already the id of {self._where[name]}")
        self._where.update({name: where for name, is_given in names if is_given})
        return [name if is_given else self._by_content(name, file, where) for name, is_given in names]

    def _by_content(self, digest: str, file: Path, where: str) -> str:
        self.unnamed[file] += 1
        if self._copies[digest]:
            self._repeated[file, self._first_file[digest]] += 1
        else:
            self._first_file[digest] = file
        name = ""
        while not name or name in self._where:  # a given id may be the hash of another record
            self._copies[digest] += 1
            copy = self._copies[digest]
            name = digest if copy == 1 else f"{digest}#{copy}"
        self._where[name] = where
        return name

    def check_copies(self, flag: str) -> None:
        """Raises UserError where all records of a file stand in a file of another form as well."""
        for (file, earlier), count in self._repeated.items():
            if count == self.unnamed[file] and forms.form(file) != forms.form(earlier):
                raise UserError(
                    f"{flag}: {file} has no other records than {earlier} has, in another form; remove one of the files"
                )

    def notes(self) -> list[str]:
        copies = self._repeated.total()
        return [f"{copies} records are exact copies of earlier ones; each counts"] if copies else []
