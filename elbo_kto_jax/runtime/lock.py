"""One command at a time in a folder: a lock that the kernel gives back when its owner ends, however it ends.

The lock is `flock` on a small file, which says who holds it. Folders that are only read are held by many at once
(`read`), with `flock` on the folder itself. Linux passes it on to NFS servers, so it holds between
machines as well; where a file system knows no locks, only a living process on the same machine is recognised.
In a bucket it is a lease that its holder renews (lease.py).
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from elbo_kto_jax.runtime import lease, paths, processes
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import check_writable, remove_tree, writing

log = logging.getLogger(__name__)
LOCK_FILE = ".lock"  # in a folder that stays
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()  # open files of this process
_read: dict[str, int] = {}  # folder that this process reads -> its open file


@contextlib.contextmanager
def inside(folder: str | os.PathLike, flag: str) -> Iterator[None]:
    """Holds the lock on a folder in which a command keeps its work. `flag` named it, for messages.

    The processes of one job share the lock: process 0 takes it for all.

    Raises:
      UserError: another command holds it, who says the message; or it cannot be taken.
    """
    folder = _usable(folder, flag)
    if paths.is_remote(folder):
        with lease.hold(folder / LOCK_FILE, f"{flag}={folder}"):
            yield
        return
    with _hold(folder / LOCK_FILE, f"{flag}={folder}"):
        yield


def check_free(folder: str | os.PathLike, flag: str) -> None:
    """Checks that `inside` would get its lock, and leaves nothing there.

    Raises:
      UserError: as `inside`.
    """
    folder = _usable(folder, flag)
    file = folder / LOCK_FILE
    if paths.is_remote(folder):
        lease.check_free(file, f"{flag}={folder}")
        return
    try:
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as error:  # a link
        raise _unusable(file, error.strerror or str(error)) from None
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if refusal := _refusal(error, _read_holder(opened), file, f"{flag}={folder}"):
            raise refusal from None
    finally:
        os.close(opened)


def _usable(folder: str | os.PathLike, flag: str) -> Path:
    """Raises UserError where there can be no folder of that name in which a command keeps its work."""
    folder = paths.at(folder)
    check_writable(folder, flag)
    if folder.is_file():  # asked once: another command may be removing the folder
        raise UserError(f"{flag}={folder}: a file, not a folder; choose another name")
    return folder


@contextlib.contextmanager
def beside(path: str | os.PathLike, flag: str) -> Iterator[None]:
    """The same for a file or folder that appears when it is whole: the lock stands beside it."""
    path = paths.at(path).expanduser().absolute()
    check_writable(path, flag)
    if paths.is_remote(path):
        with lease.hold(path.with_name(f".{path.name}{LOCK_FILE}"), f"{flag}={path}"):
            yield
        return
    with _hold(path.with_name(f".{path.name}{LOCK_FILE}"), f"{flag}={path}"):
        yield


@contextlib.contextmanager
def _hold(file: Path, place: str) -> Iterator[None]:
    missing = [folder for folder in file.parents if not folder.exists()]  # the innermost first
    taken: list[int] = []
    processes.first(lambda: taken.append(_take(file, place)))
    try:
        yield
    finally:
        for opened in taken:
            _release(file, opened, missing)


def _release(file: Path, opened: int, made: list[Path]) -> None:
    """Gives a lock back; removes its file and those of the folders `made` for it in which nothing was written."""
    try:
        with contextlib.suppress(OSError):
            file.unlink()  # while it is held: who opened it before sees that it is gone
    finally:
        _held.discard(opened)
        os.close(opened)
    for folder in made:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


def _take(file: Path, place: str) -> int:
    """Opens and locks `file`, writes into it who holds it, and returns the open file."""
    while True:
        opened = _open(file)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if refusal := _refusal(error, _read_holder(opened), file, place):
                os.close(opened)
                raise refusal from None
            log.warning("%s: this file system has no locks: let no other command write there meanwhile", place)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(opened), os.stat(file)):
                break
        os.close(opened)  # its former holder removed it in between
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    _held.add(opened)
    try:
        with writing(file):
            os.ftruncate(opened, 0)
            os.pwrite(opened, json.dumps(holder).encode(), 0)
            os.fsync(opened)
    except BaseException:  # a full disk, say: nothing is held then
        _release(file, opened, [])
        raise
    return opened


def _refusal(error: OSError, holder: dict, file: Path, place: str) -> UserError | None:
    """What to raise where the `error` with which a lock was not given, or its holder, says that it is held."""
    has_locks = error.errno not in _NO_LOCKS
    if not has_locks and not _is_alive(holder):
        return None
    remedy = "" if has_locks else f", or remove {file} if it has ended"
    return UserError(
        f"{place}: in use by {lease.describe(holder)}; wait until it has ended, or choose another place{remedy}"
    )


def _open(file: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    reason = "not a regular file"
    try:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            opened = os.open(file, flags, 0o666)
        if stat.S_ISREG(os.fstat(opened).st_mode):
            return opened
        os.close(opened)
    except OSError as error:  # a link
        reason = error.strerror or str(error)
    raise _unusable(file, reason)


def _unusable(file: Path, reason: str) -> UserError:
    return UserError(f"{file}: cannot be used as a lock ({reason}); remove it")


def _read_holder(opened: int) -> dict:
    try:
        return dict(json.loads(os.pread(opened, 1000, 0)))
    except (OSError, ValueError, TypeError):  # taken a moment ago
        return {}


def _is_alive(holder: dict) -> bool:
    """Whether the holder is a process of this machine that has not ended."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return holder["pid"] != os.getpid()


