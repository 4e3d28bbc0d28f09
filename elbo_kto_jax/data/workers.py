"""Processes that prepare blocks of rows at the same time; what they give comes in the order of the blocks.

They are programs of their own (`data.worker`), not forks, which would inherit the threads and locks of jax, and they
import neither the user's program nor jax.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from elbo_kto_jax.data import portable, worker
from elbo_kto_jax.data.columns import Part
from elbo_kto_jax.data.convert import Text, convert_rows
from elbo_kto_jax.data.portable import TextTokenizer
from elbo_kto_jax.data.rows import Block, to_bytes
from elbo_kto_jax.runtime.errors import UserError

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processors in a period of as many
_PATIENCE = 2.0  # seconds for a process to end by itself
Placed = tuple[Block, tuple[str, str, int]]  # see `convert_rows`


def cores() -> int:
    """The processor cores that this process may use: those that it is bound to, and as many as its container has."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit: "max 100000"
        quota, period = map(int, _QUOTA.read_text(encoding="ascii").split())
        count = min(count, -(-quota // period))
    return count


def convert_all(blocks: Iterable[Placed], tokenizer: TextTokenizer, text: Text, processes: int) -> Generator[Part]:
    """The parts of blocks, in their order.

    Args:
      processes: that do the work; 1: this one.

    Raises:
      UserError: a process was ended.
    """
    if processes == 1:
        # One block goes through the chat template while the one before is tokenised.
        yield from _in_order(blocks, lambda placed: convert_rows(*placed, tokenizer, text), threads=2)
        return
    description = portable.describe(tokenizer)
    pool = [_Worker({"tokenizer": description, "text": dataclasses.asdict(text)}) for _ in range(processes)]
    free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for one in pool:
        free.put(one)

    def convert(placed: Placed) -> Part:
        one = free.get()
        try:
            return one.convert(*placed)
        finally:
            free.put(one)

    try:
        yield from _in_order(blocks, convert, threads=processes)
    finally:
        for one in pool:
            one.close()


def _in_order(items: Iterable[Placed], function: Callable[[Placed], Part], threads: int) -> Iterator[Part]:
    """The function's values, made by threads that are at most two items each ahead of what was taken.

    An error of `items` comes after the values of those before.
    """
    pending: collections.deque[concurrent.futures.Future[Part]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    left, failure = iter(items), None
    try:
        while True:
            try:
                pending.append(pool.submit(function, next(left)))
            except StopIteration:
                break
            except UserError as error:
                failure = error
                break
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """One process of `data.worker`."""

    def __init__(self, first: dict[str, Any]):
        path = [folder for folder in sys.path if folder]
        # -P: the folder of the program is none to import from.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path),
                "RAYON_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        self._first: dict[str, Any] | None = first

    def convert(self, block: Block, place: tuple[str, str, int]) -> Part:
        running = self._process
        if running.stdin is None or running.stdout is None:
            raise RuntimeError("a worker was started without pipes")
        header, content = to_bytes(block)
        try:
            if self._first is not None:
                worker.send(running.stdin, self._first)
                self._first = None
            worker.send(running.stdin, {"block": header, "place": place}, content)
            answer, content = worker.receive(running.stdout)
        except (OSError, EOFError, ValueError):  # it is gone, or going
            raise UserError(
                f"a process that prepares records was ended (status {running.wait()}), maybe for want of memory; "
                "run the same command again, with fewer cores (`taskset`) if it happens again"
            ) from None
        if "failed" in answer:
            raise UserError(answer["failed"])
        return Part.from_bytes(answer, content)

    def close(self) -> None:
        """Ends the process, which then ends its own."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what it was sent last is lost
                if stream is not None:
                    stream.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
