"""Paths in buckets (gs://, s3:// and what else fsspec opens), with the methods of pathlib.

An object appears whole or not at all, and is replaced whole, so one write is what a write and a rename are on a disk.
There are no folders, only names with slashes; no renaming of many objects at once; no appending and no locks: see
`files.replace_folder`, spool.py and lease.py for what takes their place.
"""

import concurrent.futures
import contextlib
import fnmatch
import functools
import io
import logging
import os
import pathlib
import re
import sys
from collections.abc import Generator
from typing import Any

from etils import epath
from etils.epath import backend, stat_utils

from elbo_kto_jax.runtime.bucket_errors import trouble_as_user_error
from elbo_kto_jax.runtime.errors import UserError

# The same library for Orbax, and the plain protocol, as TensorStore has it, which needs no rights besides those on
# objects. Both are read when the libraries are imported.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}  # scheme -> extra of this package that brings its library
_SECONDS_OF_SILENCE = 30  # after which a request counts as failed
_REQUESTS = 16  # at the same time
_PosixGPath: Any = epath.Path("gs://bucket").__class__
COMMIT = "commit_success.txt"  # the last object that Orbax writes into a folder of a bucket


class _Address(_PosixGPath, pathlib.PosixPath):
    """The name of a place in a bucket; its parts are "/", "gs", "BUCKET", "NAME"."""

    if sys.version_info < (3, 12):

        def __new__(cls, *parts: str | os.PathLike) -> Any:
            return pathlib.PosixPath.__new__(cls, _rooted(*parts))

    else:

        def __init__(self, *parts: str | os.PathLike) -> None:
            pathlib.PosixPath.__init__(self, _rooted(*parts))

    @property
    def _uri_scheme(self) -> str | None:
        parts = self.parts
        return parts[1] if len(parts) > 1 and parts[0] == "/" else None  # what `relative_to` gives has none

    @property
    def _backend(self) -> backend.Backend:
        return backend.fsspec_backend  # never TensorFlow's, where that is installed

    @property
    def _files(self) -> Any:
        return filesystem(self.parts[1])

    def is_symlink(self) -> bool:
        return False

    def resolve(self, strict: bool = False) -> Any:
        return self

    def absolute(self) -> Any:
        return self

    def expanduser(self) -> Any:
        return self

    def rename(self, target: Any) -> Any:
        raise io.UnsupportedOperation(f"{self}: a bucket renames nothing; see files.replace_folder")

    replace = rename


