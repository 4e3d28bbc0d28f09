"""One file of safetensors: the length of a JSON object, the object, which says where each tensor lies, and the data.

The library opens and checks a file; where the bytes of a tensor start, and the header of a new file, are our own.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # importing it makes numpy and safetensors know bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError

_MOST_HEADER_BYTES = 10**8  # the library reads no longer ones
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
DTYPE_NAMES = tuple(dtype.name for dtype in DTYPES.values())


def open_file(file: Path) -> safe_open:
    """The file, whose header has been read and checked.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        if not paths.is_remote(file):
            return safe_open(file, framework="numpy")
        with tempfile.NamedTemporaryFile("w+b", prefix="elbo_kto_jax_") as stand_in:
            stand_in.write(_header(file))  # and a hole in the place of the data
            stand_in.truncate(file.stat().st_size)
            stand_in.flush()
            return safe_open(stand_in.name, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> UserError:
    """The error for a file that cannot be read because of `error`."""
    return UserError(f"{file}: damaged or incomplete safetensors file ({error}); download or copy it again")


def data_offsets(file: Path) -> dict[str, int]:
    """Where the bytes of each tensor start in a safetensors file that has been opened, and so checked, before.

    The library tells neither this nor lets one read into memory that is there already.
    """
    content = _header(file)
    header = json.loads(content[8:])
    return {name: len(content) + tensor["data_offsets"][0] for name, tensor in header.items() if name != "__metadata__"}


def _header(file: Path) -> bytes:
    """The length of the JSON object, and the object; the end of the file, where that comes first."""
    with file.open("rb") as opened:
        length = opened.read(8)
        return length + opened.read(min(int.from_bytes(length, "little"), _MOST_HEADER_BYTES))


def header_of(tensors: Mapping[str, jax.ShapeDtypeStruct], metadata: Mapping[str, str] | None = None) -> bytes:
    """What stands before the data of a safetensors file: the length of a JSON object, and where each tensor lies.

    `metadata`: what the file says of itself beside that.
    """
    dtypes, end = {dtype: name for name, dtype in DTYPES.items()}, 0
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    for name, tensor in tensors.items():
        start, end = end, end + tensor.size * tensor.dtype.itemsize
        header[name] = {"dtype": dtypes[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    return len(text).to_bytes(8, "little") + text
