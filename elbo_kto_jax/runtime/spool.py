"""Files that grow while a command runs: metrics, log, TensorBoard's events.

On a disk they grow in place. In a bucket nothing grows: they are written in a folder of this machine and copied to
their place whole, every SECONDS, before every checkpoint, and at the end. So a run that goes on from a checkpoint finds
every line before it; what a kill takes are lines that the run will write again, and those of the log.
"""

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write

log = logging.getLogger(__name__)
SECONDS = 15.0  # between copies


class Spool:
    """The growing files of a folder."""

    def __init__(self, folder: Path, scratch: Path | None = None):
        """`scratch`: the folder of this machine where they are written; None: they grow in place."""
        self._folder, self._scratch = folder, scratch
        self._copied: dict[Path, tuple[int, int]] = {}  # file -> its size and time
        self._copied_at = time.monotonic()
        self._failed = False

    @property
    def root(self) -> Path:
        """The folder where they are written."""
        return self._scratch or self._folder

    def local(self, name: str) -> Path:
        """The file `name` to append to, with what it had before."""
        file = self.root / name
        if self._scratch is not None and not file.exists() and (self._folder / name).is_file():
            file.write_bytes((self._folder / name).read_bytes())
            self._copied[file] = _state(file)
        return file

    def grown(self) -> None:
        """Copies what has grown, if the last time is long enough ago; what fails is tried again the next time."""
        if self._scratch is None or time.monotonic() - self._copied_at < SECONDS:
            return
        try:
            self.save()
            self._failed = False
        except UserError as error:
            if not self._failed:
                log.warning("%s; the run goes on, and this is tried again", error)
            self._failed = True
        self._copied_at = time.monotonic()

    def save(self) -> None:
        """Copies what has grown.

        Raises:
          UserError: it cannot be written.
        """
        if self._scratch is None:
            return
        for file in sorted(file for file in self._scratch.rglob("*") if file.is_file()):
            state = _state(file)
            if self._copied.get(file) != state:
                atomic_write(self._folder / str(file.relative_to(self._scratch)), file.read_bytes())
                self._copied[file] = state
        self._copied_at = time.monotonic()


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def spooling(folder: Path) -> Iterator[Spool]:
    """The spool of a folder; at the end everything is in its place."""
    if not paths.is_remote(folder):
        yield Spool(folder)
        return
    with tempfile.TemporaryDirectory(prefix="elbo_kto_jax_spool_") as scratch:
        spool = Spool(folder, Path(scratch))
        try:
            yield spool
        except BaseException:
            with contextlib.suppress(UserError):  # what ended the command is said
                spool.save()
            raise
        spool.save()
