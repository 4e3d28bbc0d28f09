"""log.txt of a working folder: what the log on the terminal says, with times, one start after the other."""

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.runtime.files import writing
from elbo_kto_jax.runtime.terminal import Formatter

LOG = "log.txt"


class RunLog(logging.Handler):
    """Keeps lines in memory until it is known that the folder is this run's, and writes them from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
        self._early: list[str] = []
        self._file: TextIO | None = None

    def begin(self, file: Path, first: str) -> None:
        """Goes on with `file`: `first`, and what was said so far.

        Raises:
          UserError: it cannot be written.
        """
        with writing(file):
            number = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._file = os.fdopen(number, "a", encoding="utf-8", errors="backslashreplace")
        early, self._early = self._early, []
        self.say(first)
        for line in early:
            self._write(line)

    def say(self, text: str) -> None:
        """Adds a line that the terminal shows in another way, or not at all."""
        self.handle(logging.LogRecord(__name__, logging.INFO, "", 0, text, None, None))

    def emit(self, record: logging.LogRecord) -> None:
        self._write(self.format(record))

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None
        super().close()

    def _write(self, line: str) -> None:
        if self._file is None:
            self._early.append(line)
            return
        with contextlib.suppress(OSError):  # a full disk ends the run where its results are written
            self._file.write(f"{line}\n")
            self._file.flush()


@contextlib.contextmanager
def recording() -> Iterator[RunLog]:
    """Within it the log goes to the handler that is yielded, too, and so does what ends it."""
    handler = RunLog()
    logging.getLogger().addHandler(handler)
    try:
        yield handler
    except BaseException as error:
        handler.say(_ending(error))
        raise
    else:
        handler.say("done")
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _ending(error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return f"interrupted: {error.args[0] if error.args else ''}"
    return "".join(traceback.format_exception(error)).rstrip()
