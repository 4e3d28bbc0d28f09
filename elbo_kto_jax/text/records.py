"""Reads preference records: files in, validated unpaired records out, every bad record named by file, line and field.

Forms of a record (a JSON object or a Parquet row; fields not named here are ignored, null means absent):

  unpaired            {"prompt": P, "completion": C, "label": bool}
  pair                {"prompt": P, "chosen": C, "rejected": C}
  pair of whole       {"chosen": [messages], "rejected": [messages]}, with or without a "prompt": the prompt is the
    conversations     longest run of messages that both start with, and exactly one assistant message must follow it
                      in each. A "prompt" that is given as well must agree: the same messages, or, as a string, the
                      content of one of those user messages (UltraFeedback-Binary stores it this way).

P is a string or a non-empty list of {"role", "content"} messages; C is a string or a list of one assistant message.
Completions may be empty strings here: such rows are read, and dropped and counted where they are tokenised.
A pair becomes two unpaired records, chosen (label true) before rejected (label false).

Names. An explicit `id` is a string or an integer and must be unique within the data set, as text (1 and "1" are the
same). A pair's id is continued with "-chosen" and "-rejected". A missing id is the BLAKE2b hash of prompt, completion
and label, so it stays with the content when a file is shuffled or split; exact copies get "#2", "#3", ... in reading
order.

Two files instead of labels. In a file whose stem is `chosen` or `rejected`, a record without a label has the label
true or false, and explicit ids are qualified by the stem ("chosen-1"): in a folder with both, the same id names the
two halves of a pair.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from elbo_kto_jax.errors import UserError

log = logging.getLogger(__name__)
Message = dict[str, str]

_SUFFIXES = (".jsonl", ".parquet")
_ROLES = ("system", "user", "assistant")
_FIELDS = ("id", "prompt", "completion", "label", "chosen", "rejected")
_LABEL_OF_STEM = {"chosen": True, "rejected": False}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?")
_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")
_HUB_TIMEOUT_SECONDS = 5


@dataclasses.dataclass(frozen=True)
class Record:
    """One unpaired example.

    Attributes:
      id: unique within its data set.
      prompt: messages with exactly the keys `role` and `content`, or plain text.
      completion: a list of one assistant message, plain text, or None where it was neither given nor needed.
      label: True desirable, False undesirable, None where it was neither given nor needed.
      where: "FILE:LINE" (of a Parquet file: "FILE:ROW"), counted from 1.
    """

    id: str
    prompt: list[Message] | str
    completion: list[Message] | str | None
    label: bool | None
    where: str


@dataclasses.dataclass(frozen=True)
class RecordFile:
    """The records of a data set in reading order, one message for each bad record that was skipped, and the files."""

    records: list[Record]
    skipped: list[str]
    files: list[Path]


class _BadRecordError(Exception):
    """What is wrong with one record; the reader adds where it stands."""


def read_records(
    path: str | Path,
    *,
    needs: tuple[str, ...] = ("prompt", "completion", "label"),
    skip_bad: bool = False,
    flag: str = "--config.data.train",
) -> RecordFile:
    """Reads a data set: a JSONL or Parquet file, a folder of them, or a data set of the Hugging Face Hub.

    Of a folder or a Hub data set the training split is read, where files or folders are named after splits;
    "PATH:SPLIT" reads another ("trl-lib/kto-mix-14k:test"). A Hub id may name a branch, tag or commit
    ("trl-lib/kto-mix-14k@main:test"). Files are read in the order of their names.

    Args:
      path: what to read.
      needs: the fields that every record must have, of "prompt" (always needed), "completion" and "label". The others
        are checked where they are present. Without "completion" a pair is one record: its prompt.
      skip_bad: list bad records instead of stopping at the first.
      flag: the command-line flag that gave `path`, for messages.

    Raises:
      UserError: nothing to read at `path`, no usable record in it, or (without `skip_bad`) a bad record.
    """
    records: list[Record] = []
    skipped: list[str] = []
    ids = _Ids()
    files = _find_files(str(path), flag)
    for file in files:
        for number, decode in _rows(file):
            where = f"{file}:{number}"
            try:
                records += ids.assign(_parse(decode(), _stem(file), needs, where))
            except _BadRecordError as error:
                if not skip_bad:
                    raise UserError(f"{where}: {error}; fix or drop the record, or pass --skip-bad-records") from None
                skipped.append(f"{where}: {error}")
    if not records:
        bad = f"; {len(skipped)} bad ones were skipped, the first: {skipped[0]}" if skipped else ""
        raise UserError(f"{flag}: no usable record in {path}{bad}")
    return RecordFile(records, skipped, files)


# Where the rows are.


def _find_files(source: str, flag: str) -> list[Path]:
    """The record files that `source` stands for, sorted."""
    if not source:
        raise UserError(f"{flag}: no data set is given; name a JSONL or Parquet file, a folder or a hub data set id")
    path = Path(source)
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise UserError(f"{flag}: {path}: expected a file that ends in {' or '.join(_SUFFIXES)}")
        return [path]
    name, _, split = (source, "", "") if path.is_dir() else source.partition(":")
    folder = Path(name)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(name) or folder.suffix in _SUFFIXES:
            raise UserError(f"{flag}: no file or folder {source}; check the path")
        folder = _download(name, flag)
    return _select_split(folder, name, split, flag)


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
            allow_patterns=[f"*{suffix}" for suffix in _SUFFIXES],
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


def _select_split(folder: Path, source: str, split: str, flag: str) -> list[Path]:
    """The record files of one split of a folder: the named one, else the training split, else what is not held out."""
    split_of = {
        file: _split_name(file.relative_to(folder))
        for file in sorted(folder.rglob("*"))
        if file.suffix in _SUFFIXES and file.is_file() and not file.name.startswith(".")
    }
    if not split_of:
        raise UserError(f"{flag}: no .jsonl or .parquet file in {source}")
    names = sorted(set(split_of.values()) - {""})
    if split:
        if split not in names:
            raise UserError(f"{flag}: {source} has no split {split!r}; it has {', '.join(names) or 'no named splits'}")
        return [file for file, name in split_of.items() if name == split]
    training = [name for name in names if name.startswith("train")]
    if "train" in training:
        training = ["train"]
    if len(training) > 1:
        raise UserError(
            f"{flag}: {source} has several training splits ({', '.join(training)}); name one: {source}:{training[0]}"
        )
    if training:
        return [file for file, name in split_of.items() if name == training[0]]
    return [file for file, name in split_of.items() if not name] or list(split_of)


def _split_name(relative: Path) -> str:
    """The split that a file's stem or else one of its folders names ("train-00000-of-00002", "test/0000"), or ""."""
    for name in (_stem(relative), *reversed(relative.parent.parts)):
        if re.split(r"[-_.]", name)[0] in ("train", *_HELD_OUT):
            return name
    return ""


