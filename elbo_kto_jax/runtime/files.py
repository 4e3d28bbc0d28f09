"""Writing files so that no reader ever sees a part of one, what keeps them from being written, reading ahead, and
strict JSON."""

import concurrent.futures
import contextlib
import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from elbo_kto_jax.runtime.errors import UserError

Item = TypeVar("Item")
_TROUBLE = {  # what the user can do something about, and no fault of the program
    *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS),
}

_TEMPORARY = ".tmp"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax is writing


def to_json(value: Any) -> str:
    """One line of strict JSON; NaN and infinities become null, since JSON has no word for them.

    Half of a surrogate pair, which UTF-8 cannot carry, is written as JSON's escape for it.
    """
    return _to_utf8(json.dumps(_strict(value), ensure_ascii=False)).decode()


def _to_utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _strict(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(k): _strict(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_strict(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return _strict(x.item()) if hasattr(x, "item") else x


def from_json(text: str | bytes) -> Any:
    """What the JSON says.

    Raises:
      ValueError: it is not JSON, or nested or long beyond what Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; the next one is made in a thread while the present one is used."""
    end: Any = object()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        following: concurrent.futures.Future[Item] = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item


def atomic_write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file (text as UTF-8) under a temporary name and renames it, so that no reader ever sees a part of it.

    The temporary file is new and its name cannot be guessed, so that nobody can have put a link in its place.

    Raises:
      UserError: the disk is full, the folder is read-only and the like; what was there before is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".elbo_kto_jax-{secrets.token_hex(8)}{_TEMPORARY}")
    with writing(path):
        _refuse_special(path, "")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(_to_utf8(content) if isinstance(content, str) else content)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def is_leftover(path: Path) -> bool:
    """Whether `path` is what a killed process left of `atomic_write`."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Within it, errors that say why nothing can be written at `path` become one line.

    Raises:
      UserError: see there.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = trouble(error)
        if not reason:
            raise
        raise UserError(
            f"{path}: cannot be written ({reason}); make room or choose another folder, then run the same command "
            "again: what was finished before is intact"
        ) from error


def trouble(error: BaseException | None) -> str:
    """What is wrong with the disk, in words, if `error` or what it came from says so; otherwise an empty string.

    TensorStore tells it in the text of a ValueError.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _TROUBLE:
            return f"{error.strerror}: {error.filename}" if error.filename else os.strerror(error.errno)
        found = [os.strerror(code) for code in _TROUBLE if os.strerror(code) in str(error)]
        if found:
            return found[0]
        error = error.__cause__ or error.__context__
    return ""


def check_writable(path: str | os.PathLike, flag: str) -> None:
    """Checks, before hours of work, that `path` can be made: the nearest folder above it that exists is writable.

    Raises:
      UserError: it is not, or `path` is a device and the like.
    """
    path = Path(path).absolute()
    _refuse_special(path, f"{flag}=")
    if _UNFINISHED in path.name:
        raise UserError(f"{flag}={path}: {_UNFINISHED} marks unfinished checkpoints; choose another name")
    try:
        above = next(folder for folder in (path, *path.parents) if folder.exists())
    except OSError as error:
        raise UserError(f"{flag}={path}: {error.strerror}; choose another name") from None
    if above != path and not above.is_dir():
        raise UserError(f"{flag}={path}: {above} is a file, not a folder; choose another name")
    above = above if above.is_dir() else above.parent  # a file is replaced, not written to
    if not os.access(above, os.W_OK):
        raise UserError(f"{flag}={path}: {above} cannot be written to; choose another folder or change its permissions")


def _refuse_special(path: Path, flag: str) -> None:
    """Raises UserError where `path` is no place for a file: a device, a pipe, a socket, or a name of an open file.

    A file that is renamed to its name would take its place.
    """
    place = path
    with contextlib.suppress(OSError):
        place = path.parent / os.readlink(path)
    mode = 0
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
    kinds = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "")
    if any(os.path.realpath(folder).startswith("/proc/") for folder in (path.parent, place.parent)):
        kind = "a name of an open file"  # /dev/stdout, /dev/fd/1
    if kind:
        raise UserError(f"{flag}{path}: {kind}, which no file can replace; name a regular file")
