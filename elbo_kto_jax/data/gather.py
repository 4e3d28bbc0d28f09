"""The arrays of examples that stand here and there in prepared data sets, without a copy where that can be."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from elbo_kto_jax.data import forms
from elbo_kto_jax.data.columns import DTYPES
from elbo_kto_jax.data.prepared import Prepared, mapped, scratch
from elbo_kto_jax.data.reading import Notes
from elbo_kto_jax.data.records import Message, parse_row
from elbo_kto_jax.data.rows import rows
from elbo_kto_jax.data.select import Selection

_IN_MEMORY = 2**26  # bytes of an array; a larger one is written to a file and mapped
_AT_ONCE = 4096  # examples


def column(parts: Sequence[Selection], name: str) -> np.ndarray:
    """The values of a column for all examples."""
    return np.concatenate([part.found.columns[name][part.indices] for part in parts])


def flat(parts: Sequence[Selection], name: str, lengths: str, folder: Path | None) -> np.ndarray:
    """What the examples have in the flat column `name`, one after the other; the column `lengths` says how much.

    `folder` is for a file with an array that is too large for memory; None: a temporary one.
    """
    if len(parts) == 1:
        whole, each = parts[0].found.columns[name], parts[0].found.columns[lengths]
        in_order = bool((np.diff(parts[0].indices) > 0).all())
        if in_order and int(each[parts[0].indices].sum(dtype=np.int64)) == len(whole):
            return whole
    total = sum(int(column([part], lengths).sum(dtype=np.int64)) for part in parts)
    dtype = np.dtype(DTYPES[name])
    if total * dtype.itemsize < _IN_MEMORY:
        return np.concatenate([np.zeros(0, dtype), *_pieces(parts, name, lengths)])
    with scratch(folder) as place:
        with (place / name).open("wb") as file:
            for piece in _pieces(parts, name, lengths):
                file.write(piece.data)
        return mapped(place / name, DTYPES[name])


def _pieces(parts: Sequence[Selection], name: str, lengths: str):
    for part in parts:
        columns = part.found.columns
        each = columns[lengths].astype(np.int64)
        starts = np.cumsum(each) - each
        for at in range(0, len(part.indices), _AT_ONCE):
            chosen = part.indices[at : at + _AT_ONCE]
            sizes = each[chosen]
            shift = starts[chosen] - (np.cumsum(sizes) - sizes)
            yield columns[name][np.repeat(shift, sizes) + np.arange(sizes.sum())]


def prompts_of(found: Prepared, records: Int64[np.ndarray, " n"]) -> list[list[Message] | str]:
    """The prompts of a few records, read from their files once more."""
    places = [(int(found.columns["file"][i]), int(found.columns["row"][i])) for i in records]
    prompts = {}
    for file in sorted({file for file, _ in places}):
        path = found.files[file]
        wanted = {row for other, row in places if other == file}
        for number, decode in rows(path):
            if number in wanted:
                first, *_ = parse_row(Notes().see(decode()), forms.stem(path), ("prompt",), f"{path}:{number}")
                prompts[file, number] = first.prompt
                wanted.remove(number)
            if not wanted:
                break
    return [prompts[place] for place in places]
