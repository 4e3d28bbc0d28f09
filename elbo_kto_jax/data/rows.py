"""The rows of a file of any form, some at a time; a row is what JSON has for it.

A block of rows can go to another process: as bytes, without their file.
"""

import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from elbo_kto_jax.data.bad_records import Decode
from elbo_kto_jax.data.forms import COMPRESSED, LINES, form
from elbo_kto_jax.data.json_rows import Line, decode_line, lines, list_or_lines
from elbo_kto_jax.data.parquet_rows import Batch, batches, without_dictionaries
from elbo_kto_jax.runtime.errors import UserError

_ROWS = 256  # lines of a block: enough for the tokenizer's threads, small enough for a moving bar
_BYTES = 2**20  # of a block, but for a line that alone has more


class Lines(NamedTuple):
    """Lines of a file, or what stands for them."""

    lines: list[Line]

    def rows(self) -> Iterator[tuple[int, Decode]]:
        for number, line in self.lines:
            yield number, functools.partial(decode_line, line)


Block: TypeAlias = Lines | Batch


def rows(file: Path) -> Iterator[tuple[int, Decode]]:
    """(number from 1, function that decodes the row or raises BadRecordError) for every row that is not blank.

    Raises:
      UserError: the file cannot be read, or unfolds to too much.
    """
    for block in blocks(file):
        yield from block.rows()


def blocks(file: Path) -> Iterator[Block]:
    """The rows of a file in blocks of a few hundred.

    Raises:
      UserError: see `rows`.
    """
    try:
        if form(file) == ".parquet":
            yield from batches(file)
        else:
            yield from _grouped(lines(file) if form(file).startswith(LINES) else list_or_lines(file))
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        hint = "copy it again" if Path(form(file)).suffix in COMPRESSED else "check its permissions"
        raise UserError(f"{file}: cannot be read ({reason}); {hint}") from None


def _grouped(found: Iterator[Line]) -> Iterator[Lines]:
    group: list[Line] = []
    size = 0
    for number, line in found:
        group.append((number, line))
        size += len(line or b"")
        if len(group) == _ROWS or size >= _BYTES:
            yield Lines(group)
            group, size = [], 0
    if group:
        yield Lines(group)


def to_bytes(block: Block) -> tuple[dict[str, Any], bytes]:
    """A block as (what JSON can hold, the rest)."""
    if isinstance(block, Lines):
        sizes = [-1 if line is None else len(line) for _, line in block.lines]
        header = {"numbers": [number for number, _ in block.lines], "sizes": sizes}
        return header, b"".join(line for _, line in block.lines if line is not None)
    import pyarrow

    columns = [without_dictionaries(column) for column in block.columns]
    batch = pyarrow.RecordBatch.from_arrays(columns, block.names)
    stream = io.BytesIO()
    with pyarrow.ipc.new_stream(stream, batch.schema) as writer:
        writer.write_batch(batch)
    return {"first": block.first, "count": block.count, "others": block.others}, stream.getvalue()


def from_bytes(header: dict[str, Any], content: bytes) -> Block:
    """The block of which `to_bytes` made this."""
    if "numbers" in header:
        found: list[Line] = []
        at = 0
        for number, size in zip(header["numbers"], header["sizes"], strict=True):
            found.append((number, None if size < 0 else content[at : at + size]))
            at += max(size, 0)
        return Lines(found)
    import pyarrow

    with pyarrow.ipc.open_stream(content) as reader:
        batch = reader.read_next_batch()
    return Batch(header["first"], header["count"], batch.schema.names, batch.columns, header["others"])
