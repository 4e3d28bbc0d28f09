"""Reads preference records: files in, validated unpaired records out, every bad record named by file, line and field.

Names. An explicit `id` is a string or an integer and must be unique within the data set, as text (1 and "1" are the
same). A pair's id is continued with "-chosen" and "-rejected". A missing id is the BLAKE2b hash of prompt, completion
and label, so it stays with the content when a file is shuffled or split; exact copies get "#2", "#3", ... in reading
order.
"""

import collections
import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax.data import forms, sources
from elbo_kto_jax.data.bad_records import BadRecordError, shorten, show
from elbo_kto_jax.data.names import Ids, content_name
from elbo_kto_jax.data.records import EMPTY, FIELDS, MESSAGES_OF, Record, parse_row
from elbo_kto_jax.data.rows import rows
from elbo_kto_jax.runtime.errors import UserError

log = logging.getLogger(__name__)
_NAMED = 10  # fields that a note names
# A text that begins and ends as a list of messages does, in JSON or as Python or NumPy print one.
_LOOKS_LIKE_MESSAGES = re.compile(r"\s*(\[\s*)?(array\(\s*\[\s*)?\{.*\}[\s\])]*(,\s*dtype=object\))?\s*", re.DOTALL)
_HAS_ROLE = re.compile(r"""["']role["']\s*:""")


@dataclasses.dataclass(frozen=True)
class RecordFile:
    """The records of a data set in reading order, one message for each bad record that was skipped, and the files."""

    records: list[Record]
    skipped: list[str]
    files: list[Path]


def read_records(
    path: str | Path,
    *,
    needs: tuple[str, ...] = ("prompt", "completion", "label"),
    skip_bad: bool = False,
    flag: str = "--config.data.train",
    limit: int = 0,
) -> RecordFile:
    """Reads a data set: a file of JSON or Parquet, a folder of them, or a data set of the Hugging Face Hub.

    Of a folder or a Hub data set the training split is read, where files or folders are named after splits;
    "PATH:SPLIT" reads another ("trl-lib/kto-mix-14k:test"). A Hub id may name a branch, tag or commit
    ("trl-lib/kto-mix-14k@main:test"). Files are read in the order of their names; forms.py has their forms. What
    is left out is logged.

    Args:
      path: what to read.
      needs: the fields that every record must have, of "prompt" (always needed), "completion" and "label". The others
        are checked where they are present. Without "completion" a pair is one record: its prompt.
      skip_bad: list bad records instead of stopping at the first.
      flag: the command-line flag that gave `path`, for messages.
      limit: return the first so many records, though all are checked; 0: all.

    Raises:
      UserError: nothing to read at `path`, no usable record in it, the rows of one file again in another form, or
        (without `skip_bad`) a bad record.
    """
    records: list[Record] = []
    skipped: list[str] = []
    ids, notes = Ids(), Notes()
    source = sources.find_files(str(path), flag)
    for file in source.files:
        for number, decode in rows(file):
            where = f"{file}:{number}"
            try:
                found = parse_row(notes.see(decode()), forms.stem(file), needs, where)
                names = ids.assign([(r.id or content_name(r), bool(r.id)) for r in found], file, number)
                records += [dataclasses.replace(r, id=name) for r, name in zip(found, names, strict=True)]
            except BadRecordError as error:
                if not skip_bad:
                    raise bad_record(f"{where}: {error}") from None
                skipped.append(f"{where}: {error}")
    if not records:
        raise no_record(path, flag, skipped)
    ids.check_copies(flag)
    for note in (*source.notes, *notes.lines(), *ids.notes()):
        log.info("%s: %s", path, note)
    return RecordFile(records[: limit or None], skipped, source.files)


def bad_record(what: str) -> UserError:
    """The error about a bad record that is not to be skipped: where it stands and what is wrong."""
    return UserError(f"{what}; fix or drop the record, or pass --skip-bad-records")


def no_record(path: str | Path, flag: str, skipped: Sequence[str]) -> UserError:
    """The error about a data set of which all records are `skipped`."""
    bad = f"; {len(skipped)} bad ones were skipped, the first: {skipped[0]}" if skipped else ""
    return UserError(f"{flag}: no usable record in {path}{bad}")


class Notes:
    """Counts what is not used of the rows, or read in another way than it is written.

    Attributes:
      unused: name of a field -> rows that have it.
      texts: rows with messages that are written as JSON text.
    """

    def __init__(self) -> None:
        self.unused: collections.Counter[str] = collections.Counter()
        self.texts = 0

    def see(self, row: Any) -> Any:
        """The row, with messages in the place of their JSON text."""
        if not isinstance(row, dict):
            raise BadRecordError(f"expected a JSON object, got {show(row)}")
        texts = {name: messages for name in MESSAGES_OF if (messages := _messages_in(row.get(name), name))}
        self.texts += bool(texts)
        row = {**row, **texts}
        self.unused.update(set(_unused(row)))
        return row

    def add(self, unused: Mapping[str, int], texts: int) -> None:
        """Adds what was counted elsewhere."""
        self.unused.update(unused)
        self.texts += texts

    def lines(self) -> list[str]:
        """What was counted, for the log."""
        lines = []
        if self.texts:
            lines.append(f"{self.texts} records write messages as JSON text, which is read as messages")
        if self.unused:
            named = [f"{shorten(name)} ({count})" for name, count in sorted(self.unused.items())]
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            lines.append(f"fields that are not used, with their records: {', '.join(named[:_NAMED])}{more}")
        return lines


def _messages_in(value: Any, name: str) -> list[Any] | None:
    """The messages that the text `value` of a field has as JSON; None where it is any other text or no text."""
    if not isinstance(value, str) or not _HAS_ROLE.search(value) or not _LOOKS_LIKE_MESSAGES.fullmatch(value):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
        is_list = re.match(r"\s*(\[|array\()", value) is not None
    else:
        is_list = isinstance(found, list)
    if is_list and found and all(isinstance(message, dict) and "role" in message for message in found):
        return found
    if (is_list and found is None) or (isinstance(found, dict) and {"role", "content"} <= found.keys()):
        raise BadRecordError(
            f"field `{name}`: messages as text, {show(value)}; write a list of objects, or a message whose content "
            "is that text"
        )
    return None


def _unused(row: dict[str, Any]) -> Iterator[str]:
    """The names of what the row has and the records made of it have not."""
    for name, value in row.items():
        if value in EMPTY:
            continue
        if name not in FIELDS:
            yield name
        elif name in MESSAGES_OF and isinstance(value, list):
            for message in value:
                yield from _unused_of(message, f"{name}[]")


def _unused_of(message: Any, name: str) -> Iterator[str]:
    if not isinstance(message, dict):
        return
    yield from (f"{name}.{key}" for key in message if key not in ("role", "content") and message[key] not in EMPTY)
    if isinstance(message.get("content"), list):
        for part in message["content"]:
            if isinstance(part, dict):
                yield from (f"{name}.content[].{key}" for key in part if key not in ("type", "text"))
