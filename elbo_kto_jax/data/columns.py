"""Tokenised records in columns of numbers: a few bytes for each record beside its tokens, whatever its texts were.

tokens          of all records one after the other; none of a record that has no token to score
length          tokens of each record here
prompt_length   of the prompt, NOT cut
text_length     of the whole before the cut, see `chat.Encoded`
label           1 desirable, 0 undesirable, -1 not given
file, row       where it stands: which file, and the row's number there, from 1
flags           GIVEN_ID, SPECIAL, COPY_LIKE
pair            hash of what only the two halves of a pair have in common; 0 for a record that is none
prompt          hash of the prompt of a half whose other half is another row; 0 elsewhere
text            hash of tokens and prompt_length
words           hash of the id, of which the masks are made
id_length, ids  the ids one after the other, each followed by a line break
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elbo_kto_jax.data.chat import Encoded
from elbo_kto_jax.data.names import content_name
from elbo_kto_jax.data.records import Record

DTYPES = {
    "tokens": "<i4",
    "length": "<i4",
    "prompt_length": "<i4",
    "text_length": "<i4",
    "label": "<i1",
    "file": "<i4",
    "row": "<i8",
    "flags": "<u1",
    "pair": "<u8",
    "prompt": "<u8",
    "text": "<u8",
    "words": "<u8",
    "id_length": "<i4",
    "ids": "<u1",
}
GIVEN_ID = 1  # the record has an id
SPECIAL = 2  # it writes special tokens out
COPY_LIKE = 4  # its id looks like that of a copy of a record without one
_COPY = re.compile(r"[0-9a-f]{32}#\d+")
Columns = Mapping[str, np.ndarray]


@dataclasses.dataclass
class Part:
    """What became of some rows of one file.

    Attributes:
      columns: the records.
      file: which file it is.
      bad: (number of a row, what is wrong with it).
      refused: (index of a record, why it has no tokens).
      unused, texts: see `reading.Notes`.
    """

    columns: Columns
    file: int
    bad: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    refused: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    unused: dict[str, int] = dataclasses.field(default_factory=dict)
    texts: int = 0

    def __len__(self) -> int:
        return len(self.columns["length"])

    def to_bytes(self) -> tuple[dict[str, Any], bytes]:
        """The part as (what JSON can hold, the rest)."""
        header = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        arrays = [self.columns[name].tobytes() for name in DTYPES]
        return {**header, "sizes": list(map(len, arrays))}, b"".join(arrays)

    @classmethod
    def from_bytes(cls, header: dict[str, Any], content: bytes) -> "Part":
        """The part of which `to_bytes` made this."""
        columns, at = {}, 0
        for (name, dtype), size in zip(DTYPES.items(), header.pop("sizes"), strict=True):
            columns[name] = np.frombuffer(content, dtype, size // np.dtype(dtype).itemsize, at)
            at += size
        bad, refused = ([(place, what) for place, what in header[name]] for name in ("bad", "refused"))
        return cls(columns, **{**header, "bad": bad, "refused": refused})


def columns_of(
    records: Sequence[Record],
    encoded: Sequence[Encoded | None],
    special: Sequence[bool],
    rows: Sequence[int],
    file: int,
) -> Columns:
    """The columns of records of one file.

    Args:
      records: with their ids; a missing one is the empty string.
      encoded: their tokens; None: it has none.
      special: whether they write special tokens out.
      rows: where they stand.
      file: which file it is.
    """
    names = [record.id or content_name(record) for record in records]
    kept = [one.tokens if one is not None and one.completion_length else _NOTHING for one in encoded]
    ids = [f"{name}\n".encode() for name in names]

    def column(name: str, values: Sequence[int]) -> np.ndarray:
        return np.array(values, DTYPES[name])

    return {
        "tokens": np.concatenate([_NOTHING, *kept]),
        "length": column("length", list(map(len, kept))),
        "prompt_length": column("prompt_length", [one.prompt_length if one else 0 for one in encoded]),
        "text_length": column("text_length", [one.text_length if one else 0 for one in encoded]),
        "label": column("label", [-1 if record.label is None else int(record.label) for record in records]),
        "file": column("file", [file] * len(records)),
        "row": column("row", rows),
        "flags": column("flags", list(map(_flags, records, special))),
        "pair": column("pair", [_hash(record.pair.encode()) if record.pair else 0 for record in records]),
        "prompt": column("prompt", [_prompt_hash(record) for record in records]),
        "text": column("text", [_hash(b"%d;" % one.prompt_length, one.tokens) if one else 0 for one in encoded]),
        "words": words_of(names),
        "id_length": column("id_length", list(map(len, ids))),
        "ids": np.frombuffer(b"".join(ids), DTYPES["ids"]),
    }


_NOTHING = np.zeros(0, DTYPES["tokens"])


def words_of(names: Sequence[str]) -> np.ndarray:
    """The hashes of ids."""
    hashes = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(hashes), DTYPES["words"])


def _flags(record: Record, is_special: bool) -> int:
    flags = SPECIAL * is_special
    if record.id:
        flags |= GIVEN_ID | COPY_LIKE * (_COPY.fullmatch(record.id) is not None)
    return flags


def _prompt_hash(record: Record) -> int:
    is_half_of_row = record.pair == record.where
    return _hash(json.dumps(record.prompt).encode()) if record.pair and not is_half_of_row else 0


def _hash(*contents: Any) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for content in contents:
        digest.update(content)
    return int.from_bytes(digest.digest(), "little")
