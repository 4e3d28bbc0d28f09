"""The arrays of a checkpoint: trees that Orbax stores, checked before and after they are read.

Beside each tree stands a list of its files' sizes, which is checked before it is read, and the manifest has the digest
of its bits and the shapes that it must have (manifest.py). Arrays are stored in chunks of one layer where there are
layers, so that one can be read piece by piece.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from elbo_kto_jax.checkpoints.digest import params_digest
from elbo_kto_jax.checkpoints.folders import SIZES_FILE, absolute, files_in
from elbo_kto_jax.checkpoints.manifest import REMEDY, StoredTree
from elbo_kto_jax.models.table import TreePath
from elbo_kto_jax.runtime import bucket_errors, paths
from elbo_kto_jax.runtime.errors import UserError, shown
from elbo_kto_jax.runtime.files import from_json

_CHUNK_BYTES = 2**26  # of a step of training, at most


class ListsSizes(ocp.CheckpointHandler):
    """Adds a list of the sizes of its files to a tree."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        directory = absolute(directory)
        (directory / SIZES_FILE).write_bytes(json.dumps(_sizes(directory)).encode())


class _TreeHandler(ListsSizes, ocp.StandardCheckpointHandler):
    """Orbax's array trees."""


@ocp.args.register_with_handler(_TreeHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class TreeSave(ocp.args.StandardSave):
    """Saves a tree of arrays through _TreeHandler."""


def save_args(leaf: jax.Array) -> ocp.SaveArgs:
    """Chunks of a device's part of an array: of one layer where there are layers, so that `Source` can read pieces."""
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())


def check_arrays(tree: epath.Path, stored: StoredTree, shapes: Mapping[TreePath, tuple[int, ...]]) -> None:
    """Raises UserError unless the arrays `stored` at `tree` are those of `shapes`, naming the first that is not."""
    for path in sorted(shapes.keys() ^ stored.shapes.keys()):
        what = "is missing" if path in shapes else "belongs to another model or configuration"
        raise UserError(f"{tree}: array {'/'.join(path)[:200]} {what}; {REMEDY}")
    for path, shape in shapes.items():
        if stored.shapes[path] != shape:
            raise UserError(
                f"{tree}: array {'/'.join(path)}: expected shape {shape}, got {shown(stored.shapes[path])}; {REMEDY}"
            )


def restore_tree(tree: epath.Path, stored: StoredTree, abstract: Any) -> Any:
    """The arrays at `tree`, in the structure, dtypes and shardings of `abstract`.

    They are read as they were stored, so that they must have the digest of what was written, and then converted, one
    after the other.
    """
    check_files(tree)
    as_stored = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, stored.dtypes[_names(path)], sharding=leaf.sharding),
        abstract,
    )
    try:
        restored = ocp.StandardCheckpointHandler().restore(tree, args=ocp.args.StandardRestore(as_stored))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # for a damaged file Orbax raises anything from ValueError to bare Exception
        raise unreadable(tree, error) from error
    if params_digest(restored) != stored.digest:
        raise damaged(str(tree))

    def convert(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == wanted.dtype:
            return leaf
        converted = leaf.astype(wanted.dtype).block_until_ready()
        leaf.delete()  # two copies of one array at a time, not of the tree
        return converted

    return jax.tree.map(convert, restored, abstract)


def check_files(tree: epath.Path) -> None:
    """Checks that the files of a stored tree are there, whole and indexed, without reading values."""
    sizes_file = tree / SIZES_FILE
    try:
        sizes = from_json(sizes_file.read_bytes())
        if not isinstance(sizes, dict) or any("\0" in name for name in sizes):
            raise ValueError("no sizes of files")
    except (OSError, ValueError) as error:
        raise UserError(f"{sizes_file}: missing or damaged; {REMEDY}") from error
    remote = _sizes(tree) if paths.is_remote(tree) else {}  # one request, not two for each file
    for name, size in sizes.items():
        file = tree / name
        found = remote.get(name, "no file")
        if not paths.is_remote(tree) and file.is_file():
            found = file.stat().length
        if found != size:
            raise UserError(f"{file}: expected {shown(size)} bytes, got {found}; {REMEDY}")
    # Listing the store checks its index: one error here, where Orbax would have one for each array.
    try:
        tensorstore.KvStore.open(kvstore(tree)).result().list().result()
    except ValueError as error:
        raise unreadable(tree, error) from error


def _sizes(tree: epath.Path) -> dict[str, int]:
    """The bytes of every file below a folder, by its name there."""
    if paths.is_remote(tree):
        return absolute(tree).sizes()
    return {str(file.relative_to(tree)): file.stat().length for file in files_in(tree)}


def kvstore(tree: epath.Path, array: str = "") -> dict:
    """TensorStore's name for the files of a stored tree, or of an array in it."""
    base = {"driver": "file", "path": f"{tree}/"}
    if paths.is_remote(tree):
        bucket, _, name = str(tree).partition("://")[2].partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}
    return {
        "driver": "ocdbt",
        "base": base,
        **({"path": f"{array}/"} if array else {}),
    }


def open_array(tree: epath.Path, path: TreePath) -> tensorstore.TensorStore:
    """The array at `path` of a stored tree, to read from."""
    return tensorstore.open({"driver": "zarr", "kvstore": kvstore(tree, ".".join(path))}, read=True).result()


def damaged(where: str) -> UserError:
    """The error for values that are not those that were saved."""
    return UserError(f"{where}: damaged: its values do not have the digest of what was saved; {REMEDY}")


def unreadable(tree: epath.Path, error: Exception) -> UserError:
    """The error for a stored tree that cannot be read because of `error`."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if paths.is_remote(tree) and (trouble := bucket_errors.trouble(error)):
        return UserError(f"{tree}: {trouble}")
    return UserError(f"{tree}: cannot be read ({reason[:200]}); {REMEDY}")


def by_path(tree: Any) -> dict[TreePath, Any]:
    """The leaves by their paths; names, indices and attributes of the tree all become strings."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_names(path): leaf for path, leaf in leaves}


def _names(path: tuple) -> TreePath:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
