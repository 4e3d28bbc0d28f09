"""Where the rows of a data set are: a file, a folder or a data set of the Hub, as JSON or Parquet, plain or compressed.

    .jsonl .ndjson   one JSON object a line
    .json            a list of objects, or one object a line
    .parquet         rows with columns of the fields' names

The JSON forms may be compressed (.gz, .zst, .bz2); upper and lower case are the same. What a folder holds besides is
named as left out.

A row is what JSON has for it; columns of Parquet that hold times are read as integers, for no field is one.

Files may come from anywhere. A line has at most MOST_LINE_BYTES. Compression must not turn a few bytes into a full
memory: what a compressed or Parquet file unfolds to is at most MOST_UNFOLDED_BYTES or MOST_UNFOLDING times the file.
"""

import collections
import dataclasses
import functools
import io
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from elbo_kto_jax.runtime.errors import UserError

log = logging.getLogger(__name__)

MOST_LINE_BYTES = 2**27
MOST_UNFOLDED_BYTES = 2**28
MOST_UNFOLDING = 100

_LINES = (".jsonl", ".ndjson")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
FORMS = (".jsonl", ".parquet", *(f"{end}{more}" for end in (*_LINES, ".json") for more in ("", *_COMPRESSED)))
_EXPECTED = "a file that ends in .jsonl or .parquet (or .ndjson, .json; these also with .gz, .zst or .bz2)"
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?")
_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")
_HUB_TIMEOUT_SECONDS = 5
_NAMED = 5  # files that a note names; of the others it tells the number
_ROWS = 1024  # of Parquet, read at once
FIELDS = ("id", "prompt", "completion", "label", "chosen", "rejected", "tools")  # that `records` looks at

Decode = Callable[[], Any]


class BadRecordError(Exception):
    """What is wrong with one record; the reader adds where it stands."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of a data set in the order in which they are read, and a line about each kind that is left out."""

    files: list[Path]
    notes: list[str]


class NotRead:
    """Stands for the value of a column that is not read; there may be one."""


# Files.


def find_files(source: str, flag: str) -> Source:
    """The record files that `source` stands for; `records.read_records` says how.

    Raises:
      UserError: there are none, or two hold the same rows in two forms.
    """
    if not source:
        raise UserError(f"{flag}: no data set is given; name a JSONL or Parquet file, a folder or a hub data set id")
    path = Path(source)
    if path.is_file():
        if not form(path):
            raise UserError(f"{flag}: {path}: expected {_EXPECTED}")
        return Source([path], [])
    name, _, split = (source, "", "") if path.is_dir() else source.partition(":")
    folder = Path(name)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(name) or form(folder):
            raise UserError(f"{flag}: no file or folder {source}; check the path")
        folder = _download(name, flag)
    return _select_split(folder, name, split, flag)


def form(file: Path) -> str:
    """The end of a file's name that says how it is read, in lower case, such as ".jsonl.gz"; "" if it is not read."""
    name = file.name.lower()
    return max((end for end in FORMS if name.endswith(end) and name != end), key=len, default="")


def stem(file: Path) -> str:
    """The file's name without its form and shard number."""
    return _SHARD.sub("", _name(file))


def _name(file: Path) -> str:
    return file.name[: len(file.name) - len(form(file))]


