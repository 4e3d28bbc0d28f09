"""Reading the published form of a checkpoint: a folder of safetensors, config.json and tokenizer.

Nothing is read before it is asked for: opening a folder reads the headers of its safetensors files, and every tensor is
then read slice by slice, so that each process of a mesh reads only what it owns.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.assets import CONFIG_FILE, parse_config, read_assets
from elbo_kto_jax.checkpoints.buffers import Buffers
from elbo_kto_jax.checkpoints.finite import check_finite
from elbo_kto_jax.checkpoints.safetensors_file import DTYPES, INDEX_FILE, SINGLE_FILE, damaged, data_offsets, open_file
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.table import Parameter, TreePath
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError, shown
from elbo_kto_jax.runtime.files import from_json


@dataclasses.dataclass(frozen=True)
class HuggingFaceFolder:
    """An opened folder whose tensors have all been found, with the expected names and shapes.

    Attributes:
      path: the folder.
      config: the architecture, from config.json.
      files: published tensor name -> safetensors file that holds it.
      dtypes: published tensor name -> stored dtype.
      offsets: published tensor name -> where its bytes start in the file.
    """

    path: Path
    config: ModelConfig
    files: Mapping[str, Path]
    dtypes: Mapping[str, np.dtype]
    offsets: Mapping[str, int]

    def read(self, name: str, index: tuple[slice, ...], buffers: Buffers | None = None) -> np.ndarray:
        """The slice `index` of the published tensor `name`, in its stored dtype.

        It is a view of the file or, where `index` asks for whole rows, in one of `buffers`: pages that are mapped are
        read from a disk as they are touched, which for a transposed copy is in no good order.
        """
        original = names.published_duplicates(self.config).get(name, name)
        file, dtype, shape = self.files[name], self.dtypes[name], names.published_tensors(self.config)[original].shape
        if paths.is_remote(file):
            return self._read_remote(name, index, shape)
        try:
            view = np.memmap(file, dtype, "r", self.offsets[name], shape)[index]
            if buffers is None or view.shape[1:] != shape[1:]:
                return view
            rows = buffers.empty(view.shape, dtype)
            with file.open("rb") as opened:
                opened.seek(self.offsets[name] + (index[0].start or 0) * rows[:1].nbytes)
                if opened.readinto(rows.view(np.uint8).data) != rows.nbytes:
                    raise ValueError(f"it ends within tensor {name}")
            return rows
        except (ValueError, OSError) as error:
            raise damaged(file, error) from error

    def _read_remote(self, name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        """`read` of a file in a bucket: the whole rows of what is asked for, in one request."""
        dtype, first = self.dtypes[name], index[0] if index else slice(None)
        start, stop, _ = first.indices(shape[0])
        row = math.prod(shape[1:]) * dtype.itemsize
        at = self.offsets[name]
        content = self.files[name].read_range(at + start * row, at + stop * row)  # type: ignore[attr-defined]
        if len(content) != (stop - start) * row:
            raise damaged(self.files[name], ValueError(f"it ends within tensor {name}"))
        return np.frombuffer(content, dtype).reshape(stop - start, *shape[1:])[(slice(None), *index[1:])]

    def read_leaf(
        self, leaf: Parameter, index: tuple[slice, ...], dtype: np.dtype, buffers: Buffers | None = None
    ) -> np.ndarray:
        """The slice `index` of a leaf of our tree, filled layer by layer into one array of type `dtype`.

        `buffers` has the array, and one more for each layer; None: it is a new one.

        Raises:
          UserError: a value is too large for `dtype`.
        """
        index = tuple(slice(*axis.indices(size)) for axis, size in zip(index, leaf.shape, strict=True))
        out = (np if buffers is None else buffers).empty(tuple(axis.stop - axis.start for axis in index), dtype)
        within_layer = index[1:] if leaf.stacked else index
        published_index = within_layer[::-1] if leaf.transposed else within_layer
        rows = zip(leaf.tensors[index[0]], out, strict=True) if leaf.stacked else [(leaf.tensors[0], out)]
        for name, row in rows:
            tensor = self.read(name, published_index, buffers)
            names.convert(row, tensor.T if leaf.transposed else tensor, f"{self.files[name]}: tensor {name}")
        return out


def is_published(folder: os.PathLike) -> bool:
    """Whether `folder` looks like a published checkpoint."""
    place = paths.at(folder)
    return (place / CONFIG_FILE).is_file() and any(place.glob("*.safetensors"))


def index_metadata(folder: Path) -> dict[str, Any]:
    """What the index of a published folder says of all tensors; {} where there is none."""
    try:
        return dict(from_json((folder / INDEX_FILE).read_bytes())["metadata"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def open_folder(folder: Path) -> HuggingFaceFolder:
    """Opens a published folder and checks that it holds exactly the tensors that its config.json asks for.

    Raises:
      UserError: a file is missing or damaged, or a tensor is missing, unknown, mis-shaped or of an unsupported dtype.
    """
    config = parse_config(read_assets(folder), str(folder / CONFIG_FILE))
    expected, duplicates = names.published_tensors(config), names.published_duplicates(config)
    files, shapes, dtypes = {}, {}, {}
    offsets: dict[str, int] = {}
    for shard, listed in _shards(folder).items():
        with open_file(shard) as file:
            found = set(file.keys())
            for name in sorted(listed - found):
                raise UserError(
                    f"{shard}: tensor {_name(name)} is missing, {folder / INDEX_FILE} says it is in this file"
                )
            for name in sorted(found):
                header = file.get_slice(name)
                if name not in expected | duplicates or name in files:
                    what = (
                        "twice in this checkpoint" if name in files else "not a tensor of the model of its config.json"
                    )
                    raise UserError(
                        f"{shard}: tensor {_name(name)} is {what}; remove it or correct {folder / CONFIG_FILE}"
                    )
                if header.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{shard}: tensor {name} is stored as {header.get_dtype()}; expected one of {', '.join(DTYPES)}"
                    )
                files[name], shapes[name] = shard, tuple(header.get_shape())
                dtypes[name] = DTYPES[header.get_dtype()]
        offsets |= data_offsets(shard)
    for name in expected:
        if name not in files:
            raise UserError(f"{folder}: tensor {name} is missing; its config.json asks for {config.n_layers} layers")
    for name in files:
        shape = expected[duplicates.get(name, name)].shape
        if shapes[name] != shape:
            raise UserError(
                f"{files[name]}: tensor {name}: expected shape {shape} by {folder / CONFIG_FILE}, got {shapes[name]}"
            )
    opened = HuggingFaceFolder(folder, config, files, dtypes, offsets)
    for name, original in duplicates.items():
        if name in files and not _same_values(opened, name, original):
            raise UserError(
                f"{files[name]}: tensor {name} differs from {original}, and {folder / CONFIG_FILE} says that the two "
                "are one (`tie_word_embeddings`); remove the wrong one, or set the key to false if both are meant"
            )
    return opened


def _same_values(folder: HuggingFaceFolder, name: str, other: str) -> bool:
    """Whether two tensors of one shape have the same dtype and values."""
    rows = names.published_tensors(folder.config)[other].shape[0]
    parts = [(slice(start, min(start + names.ROWS, rows)),) for start in range(0, rows, names.ROWS)]
    return folder.dtypes[name] == folder.dtypes[other] and all(
        np.array_equal(folder.read(name, part), folder.read(other, part)) for part in parts
    )


def load_params(
    folder: HuggingFaceFolder,
    dtype: np.dtype | None,
    sharding_of: Callable[[TreePath], jax.sharding.Sharding],
) -> dict:
    """The parameter tree of an opened folder; each process reads only the slices that its devices hold.

    Args:
      dtype: dtype of every leaf; None keeps the stored one.
      sharding_of: path of a leaf -> its sharding.

    Raises:
      UserError: a value is NaN or infinite, or layers of one leaf are stored in different dtypes and `dtype` is None.
    """
    params = {}
    leaves = registry.parameters(folder.config)
    for path, leaf in tqdm(leaves.items(), desc="reading weights", unit="leaf", disable=None, leave=False):
        leaf_dtype = stored_dtype(folder, leaf) if dtype is None else dtype
        read = functools.partial(folder.read_leaf, leaf, dtype=leaf_dtype)
        params[path] = jax.make_array_from_callback(leaf.shape, sharding_of(path), read)
        check_finite(params[path], [f"{folder.files[name]}: tensor {name}" for name in leaf.tensors])
    return names.unflatten(params)


def stored_dtype(folder: HuggingFaceFolder, leaf: Parameter) -> np.dtype:
    """The one dtype in which every layer of `leaf` is stored.

    Raises:
      UserError: the layers differ.
    """
    first = leaf.tensors[0]
    for name in leaf.tensors:
        if folder.dtypes[name] != folder.dtypes[first]:
            raise UserError(
                f"{folder.files[name]}: tensor {name} is {folder.dtypes[name]} but {first} is {folder.dtypes[first]}; "
                "layers are stacked and need one dtype: name it (--dtype, model.param_dtype)"
            )
    return folder.dtypes[first]


def _name(tensor: str) -> str:
    """A name from a file as it stands in a message: printable and not long."""
    return shown(tensor)[1:-1]


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Safetensors file -> the names that the index promises in it (none promised for a single file)."""
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: set()}
    index = folder / INDEX_FILE
    if not index.is_file():
        if any(folder.glob("*.bin")):
            raise UserError(
                f"{folder}: only PyTorch .bin weights, which are not read; "
                f"save the model with safe_serialization=True to get {SINGLE_FILE}"
            )
        raise UserError(f"{folder}: no weights; expected {SINGLE_FILE} or {INDEX_FILE} with the files that it lists")
    try:
        weight_map = from_json(index.read_bytes())["weight_map"]
        shards: dict[Path, set[str]] = {}
        for name, file_name in weight_map.items():
            if Path(file_name).name != file_name or file_name in ("", ".."):
                raise UserError(f"{index}: {shown(file_name)} is not the name of a file in this folder; it is not read")
            shards.setdefault(folder / file_name, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a safetensors index ({error!r}); download or copy it again") from error
    for shard, listed in shards.items():
        if not shard.is_file():
            raise UserError(
                f"{shard}: no such file; {INDEX_FILE} lists it for tensor {_name(min(listed))}: download it"
            )
    return shards
