"""Reads preference records: files in, validated unpaired records out, every bad record named by file, line and field.

Forms of a record (a JSON object or a Parquet row; null means absent):

  unpaired            {"prompt": P, "completion": C, "label": bool}
  pair                {"prompt": P, "chosen": C, "rejected": C}
  pair of whole       {"chosen": [messages], "rejected": [messages]}, with or without a "prompt": the prompt is the
    conversations     longest run of messages that both start with, and exactly one assistant message must follow it
                      in each. A "prompt" that is given as well must agree: the same messages, or, as a string, the
                      content of one of those user messages (UltraFeedback-Binary stores it this way).

P is a string or a non-empty list of {"role", "content"} messages; C is a string or a list of one assistant message.
A content is a string or a list of parts {"type": "text", "text"}, whose texts are joined. Messages may be written as
JSON text. Completions may be empty strings here: such rows are read, and dropped and counted where they are tokenised.
A pair becomes two records, chosen (label true) before rejected (label false), which keep their link.

What else a record has is left out, and its name logged with the number of records, unless the answer or the prompt is
not what was said without it: tools and calls of tools, reasoning, images and other parts are refused, and so is a name
that stands twice in an object.

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
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elbo_kto_jax.data import sources
from elbo_kto_jax.data.sources import BadRecordError, shorten
from elbo_kto_jax.runtime.errors import UserError

log = logging.getLogger(__name__)
Message = dict[str, str]

_ROLES = ("system", "user", "assistant")
_LABEL_OF_STEM = {"chosen": True, "rejected": False}
_MESSAGES_OF = ("prompt", "completion", "chosen", "rejected")
# Without these a message is another one. Empty ones say nothing.
_CARRY = (
    *("tool_calls", "tool_call_id", "function_call", "refusal", "audio", "images", "image"),
    *("reasoning_content", "reasoning", "thinking"),
)
_EMPTY = (None, "", [], {})
_NAMED = 10  # fields that a note names
# A text that begins and ends as a list of messages does, in JSON or as Python or NumPy print one.
_LOOKS_LIKE_MESSAGES = re.compile(r"\s*(\[\s*)?(array\(\s*\[\s*)?\{.*\}[\s\])]*(,\s*dtype=object\))?\s*", re.DOTALL)
_HAS_ROLE = re.compile(r"""["']role["']\s*:""")


@dataclasses.dataclass(frozen=True)
class Record:
    """One unpaired example.

    Attributes:
      id: unique within its data set.
      prompt: messages with exactly the keys `role` and `content`, or plain text.
      completion: a list of one assistant message, plain text, or None where it was neither given nor needed.
      label: True desirable, False undesirable, None where it was neither given nor needed.
      where: "FILE:LINE" (of a Parquet file: "FILE:ROW"), counted from 1.
      pair: what only the two halves of a pair have in common; empty for a record that is none.
    """

    id: str
    prompt: list[Message] | str
    completion: list[Message] | str | None
    label: bool | None
    where: str
    pair: str = ""


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
) -> RecordFile:
    """Reads a data set: a file of JSON or Parquet, a folder of them, or a data set of the Hugging Face Hub.

    Of a folder or a Hub data set the training split is read, where files or folders are named after splits;
    "PATH:SPLIT" reads another ("trl-lib/kto-mix-14k:test"). A Hub id may name a branch, tag or commit
    ("trl-lib/kto-mix-14k@main:test"). Files are read in the order of their names; `text.sources` has their forms. What
    is left out is logged.

    Args:
      path: what to read.
      needs: the fields that every record must have, of "prompt" (always needed), "completion" and "label". The others
        are checked where they are present. Without "completion" a pair is one record: its prompt.
      skip_bad: list bad records instead of stopping at the first.
      flag: the command-line flag that gave `path`, for messages.

    Raises:
      UserError: nothing to read at `path`, no usable record in it, the rows of one file again in another form, or
        (without `skip_bad`) a bad record.
    """
    records: list[Record] = []
    skipped: list[str] = []
    ids, notes = _Ids(), _Notes()
    source = sources.find_files(str(path), flag)
    for file in source.files:
        for number, decode in sources.rows(file):
            where = f"{file}:{number}"
            try:
                row = notes.see(decode())
                records += ids.assign(_parse(row, sources.stem(file), needs, where), file)
            except BadRecordError as error:
                if not skip_bad:
                    raise UserError(f"{where}: {error}; fix or drop the record, or pass --skip-bad-records") from None
                skipped.append(f"{where}: {error}")
    if not records:
        bad = f"; {len(skipped)} bad ones were skipped, the first: {skipped[0]}" if skipped else ""
        raise UserError(f"{flag}: no usable record in {path}{bad}")
    ids.check_copies(flag)
    for note in (*source.notes, *notes.lines(), *ids.notes()):
        log.info("%s: %s", path, note)
    return RecordFile(records, skipped, source.files)