class BucketPath(_Address):
    """A path such as gs://BUCKET/NAME: a pathlib.Path for this package and an etils.epath.Path for Orbax.

    Methods raise UserError, of one line, where credentials, bucket or rights are missing or the server fails or is not
    there for so long that the libraries stop trying: half a minute where it answers, a few minutes where it is silent.
    """

    def _info(self) -> dict[str, Any] | None:
        if len(self.parts) == 3:  # a bucket: it may be used without the right to ask for it
            return {"type": "directory", "size": 0}
        with trouble_as_user_error(self):
            try:
                return self._files.info(str(self))
            except FileNotFoundError:
                return None

    def exists(self) -> bool:
        return self._info() is not None

    def is_dir(self) -> bool:
        found = self._info()
        return found is not None and found["type"] == "directory"

    def is_file(self) -> bool:
        found = self._info()
        return found is not None and found["type"] == "file"

    def is_symlink(self) -> bool:
        return False

    def stat(self, *, follow_symlinks: bool = True) -> "BucketStat":
        found = self._info()
        if found is None:
            raise FileNotFoundError(2, "No such object", str(self))
        return BucketStat(found["type"] == "directory", int(found["size"] or 0), 0)

    def iterdir(self) -> Generator["BucketPath", None, None]:
        """A folder that is not there is an empty one."""
        with trouble_as_user_error(self):
            try:
                names = self._files.ls(str(self), detail=False)
            except FileNotFoundError:
                return
        for name in names:
            child = self / name.rstrip("/").rpartition("/")[2]
            if child.name and name.rstrip("/").count("/") > len(self.parts) - 3:  # not the folder's own placeholder
                yield child

    def files(self) -> list["BucketPath"]:
        """Every object below this folder, sorted."""
        return [self / name for name in sorted(self.sizes())]

    def sizes(self) -> dict[str, int]:
        """The bytes of every object below this folder, by its name there."""
        with trouble_as_user_error(self):
            found = self._files.find(str(self), detail=True)
        root = f"{str(self).partition('://')[2]}/"
        return {name.removeprefix(root): int(one["size"]) for name, one in found.items() if name.startswith(root)}

    def glob(self, pattern: str) -> Generator["BucketPath", None, None]:
        """Of patterns without **."""
        first, _, rest = pattern.partition("/")
        for child in sorted(self.iterdir()) if re.search(r"[*?\[]", first) else [self / first]:
            if fnmatch.fnmatchcase(child.name, first) or child.name == first:
                yield from child.glob(rest) if rest else ([child] if child.exists() else [])

    def rglob(self, pattern: str) -> Generator["BucketPath", None, None]:
        yield from (file for file in self.files() if fnmatch.fnmatchcase(file.name, pattern))

    def open(self, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None):
        """Reads the object piece by piece as it is asked for, or ("wb") writes it: it appears when it is closed."""
        if mode not in ("r", "rb", "wb"):
            raise ValueError(f"{self}: objects are read, or written as a whole, not opened with {mode!r}")
        with trouble_as_user_error(self):
            opened = _Told(self, self._files.open(str(self), mode if "b" in mode else f"{mode}b"))
        buffered = opened if mode == "wb" else io.BufferedReader(opened, 2**20)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

    def read_bytes(self) -> bytes:
        return self.read_range(None, None)

    def read_range(self, start: int | None, stop: int | None) -> bytes:
        """The bytes from `start` to `stop` of the object."""
        with trouble_as_user_error(self):
            try:
                return self._files.cat_file(str(self), start=start, end=stop)
            except FileNotFoundError:
                raise FileNotFoundError(2, "No such object", str(self)) from None

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, content: Any) -> int:
        self._pipe(bytes(content), "overwrite")
        return len(content)

    def create(self, content: bytes) -> None:
        """Writes an object that is not there yet.

        Raises:
          FileExistsError: it is there, perhaps of this very call, whose answer was lost.
        """
        self._pipe(content, "create")

    def _pipe(self, content: bytes, mode: str) -> None:
        with trouble_as_user_error(self):
            try:
                self._files.pipe_file(str(self), content, mode=mode)
            except FileNotFoundError as error:
                raise UserError(f"{self}: there is no bucket {self.parts[2]}; create it or correct the name") from error

    def write_text(self, data: str, encoding: Any = None, errors: Any = None, newline: Any = None) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def unlink(self, missing_ok: bool = False) -> None:
        with trouble_as_user_error(self):
            try:
                self._files.rm_file(str(self))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing is to be made; a bucket is made by its owner."""
        if not exist_ok and self.exists():
            raise FileExistsError(17, "File exists", str(self))

    def rmdir(self) -> None:
        """Nothing is to be removed: a folder without objects is not there."""

    def rmtree(self, missing_ok: bool = False) -> None:
        """Removes every object below; the one that says that Orbax finished comes first, so that no half is read."""
        files = self.files()
        if not files and not missing_ok:
            raise FileNotFoundError(2, "No such folder", str(self))
        for mark in [file for file in files if file.name == COMMIT]:
            mark.unlink(missing_ok=True)
        rest = [file for file in files if file.name != COMMIT]
        with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:  # fsspec's own removal takes names for patterns
            list(pool.map(lambda file: file.unlink(missing_ok=True), rest))

    def copy_to(self, target: "BucketPath") -> None:
        """Copies the object within the store, without reading it here."""
        with trouble_as_user_error(target):
            self._files.cp_file(str(self), str(target))


class BucketStat(stat_utils.StatResult):
    """Of etils, and of os as far as this package asks for it."""

    @property
    def st_size(self) -> int:
        return self.length


class _Told(io.RawIOBase):
    """An opened object whose errors are told as those of its path."""

    def __init__(self, path: BucketPath, opened: Any):
        super().__init__()
        self._path, self._opened = path, opened

    def readable(self) -> bool:
        return self._opened.readable()

    def writable(self) -> bool:
        return self._opened.writable()

    def seekable(self) -> bool:
        return self._opened.readable()

    def readinto(self, buffer: Any) -> int:
        with trouble_as_user_error(self._path):
            part = self._opened.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def write(self, content: Any) -> int:
        with trouble_as_user_error(self._path):
            return self._opened.write(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._opened.seek(offset, whence)

    def tell(self) -> int:
        return self._opened.tell()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None and self.writable():  # what was written so far must not become an object
            with contextlib.suppress(Exception):
                self._opened.discard()
            self._opened.closed = True
        super().__exit__(kind, *rest)

    def close(self) -> None:
        if not self.closed:
            with trouble_as_user_error(self._path):
                self._opened.close()
        super().close()


def _rooted(*parts: str | os.PathLike) -> str:
    """/gs/BUCKET/NAME of parts of which the first may begin with gs://."""
    whole = "/".join(os.fspath(part) for part in parts)
    scheme, mark, rest = whole.partition("://")
    return f"/{scheme}/{rest}" if mark else whole


@functools.cache
def filesystem(scheme: str) -> Any:
    """The fsspec file system of a scheme. Listings are never kept, for other processes write, too.

    Raises:
      UserError: the library that opens such addresses is not installed.
    """
    import fsspec

    for library in (
        "gcsfs",
        "s3fs",
        "aiobotocore",
        "botocore",
        "google.auth",
    ):  # they log what they raise, with tracebacks
        logging.getLogger(library).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("gs", "gcs"):
        import aiohttp

        silence = aiohttp.ClientTimeout(total=None, sock_connect=_SECONDS_OF_SILENCE, sock_read=_SECONDS_OF_SILENCE)
        options["requests_timeout"] = silence
        if _point_at_one_server():
            options["token"] = "anon"
        fsspec.config.conf.update(dict.fromkeys(("gs", "gcs"), options))  # for the one that Orbax makes
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        how = f"pip install 'elbo_kto_jax[{extra}]'" if extra else "install the library that fsspec names"
        raise UserError(f"{scheme}:// needs a library that is not installed ({error}); {how}") from None


def _point_at_one_server() -> bool:
    """Whether it is an emulator.

    Orbax reaches a bucket through fsspec and TensorStore: an emulator that is set for one is set for both.
    """
    host = os.environ.get("STORAGE_EMULATOR_HOST", "")
    is_emulator = host not in ("", "default")
    if is_emulator:
        address = host if "://" in host else f"http://{host}"
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", address)
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")  # or it looks for real credentials
    return is_emulator
