"""Opens a file, compressed or not, that may come from anywhere.

Compression must not turn a few bytes into a full memory: what a compressed or Parquet file unfolds to is at most
MOST_UNFOLDED_BYTES or MOST_UNFOLDING times the file.
"""

import io
from pathlib import Path
from typing import Any

from elbo_kto_jax.data.forms import COMPRESSED
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError

MOST_UNFOLDED_BYTES = 2**28
MOST_UNFOLDING = 100


def open_bounded(file: Path) -> io.BufferedIOBase:
    """The content of a file, unfolded where its name says that it is compressed.

    Reading it raises UserError where it unfolds to too much.
    """
    compression = COMPRESSED.get(file.suffix.lower())
    return io.BufferedReader(_Bounded(file, compression), 2**20) if compression else file.open("rb")


class _Bounded(io.RawIOBase):
    """What a compressed file unfolds to, as a stream that ends with an error where it is too much."""

    def __init__(self, file: Path, compression: str):
        import pyarrow

        super().__init__()
        source = file.open("rb") if paths.is_remote(file) else str(file)
        self._file, self._content = file, pyarrow.input_stream(source, compression=compression)
        self._left = most_unfolded(file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._content.read(len(buffer))
        buffer[: len(part)] = part
        self._left -= len(part)
        if self._left < 0:
            raise unfolds_to_too_much(self._file)
        return len(part)

    def close(self) -> None:
        self._content.close()
        super().close()


def most_unfolded(file: Path) -> int:
    """Bytes that a file may unfold to."""
    return max(MOST_UNFOLDED_BYTES, MOST_UNFOLDING * file.stat().st_size)


def unfolds_to_too_much(file: Path) -> UserError:
    """The error about a file that unfolds to more than `most_unfolded`."""
    return UserError(
        f"{file}: its {file.stat().st_size} bytes unfold to more than {most_unfolded(file)}; "
        "if that is meant, write it as .jsonl without compression"
    )
