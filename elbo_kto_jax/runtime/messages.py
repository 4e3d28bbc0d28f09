"""Foreign text in messages: on one line, of bounded length, without control characters, and without secrets."""

import base64
import json
import os
import re
import urllib.parse
from collections.abc import Iterable
from typing import Any

_PART = 8  # characters of a secret that are cut out wherever they stand
_WORD = 3  # characters; a placeholder that is shorter ("-", "x") would turn up in any message
_HIDDEN = "[key]"
_CREDENTIALS = re.compile(r"(?<=//)[^/@\s]*@|\bhf_[A-Za-z0-9]{30,}")  # in an address; tokens of the hub
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)S?$")


def one_line(text: str, limit: int = 300) -> str:
    """`text` on one line, without what a terminal would act on, and at most `limit` characters of it."""
    head = " ".join(text[: 8 * limit].split())  # all of a text of megabytes need not be looked at
    line = "".join(char if char.isprintable() else "\ufffd" for char in head)
    return line if len(line) <= limit and len(text) <= 8 * limit else f"{line[: limit - 1]}…"


def shown(value: Any, limit: int = 100) -> str:
    """A value of the user's for a message: its `repr`, at most `limit` characters of it."""
    try:
        text = repr(value[: 2 * limit] if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists in lists
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class Secrets:
    """Keys and passwords, which are cut out of every text that an endpoint sends: some echo them."""

    def __init__(self, secrets: Iterable[str]):
        """`secrets`: as they stand in headers and addresses; empty ones do not count."""
        forms = {form for secret in secrets if secret for form in _forms(secret)}
        self._forms = sorted(forms, key=len, reverse=True)
        long = [form for form in self._forms if len(form) >= _PART]
        self._whole = re.compile("|".join(map(re.escape, long)) or "(?!)")
        self._short = [form for form in self._forms if _WORD <= len(form) < _PART]
        self._parts = {form[i : i + _PART] for form in long for i in range(len(form) - _PART + 1)}

    def cut_out(self, text: str) -> str:
        """`text` without the secrets. Those of less than 8 characters stay: such a key may be a word ("A", "tie")."""
        return self._whole.sub(_HIDDEN, text)

    def one_line(self, text: str, limit: int = 300) -> str:
        """`one_line` of the text without the secrets, and without parts of them: an endpoint may cut its own text."""
        text = self._without_parts(self.cut_out(text[: 2**16]))
        for form in self._short:
            text = text.replace(form, _HIDDEN)
        return one_line(text, limit)

    def _without_parts(self, text: str) -> str:
        found = [i for i in range(len(text) - _PART + 1) if text[i : i + _PART] in self._parts]
        pieces, end = [], 0
        for start in found:
            if start >= end:
                pieces += [text[end:start], _HIDDEN]
            end = start + _PART
        return "".join([*pieces, text[end:]])


def reason(error: BaseException) -> str:
    """What an error of another library says, on one line: without the keys, tokens and passwords of the environment's
    variables, going by their names, and without those in addresses."""
    return _CREDENTIALS.sub("", _of_environment().one_line(str(error).strip() or type(error).__name__))


def redacted(text: str) -> str:
    """`text` without the keys, tokens and passwords that `reason` leaves out."""
    return _CREDENTIALS.sub("", _of_environment().cut_out(text))


def _of_environment() -> Secrets:
    return Secrets(value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name))


def _forms(secret: str) -> set[str]:
    """A secret as it is, and as it stands in addresses and in JSON."""
    plain = {secret, urllib.parse.unquote(secret)}
    return {form for text in plain for form in (text, urllib.parse.quote(text, safe=""), json.dumps(text)[1:-1])}


def basic_credentials(user: str, password: str) -> str:
    """What the header `Authorization: Basic` says of them."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()