def _download(hub_id: str, flag: str) -> Path:
    """The folder of a Hub data set in the local cache, fetched first if the Hub can be reached."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    name, _, revision = hub_id.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            repo_type="dataset",
            allow_patterns=[f"*{end}" for end in dict.fromkeys(FORMS)],
            etag_timeout=_HUB_TIMEOUT_SECONDS,
        )
    except (OSError, RuntimeError, HFValidationError) as error:  # RuntimeError: there is no home folder for its cache
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{flag}: {hub_id} is no file or folder here, and the Hugging Face Hub gave no such data set ({reason})\n"
            f"Run `hf download --repo-type dataset {name}` where there is a network, or set {flag} to a local copy."
        ) from error
    log.info("%s: revision %s", name, Path(folder).name)
    return Path(folder)


def _select_split(folder: Path, source: str, split: str, flag: str) -> Source:
    """The record files of one split of a folder: the named one, else the training split, else what is not held out."""
    found, others = _list(folder)
    split_of = {file: _split_name(file.relative_to(folder)) for file in found}
    if not split_of:
        raise UserError(f"{flag}: no .jsonl or .parquet file in {source}{_listed('; it holds ', others, folder)}")
    names = sorted(set(split_of.values()) - {""})
    if split:
        if split not in names:
            raise UserError(f"{flag}: {source} has no split {split!r}; it has {', '.join(names) or 'no named splits'}")
        chosen = split
    else:
        training = [name for name in names if name.startswith("train")]
        if "train" in training:
            training = ["train"]
        if len(training) > 1:
            raise UserError(
                f"{flag}: {source} has several training splits ({', '.join(training)}); "
                f"name one: {source}:{training[0]}"
            )
        chosen = training[0] if training else ""
    files = [file for file, name in split_of.items() if name == chosen] or list(split_of)
    _check_forms(files, flag)
    unread = [file for file in found if file not in files]
    notes = []
    if unread:
        notes.append(f"{_listed('not read, for they are not of this split: ', unread, folder)}")
    if others:
        notes.append(f"{_listed('left out, for records are not read from files of their form: ', others, folder)}")
    return Source(files, notes)


def _list(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files of records, other files) below a folder, sorted; none that is hidden or in a hidden folder."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    records = [file for file in files if form(file) and _has_rows(file)]
    return records, [file for file in files if file not in records]


def _has_rows(file: Path) -> bool:
    """Whether a file in a folder is one of records; some of .json describe the data set instead."""
    if form(file).startswith((*_LINES, ".parquet")):
        return True
    try:
        with _open(file) as content:
            return _layout(content.read(2**16)) != ""
    except (OSError, UserError):
        return True  # reading it says what is wrong


def _listed(before: str, files: list[Path], folder: Path) -> str:
    """`before` and the names of the first files, with the number of all."""
    if not files:
        return ""
    names = ", ".join(str(file.relative_to(folder)) for file in files[:_NAMED])
    more = ", ..." if len(files) > _NAMED else ""
    return f"{before}{len(files)} file{'s' if len(files) > 1 else ''} ({names}{more})"


def _check_forms(files: list[Path], flag: str) -> None:
    """Raises UserError where a folder has a name in two forms: the rows would count twice."""
    first: dict[tuple[Path, str], Path] = {}
    for file in files:
        other = first.setdefault((file.parent, _name(file)), file)
        if other != file:
            raise UserError(
                f"{flag}: {other} and {file.name} have one name in two forms, so their rows would count twice; "
                "remove one, or rename it if its rows are others"
            )


def _split_name(relative: Path) -> str:
    """The split that a file's stem or else one of its folders names ("train-00000-of-00002", "test/0000"), or ""."""
    for name in (stem(relative), *reversed(relative.parent.parts)):
        if re.split(r"[-_.]", name)[0] in ("train", *_HELD_OUT):
            return name
    return ""


# Rows.


def rows(file: Path) -> Iterator[tuple[int, Decode]]:
    """(number from 1, function that decodes the row or raises BadRecordError) for every row that is not blank.

    Raises:
      UserError: the file cannot be read, or unfolds to too much.
    """
    try:
        if form(file) == ".parquet":
            yield from _parquet_rows(file)
        elif form(file).startswith(_LINES):
            yield from _line_rows(file)
        else:
            yield from _json_rows(file)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        hint = "copy it again" if Path(form(file)).suffix in _COMPRESSED else "check its permissions"
        raise UserError(f"{file}: cannot be read ({reason}); {hint}") from None


class _Bounded(io.RawIOBase):
    """What a compressed file unfolds to, as a stream that ends with an error where it is too much."""

    def __init__(self, file: Path, compression: str):
        import pyarrow

        super().__init__()
        self._file, self._content = file, pyarrow.input_stream(str(file), compression=compression)
        self._left = _most_unfolded(file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._content.read(len(buffer))
        buffer[: len(part)] = part
        self._left -= len(part)
        if self._left < 0:
            raise _unfolds_to_too_much(self._file)
        return len(part)

    def close(self) -> None:
        self._content.close()
        super().close()


def _open(file: Path) -> io.BufferedIOBase:
    compression = _COMPRESSED.get(file.suffix.lower())
    return io.BufferedReader(_Bounded(file, compression), 2**20) if compression else file.open("rb")


def _most_unfolded(file: Path) -> int:
    return max(MOST_UNFOLDED_BYTES, MOST_UNFOLDING * file.stat().st_size)


def _unfolds_to_too_much(file: Path) -> UserError:
    return UserError(
        f"{file}: its {file.stat().st_size} bytes unfold to more than {_most_unfolded(file)}; "
        "if that is meant, write it as .jsonl without compression"
    )


def _line_rows(file: Path) -> Iterator[tuple[int, Decode]]:
    with _open(file) as lines:
        number = 0
        while line := lines.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MOST_LINE_BYTES)
                yield number, _refuse_line
            elif line.strip():
                yield number, functools.partial(_decode_line, line)


def _refuse_line() -> Any:
    raise BadRecordError(f"a line of more than {MOST_LINE_BYTES} bytes")


