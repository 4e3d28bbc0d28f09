"""The rows of a JSON file: one object a line, or a list of objects. A line has at most MOST_LINE_BYTES."""

import collections
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elbo_kto_jax.data.bad_records import BadRecordError, shorten
from elbo_kto_jax.data.unfold import open_bounded
from elbo_kto_jax.runtime.errors import UserError

MOST_LINE_BYTES = 2**27
_BLANK = re.compile(r"[ \t\r\n]*")


Line = tuple[int, bytes | None]  # number from 1, content; None: too long


def lines(file: Path) -> Iterator[Line]:
    """The lines of a file that are not blank."""
    with open_bounded(file) as content:
        number = 0
        while line := content.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = content.readline(MOST_LINE_BYTES)
                yield number, None
            elif line.strip():
                yield number, line


def decode_line(line: bytes | None) -> Any:
    """The value that a line has.

    Raises:
      BadRecordError: it has none, or nobody knows which.
    """
    if line is None:
        raise BadRecordError(f"a line of more than {MOST_LINE_BYTES} bytes")
    decoder = _Json()
    try:
        value = decoder.decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecordError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise BadRecordError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise BadRecordError(f"not valid JSON: {error}") from None
    if decoder.twice:
        raise BadRecordError(f"field `{shorten(decoder.twice)}`: stands twice in one object")
    return value


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


def list_or_lines(file: Path) -> Iterator[Line]:
    """The texts of a list of objects, numbered as lines are, or lines."""
    with open_bounded(file) as content:
        head = content.read(2**16)
    if layout(head) == "lines":
        yield from lines(file)
        return
    if layout(head) != "list":
        raise UserError(f"{file}: expected a list of records, or one record a line")
    with open_bounded(file) as content:
        try:
            yield from enumerate(_list_rows(content.read().decode("utf-8-sig")), start=1)
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text (byte {error.start + 1})") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
        except (RecursionError, ValueError) as error:
            raise UserError(f"{file}: not valid JSON: {error}") from None


def layout(head: bytes) -> str:
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


def _after_blank(text: str, start: int) -> int:
    """Where the blank from `start` on ends."""
    found = _BLANK.match(text, start)  # the empty one, where there is none
    return found.end() if found else start


def _list_rows(text: str) -> Iterator[bytes]:
    decoder = json.JSONDecoder()
    at = _after_blank(text, _after_blank(text, 0) + 1)
    while text[at : at + 1] != "]":
        _, end = decoder.raw_decode(text, at)
        yield text[at:end].encode()
        at = _after_blank(text, end)
        if text[at : at + 1] == ",":
            at = _after_blank(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("expected , or ]", text, at)
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("expected the end of the file", text, at + 1)
