"""Adapters and their base (models/lora.py): loading a base to train on, and merging trained adapters into theirs.

Adapters are in a checkpoint of ours or in a folder of PEFT's (peft.py). As a model, they are their base with the
adapters merged into it, and so the model that was trained: an int8 base is rounded as it was for training. The base is
read leaf by leaf, so that one leaf of it is held in two forms at a time, and its digest says that it is the one that
was trained on.
"""

import dataclasses
import functools
import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from elbo_kto_jax.checkpoints import names, peft
from elbo_kto_jax.checkpoints.arrays import by_path, check_arrays, restore_tree
from elbo_kto_jax.checkpoints.assets import read_assets, with_tokenizer
from elbo_kto_jax.checkpoints.digest import Digest
from elbo_kto_jax.checkpoints.finite import check_finite
from elbo_kto_jax.checkpoints.folders import MANIFEST_FILE, absolute, is_checkpoint, locate, means_best
from elbo_kto_jax.checkpoints.manifest import Adaptation, other_base, read_manifest, stored_assets
from elbo_kto_jax.checkpoints.model import Source
from elbo_kto_jax.checkpoints.whole import open_whole, read_leaves, whole_config
from elbo_kto_jax.models import lora, registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.table import TreePath
from elbo_kto_jax.runtime import config, paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.flags import command_line


class StoredAdapters(NamedTuple):
    """Adapters that have been found, and the model that they and their base make.

    Attributes:
      folder: where they are.
      config, assets: of that model; see `Model`.
      adaptation: what they belong to. Its base_digest is "" where nobody wrote down which bits the base has.
      base_said: the file and its key that say where the base is, for errors.
      leaves: shape and dtype of each of their arrays by its path, as they are stored.
      read: a tree of the shapes that they must have, with dtypes and shardings -> their arrays.
    """

    folder: epath.Path
    config: ModelConfig
    assets: Mapping[str, bytes]
    adaptation: Adaptation
    base_said: str
    leaves: Mapping[TreePath, jax.ShapeDtypeStruct]
    read: Callable[[dict], dict]


def load_base(
    path: str | os.PathLike, abstract: Any, shardings: Any, flag: str = "--config.model.path"
) -> tuple[dict, str, str]:
    """Loads a base for adapters: converted and, where `abstract` has int8, quantized one stacked leaf at a time.

    Args:
      abstract: lora.abstract_base of the model.
      shardings: tree of shardings, one per leaf of `abstract`.
      path, flag: see `load_model`.

    Returns:
      The parameters, what to call the base in an `Adaptation`, and the digest of its parameters as they are stored.

    Raises:
      UserError: there is no whole model at `path`, or a part of it is missing or damaged.
    """
    folder = locate(path, flag, weights=True)
    if find_adapters(folder) is not None:
        raise UserError(
            f"{flag}={path}: holds adapters, and a whole model is needed; merge them into their base first:\n"
            f"{command_line('conversion.to_hf')} {shlex.quote(f'--source={path}')} --out=FOLDER"
        )
    source = open_whole(folder)
    digest = Digest(source.leaves)
    params: dict[TreePath, Any] = {}
    for leaf_path, leaf in read_leaves(source, digest, lambda leaf_path: names.get(shardings, leaf_path)):
        where = [f"{folder}: tensor {name}" for name in registry.parameters(source.config)[leaf_path].tensors]
        check_finite(leaf, where)
        group = names.get(abstract, leaf_path[:-1])
        if lora.is_matrix(leaf_path) and "kernel_scale" in group:  # a bias beside it stays as it is
            to = names.get(shardings, leaf_path[:-1])
            int8 = {name: to[name] for name in ("kernel", "kernel_scale")}
            converted = jax.jit(lora.quantize, out_shardings=int8)(leaf)
        elif group[leaf_path[-1]].dtype != leaf.dtype:
            dtype = group[leaf_path[-1]].dtype
            converted = {leaf_path[-1]: jax.jit(lambda x, d=dtype: x.astype(d), out_shardings=leaf.sharding)(leaf)}
            check_finite(converted[leaf_path[-1]], where)  # float16 has no large values
        else:
            converted = {leaf_path[-1]: leaf}
        params |= {(*leaf_path[:-1], name): jax.block_until_ready(value) for name, value in converted.items()}
        del leaf
    source.check(digest)
    # A working folder is pinned to the step that was read; a hub id stays one.
    name = source.path if absolute(path).exists() or means_best(path) else str(path)
    return names.unflatten(params), name, digest.hexdigest()