def _decode_line(line: bytes) -> Any:
    decoder = _Json()
    try:
        value = decoder.decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecordError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise BadRecordError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise BadRecordError(f"not valid JSON: {error}") from None
    return _unambiguous(value, decoder.twice)


class _Json(json.JSONDecoder):
    """A decoder that notices where an object has a name twice: nobody knows which value is meant.

    Attributes:
      twice: such a name, or "".
    """

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.twice = ""

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self.twice = next(name for name, n in collections.Counter(name for name, _ in pairs).items() if n > 1)
        return found


def _unambiguous(value: Any, twice: str) -> Any:
    """`value`, unless `twice` names what it has twice."""
    if twice:
        raise BadRecordError(f"field `{shorten(twice)}`: stands twice in one object")
    return value


def shorten(text: str) -> str:
    """A text short enough for a message."""
    return text if len(text) <= 60 else f"{text[:57]}..."


_BLANK = re.compile(r"[ \t\r\n]*")


def _json_rows(file: Path) -> Iterator[tuple[int, Decode]]:
    """The rows of a list of objects, or of lines."""
    with _open(file) as content:
        head = content.read(2**16)
    if _layout(head) == "lines":
        yield from _line_rows(file)
        return
    if _layout(head) != "list":
        raise UserError(f"{file}: expected a list of records, or one record a line")
    with _open(file) as content:
        try:
            yield from enumerate(_list_rows(content.read().decode("utf-8-sig")), start=1)
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text (byte {error.start + 1})") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
        except (RecursionError, ValueError) as error:
            raise UserError(f"{file}: not valid JSON: {error}") from None


def _layout(head: bytes) -> str:
    """Whether the beginning of a .json file is that of a "list" of objects, of "lines" of records, or ""."""
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"\[\s*(\{|\]|$)", head):
        return "list"
    if not head.startswith(b"{"):
        return ""
    first, end, _ = head.partition(b"\n")
    if not end and len(head) > 2**15:  # a long record
        return "lines" if re.search(rb'"(prompt|chosen)"\s*:', head) else ""
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return ""
    return "lines" if "prompt" in value or "chosen" in value else ""


def _list_rows(text: str) -> Iterator[Decode]:
    decoder = _Json()
    at = _BLANK.match(text).end() + 1
    at = _BLANK.match(text, at).end()
    while text[at : at + 1] != "]":
        value, at = decoder.raw_decode(text, at)
        yield functools.partial(_unambiguous, value, decoder.twice)
        decoder.twice = ""
        at = _BLANK.match(text, at).end()
        if text[at : at + 1] == ",":
            at = _BLANK.match(text, at + 1).end()
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("expected , or ]", text, at)
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("expected the end of the file", text, at + 1)


def _parquet_rows(file: Path) -> Iterator[tuple[int, Decode]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            leaves = [table.schema.column(i).path for i in range(len(table.schema.names))]
        # As dictionaries, texts that repeat take their memory once until it is known how much they are.
        with pyarrow.parquet.ParquetFile(file, read_dictionary=leaves) as table:
            names = table.schema_arrow.names
            twice = [name for name in FIELDS if names.count(name) > 1]
            if twice:
                raise UserError(f"{file}: column `{twice[0]}` stands there twice; remove one")
            read = [name for name in FIELDS if name in names]
            not_read = {name: NotRead() for name in names if name not in FIELDS}
            left = _most_unfolded(file)
            if _claimed_bytes(table.metadata, read) > left:
                raise _unfolds_to_too_much(file)
            number = 0
            # Arrow joins no dictionaries of nested columns, and each row group has its own.
            groups = (table.iter_batches(_ROWS, [group], read) for group in range(table.num_row_groups))
            for batch in itertools.chain.from_iterable(groups):
                columns = [_without_times(column) for column in batch.columns]
                left -= sum(map(_num_bytes, columns))
                if left < 0:
                    raise _unfolds_to_too_much(file)
                for row in range(batch.num_rows):
                    number += 1
                    yield number, functools.partial(_decode_row, batch.schema.names, columns, row, not_read)
    except (pyarrow.ArrowException, OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: not a readable Parquet file: {reason[:200]}") from None


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


def _without_time(kind: Any) -> Any:
    import pyarrow
    import pyarrow.types as kinds

    if kinds.is_date32(kind) or kinds.is_time32(kind):
        return pyarrow.int32()
    if kinds.is_temporal(kind):
        return pyarrow.int64()
    if kinds.is_struct(kind):
        return pyarrow.struct([field.with_type(_without_time(field.type)) for field in kind])
    if kinds.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_without_time(kind.value_type)))
    if kinds.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_without_time(kind.value_type)))
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
