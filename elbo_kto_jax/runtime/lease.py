"""One command at a time in a folder of a bucket: an object that says who is at work there, renewed while it lives.

A store creates an object only if there is none, so one of two commands gets it. The kernel does not give it back when
its holder is killed. So the holder writes it anew every RENEW_SECONDS, and who finds one that stays the same for
LEASE_SECONDS takes its place; at once, where the holder was a process of this machine that has ended. Only what a
command itself sees counts, never clocks. A holder that finds another in its place (its machine had stood still) ends.
"""

import contextlib
import datetime
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.errors import UserError

log = logging.getLogger(__name__)
RENEW_SECONDS = 10.0
LEASE_SECONDS = 60.0
_held: set[str] = set()  # ids of the leases of this process
_SETTLE_SECONDS = 1.0  # another command may have found the same holder gone, and put its own lease in the place of ours


@contextlib.contextmanager
def hold(file: Path, place: str) -> Iterator[None]:
    """Holds the lease `file` (of type buckets.BucketPath) on a folder, which `place` names for messages.

    The processes of one job share it: process 0 takes it for all.

    Raises:
      UserError: another command holds it, who says the message; or it cannot be written.
    """
    taken: list[_Lease] = []
    processes.first(lambda: taken.append(_take(file, place)))
    try:
        yield
    finally:
        for lease in taken:
            lease.release()


def check_free(file: Path, place: str) -> None:
    """Checks that `hold` would get the lease, and leaves nothing there.

    Raises:
      UserError: as `hold`.
    """
    if found := _read(file):
        _wait_for_end(file, found, place)


class _Lease:
    """A lease that this process holds; a thread renews it."""

    def __init__(self, file: Path, holder: dict, place: str):
        self._file, self._holder, self._place = file, holder, place
        self._ended = threading.Event()
        _held.add(holder["id"])
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        _held.discard(self._holder["id"])
        with contextlib.suppress(OSError, UserError):
            if _read(self._file).get("id") == self._holder["id"]:
                self._file.unlink(missing_ok=True)

    def _renew(self) -> None:
        count = 0
        while not self._ended.wait(RENEW_SECONDS):
            count += 1
            try:
                if _read(self._file).get("id") not in (self._holder["id"], None):
                    self._leave()
                    return
                self._file.write_bytes(_content(self._holder, count))
            except (OSError, UserError) as error:
                log.warning("%s: the lease is not renewed (%s); trying again", self._place, error)

    def _leave(self) -> None:
        """Ends the process at once: what it would write belongs to another run now."""
        print(f"interrupted: {self._place}: another command has taken it over; this one ends", file=sys.stderr)
        sys.stderr.flush()
        os._exit(75)


def _take(file: Path, place: str) -> _Lease:
    moment = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": moment, "id": secrets.token_hex(8)}
    holder["system"] = _system()
    taking_over = False
    while True:
        with contextlib.suppress(FileExistsError):
            file.create(_content(holder, 0))  # type: ignore[attr-defined]
        if taking_over:
            time.sleep(_SETTLE_SECONDS)
        found = _read(file)
        if found.get("id") == holder["id"]:  # also where the answer to a first try was lost
            return _Lease(file, holder, place)
        if found:
            _wait_for_end(file, found, place)
            taking_over = True
            if _read(file) == found:  # not what another command that found it gone has put there meanwhile
                with contextlib.suppress(FileNotFoundError):
                    file.unlink()


def _wait_for_end(file: Path, found: dict, place: str) -> None:
    """Returns when the holder `found` has ended.

    Raises:
      UserError: it lives.
    """
    if _has_ended(found):
        return
    log.info("%s: waiting up to %d s to see whether %s still lives", place, LEASE_SECONDS, describe(found))
    end = time.monotonic() + LEASE_SECONDS
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, RENEW_SECONDS / 2))
        now = _read(file)
        if not now:
            return
        if now != found:
            raise UserError(f"{place}: in use by {describe(now)}; wait until it has ended, or choose another place")


def _has_ended(holder: dict) -> bool:
    """Whether the holder was a process of this system (and container) that is no more."""
    if holder.get("system") != _system() or not isinstance(holder.get("pid"), int):
        return False
    if holder["pid"] == os.getpid():  # an earlier process of the same number?
        return holder.get("id") not in _held
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _system() -> str:
    """A name of this start of the machine, and of the container in it: process numbers mean something within it."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError):
        names += [
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    return " ".join(names)


def _content(holder: dict, count: int) -> bytes:
    return json.dumps({**holder, "renewed": count}).encode()


def _read(file: Path) -> dict:
    """What the lease says; an empty dictionary where there is none."""
    try:
        return dict(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        return {"damaged": True}


def describe(holder: dict) -> str:
    """Who holds a lock or lease, in words; the file may say anything."""
    if not isinstance(holder.get("pid"), int):
        return "another process"
    host, since = (str(holder.get(key))[:100] for key in ("host", "since"))
    words = f"process {holder['pid'] % 2**32} on {host} since {since}"
    return "".join(char for char in words if char.isprintable())
