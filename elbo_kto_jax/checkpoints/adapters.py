"""Adapters and their base (models/lora.py): loading a base to train on, and merging trained adapters into theirs.

As a model, a checkpoint of adapters is its base with the adapters merged into it, and so the model that was trained: an
int8 base is rounded as it was for training. The base is read leaf by leaf, so that one leaf of it is held in two forms
at a time, and its digest says that it is the one that was trained on.
"""

import os
import shlex
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.arrays import by_path, check_arrays, restore_tree
from elbo_kto_jax.checkpoints.digest import Digest
from elbo_kto_jax.checkpoints.finite import check_finite
from elbo_kto_jax.checkpoints.folders import MANIFEST_FILE, absolute, is_checkpoint, locate, means_best
from elbo_kto_jax.checkpoints.manifest import Adaptation, Manifest, other_base, read_manifest
from elbo_kto_jax.checkpoints.model import Source
from elbo_kto_jax.checkpoints.whole import open_whole, read_leaves
from elbo_kto_jax.models import lora, registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.table import TreePath
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.flags import command_line


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
    if is_checkpoint(folder) and read_manifest(folder).lora is not None:
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


def open_base(folder: epath.Path, adaptation: Adaptation) -> Source:
    """The base of the adapters at `folder`, opened; whether it has the bits that they were trained on is not known yet.

    Raises:
      UserError: it is not where `adaptation` says, or a part of it is missing.
    """
    try:
        base = locate(adaptation.base_path, "base", weights=True)
        if is_checkpoint(base) and read_manifest(base).lora is not None:
            raise UserError(f"{base} holds adapters itself")  # its own folder, perhaps
        return open_whole(base)
    except UserError as error:
        raise UserError(
            f"{folder}: holds adapters, whose base is not usable: {str(error).splitlines()[0]}\n"
            f"Put it there, or write where it is now into {folder / 'assets' / MANIFEST_FILE} (lora, base_path)"
        ) from error


def load_merged(
    folder: epath.Path,
    manifest: Manifest,
    config: ModelConfig,
    dtype: np.dtype | None,
    sharding_of: Callable[[TreePath], jax.sharding.Sharding],
) -> dict:
    """The base of the adapters at `folder` with the adapters merged into it, in `dtype` or the base's own.

    The sum is made in float32, with the int8 values of a base that was quantized, and rounded once.
    """
    adaptation, stored = manifest.lora, manifest.trees["params"]
    if adaptation is None:
        raise ValueError(f"{folder}: expected a checkpoint of adapters, got a whole model")
    source = open_base(folder, adaptation)
    leaf_shapes = names.unflatten(dict(source.leaves))
    expected = by_path(lora.abstract_adapters(leaf_shapes, adaptation.rank, np.float32, adaptation.targets))
    check_arrays(folder / "params", stored, {path: leaf.shape for path, leaf in expected.items()})

    def everywhere(path: TreePath) -> jax.sharding.Sharding:
        sharding = sharding_of((*path[:-1], "kernel"))
        mesh = getattr(sharding, "mesh", None)
        return sharding if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, stored.dtypes[path], sharding=everywhere(path))
        for path, leaf in expected.items()
    }
    adapters = restore_tree(folder / "params", stored, names.unflatten(abstract))
    digest, params, scale = Digest(source.leaves), {}, adaptation.alpha / adaptation.rank
    for path, leaf in read_leaves(source, digest, sharding_of):
        to = leaf.dtype if dtype is None else dtype
        is_int8 = adaptation.base_quantization == "int8" and lora.is_matrix(path)

        def merge(w, adapter, to=to, is_int8=is_int8):
            w = lora.rounded(w) if is_int8 else w
            return lora.merge(w, **adapter, scale=scale, dtype=to) if adapter else w.astype(to)

        adapter = adapters["blocks"].get(path[1], {}) if lora.is_matrix(path) else {}
        params[path] = jax.jit(merge, out_shardings=leaf.sharding)(leaf, adapter)
        tensors = registry.parameters(config)[path].tensors
        check_finite(params[path], [f"{folder}: with its base {source.path}: tensor {name}" for name in tensors])
        del leaf
    if digest.hexdigest() != adaptation.base_digest:
        raise other_base(folder, adaptation, source.path, digest.hexdigest())
    return names.unflatten(params)
