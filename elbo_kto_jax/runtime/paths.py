"""One path, one meaning: what a flag or config key that names files stands for, decided once, before anything is read.

`flags.Flags` and `config.from_mapping` give every path to `resolve`; whoever gets one from them uses it as it is.
"""

import ast
import contextlib
import os
import re
from pathlib import Path
from typing import Any

from elbo_kto_jax.runtime.errors import UserError

_ADDRESS = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*)://")


def resolve(path: str, flag: str) -> str:
    """What `path` means: `~` and `~NAME` at its start are home folders; all else, a hub id too, stays as it is.

    Resolving twice changes nothing. An empty string (nothing is named) stays empty.

    Args:
      path: the value that was given.
      flag: the flag or config key that it was given for, for errors.

    Raises:
      UserError: it is a remote address, its home folder is not known, or libraries would take it for another path.
    """
    if not path:
        return path
    if address := _ADDRESS.match(path):
        shown = re.sub(r"//.*@", "//", path)  # without a password
        raise UserError(f"{flag}={shown}: {address[1]}:// addresses are not supported; name a path of this machine")
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
