"""A process that prepares blocks of rows for another one: `data.workers` starts it and talks to it over pipes.

A message is a line of JSON, which says in `size` how many bytes follow it. The first one has the tokenizer and how
texts are read; each of the others is a block, whose answer is a `Part`, or `failed`: why there is none.
"""

import contextlib
import json
import signal
import sys
from typing import IO, Any

from elbo_kto_jax.data.convert import Text, convert_rows
from elbo_kto_jax.data.portable import Portable
from elbo_kto_jax.data.rows import from_bytes
from elbo_kto_jax.runtime.errors import UserError


def send(stream: IO[bytes], header: dict[str, Any], content: bytes = b"") -> None:
    """Writes a message."""
    stream.write(json.dumps({**header, "size": len(content)}).encode() + b"\n")
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Reads a message.

    Raises:
      EOFError: the other side is gone.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    header = json.loads(line)
    size = header.pop("size")
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return header, content


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends with the process that started it
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError):
        first, _ = receive(sys.stdin.buffer)
        tokenizer = Portable(first["tokenizer"])
        text = Text(**{**first["text"], "needs": tuple(first["text"]["needs"])})
        while True:
            header, content = receive(sys.stdin.buffer)
            try:
                part = convert_rows(from_bytes(header["block"], content), tuple(header["place"]), tokenizer, text)
            except UserError as error:
                send(sys.stdout.buffer, {"failed": str(error)})
                continue
            send(sys.stdout.buffer, *part.to_bytes())


if __name__ == "__main__":
    main()
