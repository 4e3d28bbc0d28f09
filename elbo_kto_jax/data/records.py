"""What a record says: the forms in which preferences are written, and the unpaired records that they are read as.

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

Two files instead of labels. In a file whose stem is `chosen` or `rejected`, a record without a label has the label
true or false, and explicit ids are qualified by the stem ("chosen-1"): in a folder with both, the same id names the
two halves of a pair.
"""

import dataclasses
from typing import Any

from elbo_kto_jax.data.bad_records import BadRecordError, show

FIELDS = ("id", "prompt", "completion", "label", "chosen", "rejected", "tools")  # of a row that are read
MESSAGES_OF = ("prompt", "completion", "chosen", "rejected")  # fields that may have messages
EMPTY: tuple[Any, ...] = (None, "", [], {})  # values that say nothing
_ROLES = ("system", "user", "assistant")
_LABEL_OF_STEM = {"chosen": True, "rejected": False}
# Without these a message is another one. Empty ones say nothing.
_CARRY = (
    *("tool_calls", "tool_call_id", "function_call", "refusal", "audio", "images", "image"),
    *("reasoning_content", "reasoning", "thinking"),
)

Message = dict[str, str]


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


def parse_row(row: dict[str, Any], stem: str, needs: tuple[str, ...], where: str) -> list[Record]:
    """The unpaired records of one row; a missing id is still the empty string."""
    if row.get("tools") not in (*EMPTY, "[]", "null"):
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
        raise BadRecordError(f"field `id`: expected a string or an integer, got {show(value)}")
    return _parse_text(str(value), "id")


def _parse_label(value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    meant = f" (write {'true' if value else 'false'})" if value in (0, 1) else ""
    raise BadRecordError(f"field `label`: expected true or false, got {show(value)}{meant}")


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
            raise BadRecordError(f'field `{name}[{index}].role`: expected "assistant", got {show(message["role"])}')
    if len(messages) > 1:
        raise BadRecordError(f"field `{name}`: expected one assistant message, got {len(messages)}")
    return messages


def _parse_messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise BadRecordError(f"field `{name}`: expected a string or a list of messages, got {show(value)}")
    if not value:
        raise BadRecordError(f"field `{name}`: empty")
    return [_parse_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _parse_message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise BadRecordError(f"field `{name}`: expected an object with role and content, got {show(value)}")
    role = value.get("role")
    if role not in _ROLES:
        raise BadRecordError(f"field `{name}.role`: expected one of {', '.join(_ROLES)}, got {show(role)}")
    for key in _CARRY:
        if value.get(key) not in EMPTY:
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
            raise BadRecordError(f"field `{where}`: expected an object with type and text, got {show(part)}")
        if part.get("type") != "text":
            raise BadRecordError(f'field `{where}.type`: expected "text", got {show(part.get("type"))}')
        texts.append(_parse_text(part.get("text"), f"{where}.text"))
    return "".join(texts)


def _parse_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecordError(f"field `{name}`: expected a string, got {show(value)}")
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