class _Notes:
    """Counts what is not used of the rows, or read in another way than it is written."""

    def __init__(self) -> None:
        self._unused: collections.Counter[str] = collections.Counter()  # name of a field -> rows that have it
        self._num_texts = 0  # rows with messages that are written as JSON text

    def see(self, row: Any) -> Any:
        """The row, with messages in the place of their JSON text."""
        if not isinstance(row, dict):
            raise BadRecordError(f"expected a JSON object, got {_show(row)}")
        texts = {name: messages for name in _MESSAGES_OF if (messages := _messages_in(row.get(name), name))}
        self._num_texts += bool(texts)
        row = {**row, **texts}
        self._unused.update(set(_unused(row)))
        return row

    def lines(self) -> list[str]:
        lines = []
        if self._num_texts:
            lines.append(f"{self._num_texts} records write messages as JSON text, which is read as messages")
        if self._unused:
            named = [f"{shorten(name)} ({count})" for name, count in sorted(self._unused.items())]
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
            f"field `{name}`: messages as text, {_show(value)}; write a list of objects, or a message whose content "
            "is that text"
        )
    return None


def _unused(row: dict[str, Any]) -> Iterator[str]:
    """The names of what the row has and the records made of it have not."""
    for name, value in row.items():
        if value in _EMPTY:
            continue
        if name not in sources.FIELDS:
            yield name
        elif name in _MESSAGES_OF and isinstance(value, list):
            for message in value:
                yield from _unused_of(message, f"{name}[]")


def _unused_of(message: Any, name: str) -> Iterator[str]:
    if not isinstance(message, dict):
        return
    yield from (f"{name}.{key}" for key in message if key not in ("role", "content") and message[key] not in _EMPTY)
    if isinstance(message.get("content"), list):
        for part in message["content"]:
            if isinstance(part, dict):
                yield from (f"{name}.content[].{key}" for key in part if key not in ("type", "text"))


# What a row says.


def _parse(row: dict[str, Any], stem: str, needs: tuple[str, ...], where: str) -> list[Record]:
    """The unpaired records of one row; a missing id is still the empty string."""
    if row.get("tools") not in (*_EMPTY, "[]", "null"):
        raise BadRecordError("field `tools`: tools are not supported")
    record_id = _parse_id(row.get("id"))
    pair = ""
    if record_id and stem in _LABEL_OF_STEM:
        pair, record_id = f"id {record_id}", f"{stem}-{record_id}"
    if row.get("chosen") is not None or row.get("rejected") is not None:
        prompt, chosen, rejected = _parse_pair(row)
        if "completion" not in needs:
            return [Record(record_id, prompt, None, None, where)]
        return [
            Record(record_id and f"{record_id}-chosen", prompt, chosen, True, where, where),
            Record(record_id and f"{record_id}-rejected", prompt, rejected, False, where, where),
        ]
    prompt = _parse_prompt(_required(row, "prompt"))
    completion, label = row.get("completion"), _parse_label(row.get("label"))
    if label is None:
        label = _LABEL_OF_STEM.get(stem)
    if completion is not None or "completion" in needs:
        completion = _parse_completion(_required(row, "completion"), "completion")
    if label is None and "label" in needs:
        raise BadRecordError("field `label`: missing; expected true or false")
    return [Record(record_id, prompt, completion, label, where, pair)]


