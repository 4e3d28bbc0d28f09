"""The ids of all records of a data set at once: those that `names.Ids` gives, through which only a few need to go."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from elbo_kto_jax.data.bad_records import BadRecordError
from elbo_kto_jax.data.columns import COPY_LIKE, DTYPES, GIVEN_ID, Columns, words_of
from elbo_kto_jax.data.names import Ids


class Settled(NamedTuple):
    """What came of it.

    Attributes:
      columns: `words`, `id_length` and `ids` with names for copies, and `kept`: whether a record has an id of its own.
      bad: (file, number of the row, what is wrong) where a given id was used before.
      ids: what it knows of copies.
    """

    columns: dict[str, np.ndarray]
    bad: list[tuple[int, int, str]]
    ids: Ids


def settle(columns: Columns, files: Sequence[Path]) -> Settled:
    """The ids of the records in `columns`, which stand in `files`."""
    affected = _affected(columns)
    given = (columns["flags"] & GIVEN_ID) > 0
    others = np.bincount(columns["file"][~given & ~affected], minlength=len(files))
    ids = Ids()
    ids.unnamed.update(dict(zip(files, others.tolist(), strict=True)))
    kept = np.ones(len(affected), np.bool_)
    names: dict[int, str] = {}
    bad = []
    members = np.flatnonzero(affected)
    ends = _ends(columns) if len(members) else np.zeros(0, np.int64)
    places = zip(columns["file"][members].tolist(), columns["row"][members].tolist(), members.tolist(), strict=True)
    for (file, row), group in itertools.groupby(places, key=lambda place: place[:2]):
        indices = [index for _, _, index in group]
        found = [(_text(columns, ends, index), bool(given[index])) for index in indices]
        try:
            assigned = ids.assign(found, files[file], row)
        except BadRecordError as error:
            bad.append((file, row, str(error)))
            kept[indices] = False
            continue
        names.update({i: new for i, new, (old, _) in zip(indices, assigned, found, strict=True) if new != old})
    return Settled({**(_renamed(columns, ends, names) if names else {}), "kept": kept}, bad, ids)


def _affected(columns: Columns) -> Bool[np.ndarray, " n"]:
    """The records of rows in which an id is not the only one of its name, or may be that of a copy.

    The ids of others depend on nothing but themselves.
    """
    words = columns["words"]
    affected = (columns["flags"] & COPY_LIKE) > 0
    ordered = np.sort(words)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        affected |= np.isin(words, twice)
    if affected.any():
        file, row = columns["file"], columns["row"]
        begins = np.concatenate([[True], (file[1:] != file[:-1]) | (row[1:] != row[:-1])])
        row_of = np.cumsum(begins) - 1
        affected = np.bincount(row_of[affected], minlength=row_of[-1] + 1)[row_of] > 0
    return affected


def _ends(columns: Columns) -> Int64[np.ndarray, " n"]:
    return np.cumsum(columns["id_length"], dtype=np.int64)


def _text(columns: Columns, ends: Int64[np.ndarray, " n"], index: int) -> str:
    end = int(ends[index])
    return columns["ids"][end - int(columns["id_length"][index]) : end - 1].tobytes().decode()


def _renamed(columns: Columns, ends: Int64[np.ndarray, " n"], names: dict[int, str]) -> dict[str, np.ndarray]:
    """The columns of ids with other names in some places."""
    words, lengths = columns["words"].copy(), columns["id_length"].copy()
    places = list(names)
    words[places] = words_of(list(names.values()))
    pieces, at = [], 0
    for index, name in names.items():
        start = int(ends[index]) - int(lengths[index])
        new = np.frombuffer(f"{name}\n".encode(), DTYPES["ids"])
        pieces += [columns["ids"][at:start], new]
        at = int(ends[index])
        lengths[index] = len(new)
    return {"words": words, "id_length": lengths, "ids": np.concatenate([*pieces, columns["ids"][at:]])}
