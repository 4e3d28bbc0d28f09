"""Text for people: what a terminal would obey is spelt out, what is too long is cut, and the streams never fail.

Records, models, judges and file names may hold control sequences that recolour, erase or retype what stands on a
terminal. `say` is the only way in which the package writes text to stdout; `protect_streams` guards stderr as a whole,
for other libraries write there too.
"""

import contextlib
import errno
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

LONGEST_LINE = 1000  # characters of a message for people
_WIDEST = 10_000  # characters of a table's line
_LINES = 2  # of a message; more come from line breaks within values

# C0 and C1 control characters but tab and line feed, what changes the direction of writing, line separators that
# are none of ours, and halves of surrogate pairs (bytes that are not text).
_OBEYED = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_NOT_TEXT = re.compile(f"[{_OBEYED}]")
_NOT_A_BAR = re.compile(f"\x1b\\[A|\r|[{_OBEYED}]")  # progress bars return to the start of the line, or go one up


def printable(text: object) -> str:
    """`text` with what a terminal would obey written as in Python ("\\x1b"); tabs and line breaks stay."""
    return _NOT_TEXT.sub(_spelt, str(text).replace("\r\n", "\n"))


def message(text: object) -> str:
    """`text` as a message of at most two lines: `printable`, and long lines without their middle."""
    lines = printable(text).split("\n")
    if len(lines) > _LINES:
        lines = ["\\n".join(lines)]
    return "\n".join(map(_shortened, lines))


def _shortened(line: str) -> str:
    if len(line) <= LONGEST_LINE:
        return line
    end = LONGEST_LINE // 3  # says what to do
    return f"{line[: LONGEST_LINE - end]} [...] {line[-end:]}"


def _spelt(match: re.Match) -> str:
    return repr(match[0])[1:-1]


def say(text: object) -> None:
    """Prints text on stdout."""
    print(printable(text), flush=True)


def say_json(text: str) -> None:
    """Prints a line of JSON on stdout; what a terminal would obey, or stdout cannot encode, as JSON's own escapes."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text))
    print(_NOT_TEXT.sub(lambda match: f"\\u{ord(match[0]):04x}", text), flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The rows below their header as lines of text, in columns; however wide."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        grid.add_column(Text(name))
    for row in rows:
        grid.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=_WIDEST, color_system=None)
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


class Formatter(logging.Formatter):
    """Log lines: the message alone, printable; every line is cut where it is too long."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(_shortened, printable(super().format(record)).split("\n")))


class _Stream(io.TextIOWrapper):
    """A standard stream whose failures end nothing: what cannot be written is dropped.

    Attributes:
      failure: why something was dropped, unless the reader merely went away; "" if nothing was.
    """

    failure = ""

    def write(self, text: str) -> int:
        try:
            super().write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno != errno.EPIPE:
            self.failure = self.failure or os.strerror(error.errno or errno.EIO)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # what is left in the buffers goes there, and whatever follows
        os.close(null)


class _Errors(_Stream):
    """stderr, on which no text does more than a progress bar."""

    def write(self, text: str) -> int:
        super().write(_NOT_A_BAR.sub(lambda m: m[0] if m[0] in ("\r", "\x1b[A") else _spelt(m), text))
        return len(text)


def protect_streams() -> None:
    """Makes the standard streams of this process ones that never fail a command, closed ones included.

    Bytes on stdin that are not text become halves of surrogate pairs, which the reader refuses.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    stdin: Any = sys.stdin  # a TextIOWrapper
    stdin.reconfigure(errors="surrogateescape", encoding=None if stdin.isatty() else "utf-8")
    before = {sys.stdout: "stdout", sys.stderr: "stderr"}
    sys.stdout, sys.stderr = _protected(sys.stdout, 1, _Stream), _protected(sys.stderr, 2, _Errors)
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for handler in (handler for logger in loggers for handler in getattr(logger, "handlers", ())):
        if isinstance(handler, logging.StreamHandler) and handler.stream in before:
            handler.setStream(getattr(sys, before[handler.stream]))


def stdout_failure() -> str:
    """Why something that was printed is lost, in words; "" if nothing is."""
    return sys.stdout.failure if isinstance(sys.stdout, _Stream) else ""


def _protected(stream: TextIO | io.TextIOBase | None, number: int, kind: type[_Stream]) -> Any:
    """`stream` on the file descriptor `number` as one of `kind`; one that writes elsewhere stays what it is."""
    encoding = "utf-8"
    if stream is not None:
        encoding = stream.encoding
        with contextlib.suppress(OSError):
            stream.flush()
        try:
            elsewhere = isinstance(stream, _Stream) or stream.fileno() != number
        except OSError:  # it is in memory
            elsewhere = True
        if elsewhere:
            return stream
    # One that was closed at the start stays so: another file may have its number by now.
    raw = io.FileIO(os.devnull if stream is None else number, "w", closefd=stream is None)
    return kind(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=number == 2 or raw.isatty())