def find_adapters(folder: epath.Path) -> StoredAdapters | None:
    """The adapters at `folder`, in a checkpoint of ours or in a folder of PEFT's; None: it holds a whole model.

    Raises:
      UserError: a part of them is missing or damaged, or their base, which says what a folder of PEFT's must hold.
    """
    if peft.is_peft(folder):
        return _of_peft(folder)
    manifest = read_manifest(folder) if is_checkpoint(folder) else None
    if manifest is None or manifest.lora is None:
        return None
    config, assets = stored_assets(folder, manifest)
    stored = manifest.trees["params"]
    leaves = {path: jax.ShapeDtypeStruct(shape, stored.dtypes[path]) for path, shape in stored.shapes.items()}

    def read(abstract: dict) -> dict:
        shapes = {path: leaf.shape for path, leaf in by_path(abstract).items()}
        check_arrays(folder / "params", stored, shapes)
        return restore_tree(folder / "params", stored, abstract)

    said = f"{folder / 'assets' / MANIFEST_FILE} (lora, base_path)"
    return StoredAdapters(folder, config, assets, manifest.lora, said, leaves, read)


def open_start(path: str, flag: str, options: config.Lora, abstract: Any) -> StoredAdapters:
    """The adapters from which a training of adapters starts; they must be such as the run trains.

    Args:
      path: PEFT's folder, hub id, checkpoint of adapters, or working folder of a run that trained them.
      flag: the flag that named `path`, for errors.
      abstract: what the run trains (`lora.abstract_adapters`).

    Raises:
      UserError: there are none, or they differ from what the config asks for.
    """
    found = find_adapters(locate(path, flag, weights=True))
    if found is None:
        raise UserError(f"{flag}={path}: a whole model; expected adapters (--config.model.path takes a whole model)")
    rank, alpha, targets = found.adaptation.rank, found.adaptation.alpha, found.adaptation.targets
    wanted = by_path(abstract)
    same_matrices = {path[1] for path in found.leaves} == {path[1] for path in wanted}
    if (rank, alpha) != (options.rank, options.alpha) or not same_matrices:
        words = f"--config.lora.rank={rank} --config.lora.alpha={alpha!r} --config.lora.targets={list(targets)}"
        raise UserError(f"{flag}={path}: its adapters are not such as the config asks for; train them with\n{words}")
    for leaf_path, leaf in wanted.items():
        if found.leaves[leaf_path].shape != leaf.shape:
            raise UserError(
                f"{flag}={path}: adapters of another model than --config.model.path: {'/'.join(leaf_path)}: expected "
                f"shape {leaf.shape}, got {found.leaves[leaf_path].shape}"
            )
    return found


def load_start(found: StoredAdapters, base: Adaptation, abstract: Any, shardings: Any) -> dict:
    """The adapters that `open_start` found, in the dtypes of `abstract`.

    Args:
      base: of the run.
      shardings: tree of shardings, one per leaf of `abstract`.

    Raises:
      UserError: they were trained on another base, are damaged, or are not finite.
    """
    if found.adaptation.base_digest not in ("", base.base_digest):
        raise other_base(found.folder, found.adaptation, base.base_path, base.base_digest)
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    params = found.read(wanted)
    for path, leaf in by_path(params).items():
        check_finite(leaf, [f"{found.folder}: {'/'.join(path)}"])
    return params


