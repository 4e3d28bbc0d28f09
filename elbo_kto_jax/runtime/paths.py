"""One path, one meaning: what a flag or config key that names files stands for, decided once, before anything is read.

`flags.Flags` and `config.from_mapping` give every path to `resolve`; whoever gets one from them opens it with `at`,
which knows paths of this machine and addresses in buckets (buckets.py).
"""

import ast
import contextlib
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from elbo_kto_jax.runtime.errors import UserError

_ADDRESS = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*)://")
_HERE = ("file", "local", "memory", "data")  # schemes of fsspec that are no places for files of others


def resolve(path: str, flag: str) -> str:
    """What `path` means: `~` and `~NAME` at its start are home folders; all else, a hub id too, stays as it is.

    Resolving twice changes nothing. An empty string (nothing is named) stays empty. An address in a bucket
    (gs://BUCKET/NAME, s3://BUCKET/NAME) loses a slash at its end.

    Args:
      path: the value that was given.
      flag: the flag or config key that it was given for, for errors.

    Raises:
      UserError: it is an address that cannot be opened, its home folder is not known, or libraries would take it for
        another path.
    """
    if not path:
        return path
    if address := _ADDRESS.match(path):
        return _address(path, address[1], flag)
    path = _at_home(path, flag)
    if str(Path(path)).startswith("~"):  # ./~ is a folder here, and without the dot it would be a home folder
        path = os.path.abspath(path)
    whole = os.path.abspath(path)
    if "\0" in path:
        raise UserError(f"{flag}={path}: a null character cannot be part of a path")
    try:
        same = os.fsencode(whole) == whole.encode()
    except UnicodeEncodeError:
        same = False
    if not same:
        raise UserError(
            f"{flag}={path}: not UTF-8 text, or Python reads names otherwise; rename it, or set PYTHONUTF8=1"
        )
    for taken, meant in (("\\", "a slash"), ("gs:/", "a bucket")):
        if taken in f"{whole}/":
            raise UserError(f"{flag}={path}: {taken} in a path is {meant} to TensorStore; rename it")
    return path


def _address(path: str, scheme: str, flag: str) -> str:
    """The address `path` in its one form."""
    import fsspec

    rest = path.partition("://")[2]
    shown = f"{flag}={re.sub(r'//.*@', '//', path)}"  # without a password
    if "@" in rest.partition("/")[0] and scheme not in ("abfs", "abfss"):
        raise UserError(f"{shown}: credentials do not belong into an address; set them as the library of {scheme} says")
    if not path.startswith(scheme) or scheme != scheme.lower():
        raise UserError(f"{shown}: write {scheme.lower()}:// in small letters, with nothing before it")
    if scheme in _HERE or scheme not in fsspec.available_protocols():
        raise UserError(
            f"{shown}: {scheme}:// addresses are not supported; name a path of this machine, gs:// or s3://"
        )
    if any(ord(char) < 32 or char == "\\" for char in rest) or not rest.isprintable():
        raise UserError(f"{shown}: control characters and \\ cannot be part of an address; rename it")
    name = rest.rstrip("/")
    if not name or any(part in ("", ".", "..") for part in name.split("/")):
        raise UserError(f"{shown}: expected {scheme}://BUCKET/NAME, without empty parts, . and ..")
    return f"{scheme}://{name}"


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` is an address in a bucket and the like, not a path of this machine."""
    return _ADDRESS.match(os.fspath(path)) is not None


def at(path: str | os.PathLike) -> Path:
    """`path`, which was resolved, to be opened: its methods are those of pathlib.Path wherever it lies."""
    if not is_remote(path):
        return Path(path)
    from elbo_kto_jax.runtime.buckets import BucketPath

    return BucketPath(path)


def here(path: str | os.PathLike, flag: str) -> Path:
    """`path`, which must be one of this machine: a library opens it, or it is a command for trying things out.

    Raises:
      UserError: it is an address.
    """
    if is_remote(path):
        raise UserError(f"{flag}={path}: this needs a path of this machine, and takes no address")
    return Path(path)


def place(path: str | os.PathLike) -> str:
    """One name for the place of `path`: absolute, links followed."""
    return os.fspath(path) if is_remote(path) else os.path.realpath(path)


def join(folder: str | os.PathLike, *parts: str) -> str:
    """A path below `folder`."""
    return (posixpath if is_remote(folder) else os.path).join(os.fspath(folder), *parts)


def refuse_checkpoints(path: str | os.PathLike, flag: str) -> None:
    """Checks that checkpoints can be written below `path`.

    Raises:
      UserError: it is an address to which Orbax writes none.
    """
    if is_remote(path) and not os.fspath(path).startswith("gs://"):
        scheme = os.fspath(path).partition("://")[0]
        raise UserError(
            f"{flag}={path}: checkpoints cannot be written to {scheme}://, nor read from there (Orbax knows gs:// and "
            "disks); name such a place, and copy what is finished. Records, prompts, results, reports and published "
            f"folders may be in {scheme}://"
        )


def resolve_all(paths: str, flag: str) -> str:
    """`resolve` of every part of a list with commas."""
    return ",".join(resolve(path.strip(), flag) for path in paths.split(","))


def resolve_sources(value: Any, flag: str) -> str | list[str]:
    """`resolve` of a data set's name, or of each of a list of names; such a list may also be written as Python's text.

    A list of one is that one.

    Raises:
      UserError: it is neither; or see `resolve`.
    """
    if isinstance(value, str) and value[:1] in ("[", "(") and not os.path.exists(value):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    if isinstance(value, str):
        return resolve(value, flag)
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, str) and one for one in value):
        raise UserError(f"{flag}: expected the name of a data set, or a list of such names, got {str(value)[:100]}")
    found = [resolve(one, flag) for one in value]
    return found if len(found) > 1 else found[0]


def home_folder(name: str = "~") -> str | None:
    """The absolute path of a home folder (`~` or `~NAME`), or None where the system does not know it."""
    if name == "~" and not os.path.isabs(os.environ.get("HOME", "/")):  # HOME=~ or an empty one
        return None
    folder = os.path.expanduser(name)
    return folder if os.path.isabs(folder) else None


def _at_home(path: str, flag: str) -> str:
    name, slash, rest = path.partition("/")
    if not name.startswith("~"):
        return path
    home = home_folder(name)
    if home is None:
        why = "HOME is not an absolute path" if name == "~" and "HOME" in os.environ else "there is no such home folder"
        raise UserError(f"{flag}={path}: {name}: {why}; write the path out (a folder of that name here: ./{name})")
    return home.rstrip("/") + slash + rest or "/"
