"""Writing files so that no reader ever sees a part of one, what keeps them from being written, reading ahead, and
strict JSON."""

import concurrent.futures
import contextlib
import errno
import functools
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from elbo_kto_jax.runtime import bucket_errors, paths
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

    The temporary file is new and its name cannot be guessed, so that nobody can have put a link in its place. An
    object in a bucket appears whole by itself.

    Raises:
      UserError: the disk is full, the folder is read-only and the like; what was there before is still there.
    """
    path, content = paths.at(path), _to_utf8(content) if isinstance(content, str) else content
    if paths.is_remote(path):
        with writing(path):
            path.write_bytes(content)
        return
    temporary = path.with_name(f".elbo_kto_jax-{secrets.token_hex(8)}{_TEMPORARY}")
    with writing(path):
        _refuse_special(path, "")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def remove_tree(folder: Path, *, ignore_errors: bool = False) -> None:
    """Removes a folder and all below it, not what a link points to."""
    if not paths.is_remote(folder):
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return
    with contextlib.suppress(*((OSError, UserError) if ignore_errors else ())):
        folder.rmtree(missing_ok=ignore_errors)  # type: ignore[attr-defined]


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in no particular order."""
    if paths.is_remote(folder):
        yield from folder.files()  # type: ignore[attr-defined]
    else:
        yield from (path for path in folder.rglob("*") if not path.is_dir())


def is_taken(path: str | os.PathLike) -> bool:
    """Whether there is anything at `path`, a link that points nowhere included."""
    return paths.at(path).exists() if paths.is_remote(path) else os.path.lexists(path)


def unfinished_mark(folder: Path) -> Path:
    """The object beside a folder in a bucket that says that the folder is being written, or was when its writer ended.

    A bucket cannot rename a folder into its place once it is whole.
    """
    return folder.with_name(f".{folder.name}.unfinished")


def is_unfinished(path: str | os.PathLike) -> bool:
    """Whether the folder at `path` is in a bucket and not whole."""
    folder = paths.at(path)
    return paths.is_remote(path) and len(folder.parts) > 3 and unfinished_mark(folder).exists()


def replace_folder(partial: Path, folder: Path) -> None:
    """Puts a folder that is whole in the place of `folder`, and of what was there.

    In a bucket the objects are copied within the store, one by one; until all are there, `is_unfinished` says so.
    """
    if not paths.is_remote(folder):
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        return
    mark = unfinished_mark(folder)
    atomic_write(mark, "this folder is not whole: run again the command that writes it\n")
    remove_tree(folder, ignore_errors=True)
    for file in partial.files():  # type: ignore[attr-defined]
        file.copy_to(folder / str(file.relative_to(partial)))
    remove_tree(partial, ignore_errors=True)
    mark.unlink()


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
        if paths.is_remote(path):
            with bucket_errors.trouble_as_user_error(path):
                raise
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
    if paths.is_remote(path):
        _check_remote(paths.at(path), flag)
        return
    path = Path(path).absolute()
    _refuse_special(path, f"{flag}=")
    if _UNFINISHED in path.name:
        raise UserError(f"{flag}={path}: {_UNFINISHED} marks unfinished checkpoints; choose another name")
    try:
        above = next(folder for folder in (path, *path.parents) if folder.exists())
    except OSError as error:
        raise UserError(f"{flag}={path}: {error.strerror}; choose another name") from None
    if above != path and above.is_file():
        raise UserError(f"{flag}={path}: {above} is a file, not a folder; choose another name")
    above = above if above.is_dir() else above.parent  # a file is replaced, not written to
    if not os.access(above, os.W_OK):
        raise UserError(f"{flag}={path}: {above} cannot be written to; choose another folder or change its permissions")


def _check_remote(path: Path, flag: str) -> None:
    """`check_writable` of an address: writes a small object beside `path` and removes it."""
    if _UNFINISHED in path.name:
        raise UserError(f"{flag}={path}: {_UNFINISHED} marks unfinished checkpoints; choose another name")
    try:
        _try_writing(path if len(path.parts) == 3 else path.parent)
    except UserError as error:
        raise UserError(f"{flag}={path}: {str(error).partition(': ')[2]}") from error
    except (NotImplementedError, ValueError, OSError) as error:  # http:// and the like
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{flag}={path}: cannot be written ({reason[:200]}); choose another place") from error


@functools.cache  # once for all files of a folder
def _try_writing(folder: Path) -> None:
    probe = folder / f".elbo_kto_jax-{secrets.token_hex(8)}{_TEMPORARY}"
    probe.write_bytes(b"")
    probe.unlink(missing_ok=True)


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