@contextlib.contextmanager
def waiting(file: Path, what: str) -> Iterator[bool]:
    """Holds the lock on `file`, after having waited for who holds it; False: this file system knows no locks.

    `what` is being waited for, for the log.

    Raises:
      UserError: the file cannot be made.
    """
    opened = _open(file)
    _held.add(opened)
    has_locks = True
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            has_locks = error.errno not in _NO_LOCKS
            if has_locks:
                log.info("waiting: %s", what)
                fcntl.flock(opened, fcntl.LOCK_EX)
        yield has_locks
    finally:
        _held.discard(opened)
        os.close(opened)


def read(folder: str | os.PathLike) -> bool:
    """Holds a folder until this process ends, so that no other removes it with `remove`; False: it is gone.

    In a bucket nothing is held: what is removed while it is read does not have the sizes and digests that it must have.
    """
    if paths.is_remote(folder):
        return paths.at(folder).is_dir()
    name = os.path.realpath(folder)
    if name in _read and _is_at(_read[name], name):
        return True
    _close_read(name)
    try:
        opened = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:  # who may not list it may still read the files in it
        return True
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(opened, fcntl.LOCK_SH)  # waits while it is being removed
    _read[name] = opened
    return _is_at(opened, name)


def remove(folder: str | os.PathLike, under: str | os.PathLike) -> bool:
    """Removes a folder as a whole: it is renamed to `under` first. False: another process reads it, and it stays.

    Raises:
      OSError: it cannot be renamed. What then cannot be deleted is left at `under`.
    """
    if paths.is_remote(folder):  # what is left of it when this is killed is an unfinished save (BucketPath.rmtree)
        remove_tree(paths.at(folder))
        return True
    _close_read(os.path.realpath(folder))
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(opened)
            return False
    try:
        os.rename(folder, under)
        shutil.rmtree(under, ignore_errors=True)
    finally:
        os.close(opened)
    return True


def _close_read(name: str) -> None:
    if name in _read:
        os.close(_read.pop(name))


def _is_at(opened: int, name: str) -> bool:
    """Whether the open folder is still the one of that name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(opened), os.stat(name))
    return False


def _close_in_child() -> None:
    """A forked child must not keep what its parent holds: it may outlive it."""
    while _held:
        os.close(_held.pop())
    while _read:
        os.close(_read.popitem()[1])


os.register_at_fork(after_in_child=_close_in_child)
