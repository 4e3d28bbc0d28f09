"""The rows of a Parquet file, as JSON would have them.

Columns that hold times are read as integers, for no field is one.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from elbo_kto_jax.data.bad_records import BadRecordError, Decode, shorten
from elbo_kto_jax.data.records import FIELDS
from elbo_kto_jax.data.unfold import most_unfolded, unfolds_to_too_much
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError

_ROWS = 512  # of Parquet, read at once
_BYTES = 2**24  # of a batch, but for a row that alone has more


class NotRead:
    """Stands for the value of a column that is not read; there may be one."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of a Parquet file that follow each other, as Arrow arrays.

    Attributes:
      first: the number of the first row, from 1.
      count: of the rows.
      names: of the columns that are read.
      columns: their values.
      others: the names of the columns that are not read.
    """

    first: int
    count: int
    names: list[str]
    columns: list[Any]
    others: list[str]

    def rows(self) -> Iterator[tuple[int, Decode]]:
        not_read = {name: NotRead() for name in self.others}
        for row in range(self.count):
            yield self.first + row, functools.partial(_decode_row, self.names, self.columns, row, not_read)


def batches(file: Path) -> Iterator[Batch]:
    """The rows of a Parquet file, some at a time.

    Raises:
      UserError: it cannot be read, has a column twice, or unfolds to too much.
    """
    import pyarrow

    try:
        with _opened(file) as table:
            leaves = [table.schema.column(i).path for i in range(len(table.schema.names))]
        # As dictionaries, texts that repeat take their memory once until it is known how much they are.
        with _opened(file, read_dictionary=leaves) as table:
            names = table.schema_arrow.names
            twice = [name for name in FIELDS if names.count(name) > 1]
            if twice:
                raise UserError(f"{file}: column `{twice[0]}` stands there twice; remove one")
            read = [name for name in FIELDS if name in names]
            others = [name for name in names if name not in FIELDS]
            left = most_unfolded(file)
            if _claimed_bytes(table.metadata, read) > left:
                raise unfolds_to_too_much(file)
            first = 1
            # Arrow joins no dictionaries of nested columns, and each row group has its own.
            groups = (table.iter_batches(_ROWS, [group], read) for group in range(table.num_row_groups))
            for batch in itertools.chain.from_iterable(groups):
                columns = [_without_times(column) for column in batch.columns]
                size = sum(map(_num_bytes, columns))
                left -= size
                if left < 0:
                    raise unfolds_to_too_much(file)
                count = max(1, batch.num_rows * _BYTES // max(size, _BYTES))
                for start in range(0, batch.num_rows, count):
                    part = [column.slice(start, count) for column in columns]
                    yield Batch(first + start, min(count, batch.num_rows - start), batch.schema.names, part, others)
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: not a readable Parquet file: {reason[:200]}") from None


@contextlib.contextmanager
def _opened(file: Path, **options: Any) -> Iterator[Any]:
    """The file as a table, of which parts are read as they are asked for."""
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        source = stack.enter_context(file.open("rb")) if paths.is_remote(file) else file
        yield stack.enter_context(pyarrow.parquet.ParquetFile(source, **options))


def _claimed_bytes(metadata: Any, read: list[str]) -> int:
    """What the columns `read` take in memory as the file says, texts that repeat counted once."""
    total = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] in read:
                total += column.total_uncompressed_size + 4 * column.num_values
    return total


def _num_bytes(array: Any) -> int:
    """The memory that the values of an Arrow array take one by one."""
    import pyarrow.compute
    import pyarrow.types as kinds

    if kinds.is_dictionary(array.type):
        lengths = pyarrow.compute.binary_length(array.dictionary)
        return pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0
    if kinds.is_struct(array.type):
        return sum(map(_num_bytes, array.flatten()))
    if kinds.is_list(array.type) or kinds.is_large_list(array.type):
        return _num_bytes(array.flatten())
    return array.nbytes


def _without_times(array: Any) -> Any:
    """An Arrow array with integers in the place of times, which Python's own types need not be able to hold."""
    import pyarrow

    plain = _without_time(array.type)
    try:
        return array if plain == array.type else array.cast(plain)
    except pyarrow.ArrowException:
        return array  # `_decode_row` says what is wrong


def without_dictionaries(array: Any) -> Any:
    """An Arrow array with each text where it stands: one that repeats takes its memory as often."""
    plain = _plain(array.type)
    return array if plain == array.type else array.cast(plain)


def _plain(kind: Any) -> Any:
    import pyarrow.types as kinds

    return kind.value_type if kinds.is_dictionary(kind) else _within(kind, _plain)


def _without_time(kind: Any) -> Any:
    import pyarrow
    import pyarrow.types as kinds

    if kinds.is_date32(kind) or kinds.is_time32(kind):
        return pyarrow.int32()
    if kinds.is_temporal(kind):
        return pyarrow.int64()
    return _within(kind, _without_time)


def _within(kind: Any, change: Callable[[Any], Any]) -> Any:
    """The nested type `kind` with every type in it changed."""
    import pyarrow
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        return pyarrow.struct([field.with_type(change(field.type)) for field in kind])
    if kinds.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(change(kind.value_type)))
    if kinds.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(change(kind.value_type)))
    return kind


def _decode_row(names: list[str], columns: list[Any], row: int, not_read: dict[str, NotRead]) -> dict[str, Any]:
    found: dict[str, Any] = {**not_read}
    for name, column in zip(names, columns, strict=True):
        try:
            found[name] = column[row].as_py()
        except UnicodeDecodeError:
            raise BadRecordError(f"field `{name}`: not UTF-8 text") from None
        except (ValueError, OverflowError, TypeError, ArithmeticError, ImportError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadRecordError(f"field `{name}`: a value that cannot be read ({shorten(reason)})") from None
    return found