def _required(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise BadRecordError(f"field `{name}`: missing")
    return row[name]


def _parse_id(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise BadRecordError(f"field `id`: expected a string or an integer, got {_show(value)}")
    return _parse_text(str(value), "id")


def _parse_label(value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    meant = f" (write {'true' if value else 'false'})" if value in (0, 1) else ""
    raise BadRecordError(f"field `label`: expected true or false, got {_show(value)}{meant}")


def _parse_prompt(value: Any) -> list[Message] | str:
    if value == "":
        raise BadRecordError("field `prompt`: empty")
    return _parse_text(value, "prompt") if isinstance(value, str) else _parse_messages(value, "prompt")


def _parse_completion(value: Any, name: str) -> list[Message] | str:
    if isinstance(value, str):
        return _parse_text(value, name)
    messages = _parse_messages(value, name)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            raise BadRecordError(f'field `{name}[{index}].role`: expected "assistant", got {_show(message["role"])}')
    if len(messages) > 1:
        raise BadRecordError(f"field `{name}`: expected one assistant message, got {len(messages)}")
    return messages


def _parse_messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise BadRecordError(f"field `{name}`: expected a string or a list of messages, got {_show(value)}")
    if not value:
        raise BadRecordError(f"field `{name}`: empty")
    return [_parse_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _parse_message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise BadRecordError(f"field `{name}`: expected an object with role and content, got {_show(value)}")
    role = value.get("role")
    if role not in _ROLES:
        raise BadRecordError(f"field `{name}.role`: expected one of {', '.join(_ROLES)}, got {_show(role)}")
    for key in _CARRY:
        if value.get(key) not in _EMPTY:
            raise BadRecordError(f"field `{name}.{key}`: not supported, and without it the message is another one")
    return {"role": role, "content": _parse_content(value.get("content"), f"{name}.content")}


def _parse_content(value: Any, name: str) -> str:
    """The text of a content, of parts if it has such."""
    if not isinstance(value, list):
        return _parse_text(value, name)
    if not value:
        raise BadRecordError(f"field `{name}`: empty")
    texts = []
    for index, part in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(part, dict):
            raise BadRecordError(f"field `{where}`: expected an object with type and text, got {_show(part)}")
        if part.get("type") != "text":
            raise BadRecordError(f'field `{where}.type`: expected "text", got {_show(part.get("type"))}')
        texts.append(_parse_text(part.get("text"), f"{where}.text"))
    return "".join(texts)


def _parse_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecordError(f"field `{name}`: expected a string, got {_show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair; no tokenizer can read it
        raise BadRecordError(f"field `{name}`: character {error.start + 1} is half of a surrogate pair") from None
    return value


def _parse_pair(row: dict[str, Any]) -> tuple[list[Message] | str, list[Message] | str, list[Message] | str]:
    """(prompt, chosen, rejected) of a pair in either form."""
    if row.get("completion") is not None:
        raise BadRecordError("field `completion`: a record has either a completion or chosen and rejected, not both")
    if row.get("label") is not None:
        raise BadRecordError("field `label`: a record has either a label or chosen and rejected, not both")
    chosen, rejected = _required(row, "chosen"), _required(row, "rejected")
    prompt = None if row.get("prompt") is None else _parse_prompt(row["prompt"])
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = _parse_messages(chosen, "chosen"), _parse_messages(rejected, "rejected")
        if any(message["role"] != "assistant" for message in (chosen[0], rejected[0])):
            return _split_conversations(prompt, chosen, rejected)
    if prompt is None:
        raise BadRecordError("field `prompt`: missing; without it chosen and rejected must be whole conversations")
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
        raise BadRecordError("field `chosen`: shares no first message with `rejected`, so there is no common prompt")
    for name, conversation in (("chosen", chosen), ("rejected", rejected)):
        roles = [message["role"] for message in conversation[num_shared:]]
        if roles != ["assistant"]:
            raise BadRecordError(
                f"field `{name}`: expected one assistant message after the {num_shared} that chosen and rejected "
                f"share, got {', '.join(roles)}"
            )
    if isinstance(prompt, str):
        agrees = any(m["role"] == "user" and m["content"].strip() == prompt.strip() for m in shared)
    else:
        agrees = prompt is None or prompt == shared
    if not agrees:
        raise BadRecordError("field `prompt`: differs from the messages that chosen and rejected share")
    return shared, chosen[num_shared:], rejected[num_shared:]


def _show(value: Any) -> str:
    """A value as JSON on one line, short enough for a message."""
    try:
        return shorten(json.dumps(value, default=str))
    except (RecursionError, ValueError, TypeError):  # nested too deeply, or with keys that JSON has not
        return f"a {type(value).__name__}"


# What a record is called.


class _Ids:
    """Gives every record of a data set its id, and finds ids that were given twice and files that repeat others."""

    def __init__(self) -> None:
        self._where: dict[str, str] = {}  # id -> its record
        self._copies: collections.Counter[str] = collections.Counter()  # content hash -> records so far
        self._first_file: dict[str, Path] = {}  # content hash -> file of the first of them
        self._unnamed: collections.Counter[Path] = collections.Counter()  # file -> records without an id
        self._repeated: collections.Counter[tuple[Path, Path]] = collections.Counter()  # (file, the earlier one)

    def assign(self, records: list[Record], file: Path) -> list[Record]:
        """The records of one row of `file`, with ids.

        Raises:
          BadRecordError: an explicit id was used before.
        """
        for record in records:
            if record.id in self._where:
                raise BadRecordError(f"field `id`: {_show(record.id)} is already the id of {self._where[record.id]}")
        self._where.update({record.id: record.where for record in records if record.id})
        return [record if record.id else self._named_by_content(record, file) for record in records]

    def _named_by_content(self, record: Record, file: Path) -> Record:
        content = json.dumps([record.prompt, record.completion, record.label], separators=(",", ":"))
        digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        self._unnamed[file] += 1
        if self._copies[digest]:
            self._repeated[file, self._first_file[digest]] += 1
        else:
            self._first_file[digest] = file
        name = ""
        while not name or name in self._where:  # an explicit id may be the hash of another record
            self._copies[digest] += 1
            copy = self._copies[digest]
            name = digest if copy == 1 else f"{digest}#{copy}"
        self._where[name] = record.where
        return dataclasses.replace(record, id=name)

    def check_copies(self, flag: str) -> None:
        """Raises UserError where all records of a file stand in a file of another form as well."""
        for (file, earlier), count in self._repeated.items():
            if count == self._unnamed[file] and sources.form(file) != sources.form(earlier):
                raise UserError(
                    f"{flag}: {file} has no other records than {earlier} has, in another form; remove one of the files"
                )

    def notes(self) -> list[str]:
        copies = self._repeated.total()
        return [f"{copies} records are exact copies of earlier ones; each counts"] if copies else []