def _stem(file: Path) -> str:
    """The file's name without its extension and shard number."""
    return _SHARD.sub("", file.stem)


def _rows(file: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """(number from 1, function that decodes the row or raises _BadRecordError) for every row that is not blank."""
    try:
        yield from _parquet_rows(file) if file.suffix == ".parquet" else _jsonl_rows(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from None


def _jsonl_rows(file: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, functools.partial(_decode_json, line)


def _decode_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _BadRecordError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise _BadRecordError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise _BadRecordError(f"not valid JSON: {error}") from None


def _parquet_rows(file: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = [name for name in _FIELDS if name in table.schema_arrow.names]
            batches = table.iter_batches(columns=columns)
            rows = (functools.partial(_decode_row, batch, row) for batch in batches for row in range(batch.num_rows))
            yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _decode_row(batch: Any, row: int) -> dict[str, Any]:
    try:
        return {name: column[row].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError:
        raise _BadRecordError("not UTF-8 text") from None


# What a row says.


def _parse(row: Any, stem: str, needs: tuple[str, ...], where: str) -> list[Record]:
    """The unpaired records of one row; a missing id is still the empty string."""
    if not isinstance(row, dict):
        raise _BadRecordError(f"expected a JSON object, got {_show(row)}")
    record_id = _parse_id(row.get("id"))
    if record_id and stem in _LABEL_OF_STEM:
        record_id = f"{stem}-{record_id}"
    if row.get("chosen") is not None or row.get("rejected") is not None:
        prompt, chosen, rejected = _parse_pair(row)
        if "completion" not in needs:
            return [Record(record_id, prompt, None, None, where)]
        return [
            Record(record_id and f"{record_id}-chosen", prompt, chosen, True, where),
            Record(record_id and f"{record_id}-rejected", prompt, rejected, False, where),
        ]
    prompt = _parse_prompt(_required(row, "prompt"))
    completion, label = row.get("completion"), _parse_label(row.get("label"))
    if label is None:
        label = _LABEL_OF_STEM.get(stem)
    if completion is not None or "completion" in needs:
        completion = _parse_completion(_required(row, "completion"), "completion")
    if label is None and "label" in needs:
        raise _BadRecordError("field `label`: missing; expected true or false")
    return [Record(record_id, prompt, completion, label, where)]


def _required(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise _BadRecordError(f"field `{name}`: missing")
    return row[name]


def _parse_id(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise _BadRecordError(f"field `id`: expected a string or an integer, got {_show(value)}")
    return _parse_text(str(value), "id")


def _parse_label(value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    meant = f" (write {'true' if value else 'false'})" if value in (0, 1) else ""
    raise _BadRecordError(f"field `label`: expected true or false, got {_show(value)}{meant}")


def _parse_prompt(value: Any) -> list[Message] | str:
    if value == "":
        raise _BadRecordError("field `prompt`: empty")
    return _parse_text(value, "prompt") if isinstance(value, str) else _parse_messages(value, "prompt")


def _parse_completion(value: Any, name: str) -> list[Message] | str:
    if isinstance(value, str):
        return _parse_text(value, name)
    messages = _parse_messages(value, name)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            raise _BadRecordError(f'field `{name}[{index}].role`: expected "assistant", got {_show(message["role"])}')
    if len(messages) > 1:
        raise _BadRecordError(f"field `{name}`: expected one assistant message, got {len(messages)}")
    return messages


def _parse_messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise _BadRecordError(f"field `{name}`: expected a string or a list of messages, got {_show(value)}")
    if not value:
        raise _BadRecordError(f"field `{name}`: empty")
    return [_parse_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _parse_message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise _BadRecordError(f"field `{name}`: expected an object with role and content, got {_show(value)}")
    role = value.get("role")
    if role not in _ROLES:
        raise _BadRecordError(f"field `{name}.role`: expected one of {', '.join(_ROLES)}, got {_show(role)}")
    return {"role": role, "content": _parse_text(value.get("content"), f"{name}.content")}


def _parse_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _BadRecordError(f"field `{name}`: expected a string, got {_show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair; no tokenizer can read it
        raise _BadRecordError(f"field `{name}`: character {error.start + 1} is half of a surrogate pair") from None
    return value


def _parse_pair(row: dict[str, Any]) -> tuple[list[Message] | str, list[Message] | str, list[Message] | str]:
    """(prompt, chosen, rejected) of a pair in either form."""
    if row.get("completion") is not None:
        raise _BadRecordError("field `completion`: a record has either a completion or chosen and rejected, not both")
    chosen, rejected = _required(row, "chosen"), _required(row, "rejected")
    prompt = None if row.get("prompt") is None else _parse_prompt(row["prompt"])
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = _parse_messages(chosen, "chosen"), _parse_messages(rejected, "rejected")
        if any(message["role"] != "assistant" for message in (chosen[0], rejected[0])):
            return _split_conversations(prompt, chosen, rejected)
    if prompt is None:
        raise _BadRecordError("field `prompt`: missing; without it chosen and rejected must be whole conversations")
    return prompt, _parse_completion(chosen, "chosen"), _parse_completion(rejected, "rejected")


def _split_conversations(
    prompt: list[Message] | str | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected) of two whole conversations; equal answers are two answers, not part of the prompt."""
    num_shared = 0
    while num_shared < min(len(chosen), len(rejected)) - 1 and chosen[num_shared] == rejected[num_shared]:
        num_shared += 1
    shared = chosen[:num_shared]
    if not shared:
        raise _BadRecordError("field `chosen`: shares no first message with `rejected`, so there is no common prompt")
    for name, conversation in (("chosen", chosen), ("rejected", rejected)):
        roles = [message["role"] for message in conversation[num_shared:]]
        if roles != ["assistant"]:
            raise _BadRecordError(
                f"field `{name}`: expected one assistant message after the {num_shared} that chosen and rejected "
                f"share, got {', '.join(roles)}"
            )
    if isinstance(prompt, str):
        agrees = any(m["role"] == "user" and m["content"].strip() == prompt.strip() for m in shared)
    else:
        agrees = prompt is None or prompt == shared
    if not agrees:
        raise _BadRecordError("field `prompt`: differs from the messages that chosen and rejected share")
    return shared, chosen[num_shared:], rejected[num_shared:]


def _show(value: Any) -> str:
    """A value as JSON on one line, short enough for a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# What a record is called.


class _Ids:
    """Gives every record of a data set its id and finds ids that were given twice."""

    def __init__(self) -> None:
        self._where: dict[str, str] = {}  # explicit id -> its first record
        self._copies: collections.Counter[str] = collections.Counter()  # content hash -> records so far

    def assign(self, records: list[Record]) -> list[Record]:
        """The records of one row, with ids.

        Raises:
          _BadRecordError: an explicit id was used before.
        """
        for record in records:
            if record.id in self._where:
                raise _BadRecordError(f"field `id`: {_show(record.id)} is already the id of {self._where[record.id]}")
        self._where.update({record.id: record.where for record in records if record.id})
        return [record if record.id else self._named_by_content(record) for record in records]

    def _named_by_content(self, record: Record) -> Record:
        content = json.dumps([record.prompt, record.completion, record.label], separators=(",", ":"))
        name = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        self._copies[name] += 1
        copy = self._copies[name]
        return dataclasses.replace(record, id=name if copy == 1 else f"{name}#{copy}")
