"""What is wrong with one record, in words that fit into a message."""

import json
from collections.abc import Callable
from typing import Any

Decode = Callable[[], Any]  # decodes a row, or raises BadRecordError


class BadRecordError(Exception):
    """What is wrong with one record; the reader adds where it stands."""


def shorten(text: str) -> str:
    """A text short enough for a message."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def show(value: Any) -> str:
    """A value as JSON on one line, short enough for a message."""
    try:
        return shorten(json.dumps(value, default=str))
    except (RecursionError, ValueError, TypeError):  # nested too deeply, or with keys that JSON has not
        return f"a {type(value).__name__}"