def _of_peft(folder: epath.Path) -> StoredAdapters:
    """The adapters of a folder of PEFT's; the tokenizer is that of the folder, where it has one."""
    adaptation, mask_token_id = peft.read_config(folder)
    said = f"{folder / peft.CONFIG_FILE} ({peft.BASE_KEY})"
    config, assets = whole_config(_locate_base(folder, adaptation, said, weights=False))
    if mask_token_id is not None:
        config = dataclasses.replace(config, mask_token_id=mask_token_id, mask_is_chosen=True)
    leaves = peft.find_tensors(folder, config, adaptation.rank)
    matrices = {path[1] for path in registry.parameters(config) if lora.is_matrix(path)}
    targets = {path[1] for path in leaves}
    adaptation = dataclasses.replace(adaptation, targets=() if targets == matrices else tuple(sorted(targets)))

    def read(abstract: dict) -> dict:
        values = peft.read_tensors(folder, config, leaves)

        def placed(path: TreePath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            array = values[path].astype(leaf.dtype)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

        return names.unflatten({path: placed(path, leaf) for path, leaf in by_path(abstract).items()})

    assets = with_tokenizer(assets, read_assets(paths.at(folder)))
    return StoredAdapters(folder, config, assets, adaptation, said, leaves, read)


def _locate_base(folder: epath.Path, adaptation: Adaptation, said: str, weights: bool) -> epath.Path:
    """Where the base of the adapters at `folder` is, as the file and key `said` name it; `weights`: see `locate`."""
    try:
        base = locate(adaptation.base_path, "base", weights)
        if peft.is_peft(base) or (is_checkpoint(base) and read_manifest(base).lora is not None):
            raise UserError(f"{base} holds adapters itself")  # its own folder, perhaps
        return base
    except UserError as error:
        raise _unusable_base(folder, said, error) from error


def _unusable_base(folder: epath.Path, said: str, error: UserError) -> UserError:
    return UserError(
        f"{folder}: holds adapters, whose base is not usable: {str(error).splitlines()[0]}\n"
        f"Put it there, or write where it is now into {said}"
    )


def open_base(stored: StoredAdapters) -> Source:
    """The base of adapters, opened; whether it has the bits that they were trained on is not known yet.

    Raises:
      UserError: it is not where they say, or a part of it is missing.
    """
    base = _locate_base(stored.folder, stored.adaptation, stored.base_said, weights=True)
    try:
        return open_whole(base)
    except UserError as error:
        raise _unusable_base(stored.folder, stored.base_said, error) from error


def load_merged(
    stored: StoredAdapters,
    dtype: np.dtype | None,
    sharding_of: Callable[[TreePath], jax.sharding.Sharding],
) -> dict:
    """The base of adapters with the adapters merged into it, in `dtype` or the base's own.

    The sum is made in float32, with the int8 values of a base that was quantized, and rounded once.
    """
    folder, adaptation, source = stored.folder, stored.adaptation, open_base(stored)
    leaf_shapes = names.unflatten(dict(source.leaves))
    expected = by_path(lora.abstract_adapters(leaf_shapes, adaptation.rank, np.float32, adaptation.targets))

    def everywhere(path: TreePath) -> jax.sharding.Sharding:
        sharding = sharding_of((*path[:-1], "kernel"))
        mesh = getattr(sharding, "mesh", None)
        return sharding if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=everywhere(path)) for path, leaf in expected.items()
    }
    adapters = stored.read(names.unflatten(abstract))
    digest, params, scale = Digest(source.leaves), {}, adaptation.alpha / adaptation.rank
    for path, leaf in read_leaves(source, digest, sharding_of):
        to = leaf.dtype if dtype is None else dtype
        is_int8 = adaptation.base_quantization == "int8" and lora.is_matrix(path)
        adapter = adapters["blocks"].get(path[1], {}) if lora.is_matrix(path) else {}
        params[path] = _merging(leaf.sharding, np.dtype(to), is_int8, scale)(leaf, adapter)
        tensors = registry.parameters(stored.config)[path].tensors
        check_finite(params[path], [f"{folder}: with its base {source.path}: tensor {name}" for name in tensors])
        del leaf
    if adaptation.base_digest not in ("", digest.hexdigest()):
        raise other_base(folder, adaptation, source.path, digest.hexdigest())
    return names.unflatten(params)


@functools.lru_cache(maxsize=64)
def _merging(sharding: jax.sharding.Sharding, dtype: np.dtype, is_int8: bool, scale: float) -> Callable:
    """The program that makes a parameter of the base one of the merged model: leaves of one shape share it."""

    def merge(w: jax.Array, adapter: dict) -> jax.Array:
        w = lora.rounded(w) if is_int8 else w
        return lora.merge(w, **adapter, scale=scale, dtype=dtype) if adapter else w.astype(dtype)

    return jax.jit(merge, out_shardings=sharding)
