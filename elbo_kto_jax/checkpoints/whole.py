"""A whole model, of ours or published: its config, and opening it to read it piece by piece or leaf by leaf."""

from collections.abc import Callable, Iterator

import jax
import numpy as np
import tensorstore
from etils import epath
from jax.typing import DTypeLike
from tqdm import tqdm

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.arrays import check_arrays, check_files, open_array, unreadable
from elbo_kto_jax.checkpoints.assets import CONFIG_FILE, parse_config, read_assets
from elbo_kto_jax.checkpoints.buffers import Buffers
from elbo_kto_jax.checkpoints.digest import Digest
from elbo_kto_jax.checkpoints.folders import is_checkpoint
from elbo_kto_jax.checkpoints.huggingface import open_folder, stored_dtype
from elbo_kto_jax.checkpoints.manifest import read_manifest, stored_assets
from elbo_kto_jax.checkpoints.model import Source
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.table import TreePath
from elbo_kto_jax.runtime import paths


def whole_config(folder: epath.Path) -> tuple[ModelConfig, dict[str, bytes]]:
    """The architecture and the assets of the model at `folder`, which holds no adapters, without its weights.

    Raises:
      UserError: its config.json is missing, damaged or not supported.
    """
    if is_checkpoint(folder):
        return stored_assets(folder, read_manifest(folder))
    assets = read_assets(paths.at(folder))
    return parse_config(assets, str(folder / CONFIG_FILE)), assets


def open_whole(folder: epath.Path, dtype: DTypeLike | None = None) -> Source:
    """Opens the model at `folder`, of ours or published, which holds no adapters.

    Args:
      folder: see `locate`.
      dtype: dtype in which a published checkpoint is read; None keeps the stored ones. A checkpoint of ours is read as
        it is stored, since its digest is that of the stored bits.

    Raises:
      UserError: a part of it is missing or damaged.
    """
    return _open_ours(folder) if is_checkpoint(folder) else _open_published(folder, dtype)


def _open_published(folder: epath.Path, dtype: DTypeLike | None) -> Source:
    published = open_folder(paths.at(folder))
    leaves = registry.parameters(published.config)
    stored = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype or stored_dtype(published, leaf)))
        for path, leaf in leaves.items()
    }

    def read(path: TreePath, index: names.Index, buffers: Buffers | None) -> np.ndarray:
        return published.read_leaf(leaves[path], index, stored[path].dtype, buffers)

    assets = read_assets(published.path)
    return Source(published.config, assets, str(folder), stored, read, arrays_per_read=2)


def _open_ours(folder: epath.Path) -> Source:
    manifest = read_manifest(folder)
    config, assets = stored_assets(folder, manifest)
    tree, stored = folder / "params", manifest.trees["params"]
    check_arrays(tree, stored, {path: leaf.shape for path, leaf in registry.parameters(config).items()})
    check_files(tree)
    arrays = {}

    def read(path: TreePath, index: names.Index, buffers: Buffers | None) -> np.ndarray:
        try:
            if path not in arrays:
                arrays[path] = open_array(tree, path)
            piece = arrays[path][index]
            if buffers is None:
                return piece.read().result()
            out = buffers.empty(piece.shape, piece.dtype.numpy_dtype)
            tensorstore.array(out, copy=False).write(piece.translate_to[(0,) * out.ndim]).result()
            return out
        except ValueError as error:
            raise unreadable(tree, error) from error

    leaves = {path: jax.ShapeDtypeStruct(shape, stored.dtypes[path]) for path, shape in stored.shapes.items()}
    return Source(config, assets, str(folder), leaves, read, arrays_per_read=1, digest=stored.digest)


def read_leaves(
    source: Source, digest: Digest, sharding_of: Callable[[TreePath], jax.sharding.Sharding]
) -> Iterator[tuple[TreePath, jax.Array]]:
    """The parameters of `source` one by one, in their stored dtypes; each is added to `digest`."""

    def read(path: TreePath) -> jax.Array:
        shape = source.leaves[path].shape
        leaf = jax.make_array_from_callback(
            shape, sharding_of(path), lambda index: source.read(path, index or (), None)
        )
        digest.add(path, (0,) * leaf.ndim, leaf)
        return leaf

    for path in tqdm(source.leaves, desc="reading weights", unit="leaf", disable=None, leave=False):
        yield path, read(path)  # not kept here: a caller that drops it before the next has one at a time
