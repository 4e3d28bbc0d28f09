"""Loading a model from whatever form it is in.

A user's path is a folder of Hugging Face safetensors, a hub id, a converted checkpoint, one step of a training run,
the working folder of a training run, or a folder of PEFT's adapters; which one is recognised by its content
(folders.py). Adapters are merged into their base (adapters.py). Each process reads what it owns. Weights that are not
finite are refused wherever they are loaded to compute with; conversions (`open_source`) keep every bit.
"""

import collections
import dataclasses
import json
import os

import jax
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.adapters import find_adapters, load_merged, open_base
from elbo_kto_jax.checkpoints.arrays import check_arrays, restore_tree
from elbo_kto_jax.checkpoints.assets import read_assets
from elbo_kto_jax.checkpoints.digest import Digest
from elbo_kto_jax.checkpoints.finite import check_finite
from elbo_kto_jax.checkpoints.folders import MANIFEST_FILE, is_checkpoint, locate
from elbo_kto_jax.checkpoints.huggingface import load_params, open_folder
from elbo_kto_jax.checkpoints.manifest import checksum_of, read_manifest, stored_assets
from elbo_kto_jax.checkpoints.model import Model, Source
from elbo_kto_jax.checkpoints.whole import open_whole, read_leaves, whole_config
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.table import TreePath
from elbo_kto_jax.runtime import paths


def load_config(path: str | os.PathLike, flag: str = "--config.model.path") -> tuple[ModelConfig, dict[str, bytes]]:
    """The architecture and the assets of a model in any form that `load_model` takes, without its weights.

    Args:
      path: see load_model.
      flag: the flag or config key that named `path`, for errors.

    Raises:
      UserError: there is no model at `path`, or its config.json is missing, damaged or not supported.
    """
    folder = locate(path, flag, weights=False)
    adapters = find_adapters(folder)
    return whole_config(folder) if adapters is None else (adapters.config, dict(adapters.assets))


def load_model(
    path: str | os.PathLike,
    *,
    param_dtype: DTypeLike | None = None,
    shardings: dict | None = None,
    flag: str = "--config.model.path",
) -> Model:
    """Loads a model; what `path` is, is recognised by its content.

    Args:
      path: a folder of Hugging Face safetensors, a hub id, a converted checkpoint, one step of a training run, the
        working folder of a training run (its latest step), or a folder of PEFT's adapters.
      param_dtype: dtype of every parameter; None keeps the stored ones.
      shardings: tree of shardings, one per parameter, so that each process reads only what it owns; None puts
        everything on the first local device.
      flag: the flag or config key that named `path`, for errors.

    Raises:
      UserError: there is no model at `path`, or a part of it is missing or damaged.
    """
    folder = locate(path, flag, weights=True)
    dtype = None if param_dtype is None else np.dtype(param_dtype)

    def sharding_of(leaf_path: TreePath) -> jax.sharding.Sharding:
        if shardings is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return names.get(shardings, leaf_path)

    adapters = find_adapters(folder)
    if adapters is not None:
        params = load_merged(adapters, dtype, sharding_of)
        return Model(adapters.config, params, adapters.assets, str(folder))
    if not is_checkpoint(folder):
        published = open_folder(paths.at(folder))
        params = load_params(published, dtype, sharding_of)
        return Model(published.config, params, read_assets(published.path), str(folder))

    manifest = read_manifest(folder)
    config, assets = stored_assets(folder, manifest)
    stored, leaves = manifest.trees["params"], registry.parameters(config)
    check_arrays(folder / "params", stored, {leaf_path: leaf.shape for leaf_path, leaf in leaves.items()})
    abstract = {
        leaf_path: jax.ShapeDtypeStruct(
            leaf.shape, stored.dtypes[leaf_path] if dtype is None else dtype, sharding=sharding_of(leaf_path)
        )
        for leaf_path, leaf in leaves.items()
    }
    params = restore_tree(folder / "params", stored, names.unflatten(abstract))
    for leaf_path, leaf in leaves.items():
        check_finite(names.get(params, leaf_path), [f"{folder}: tensor {name}" for name in leaf.tensors])
    return Model(config, params, assets, str(folder))


def check_weights(path: str | os.PathLike, flag: str = "--config.model.path") -> None:
    """Raises UserError where `load_model` would miss a file or a tensor of the model at `path`; reads no values."""
    folder = locate(path, flag, weights=True)
    adapters = find_adapters(folder)
    if adapters is None:
        open_whole(folder)
    else:
        open_base(adapters)


def open_source(
    path: str | os.PathLike, *, dtype: DTypeLike | None = None, flag: str = "--config.model.path"
) -> Source:
    """Opens a model for reading piece by piece; see `load_model` for `path` and `flag`.

    Args:
      dtype: dtype in which a published checkpoint is read and adapters are merged; None keeps the stored ones. A whole
        checkpoint of ours is read as it is stored, since its digest is that of the stored bits.

    Raises:
      UserError: there is no model at `path`, or a part of it is missing or damaged.
    """
    folder = locate(path, flag, weights=True)
    if find_adapters(folder) is not None:
        return Source.of(load_model(path, param_dtype=dtype, flag=flag))
    return open_whole(folder, dtype)


def manifest_digest(path: str | os.PathLike, flag: str = "--config.model.path") -> str:
    """What the manifest at `path` (see `load_model`) says of the parameters' bits, adapters' base and scale included.

    No values are read: loading checks that they are those of the manifest. A published folder has no digest: "".

    Raises:
      UserError: there is no model at `path`, or its manifest is damaged.
    """
    folder = locate(path, flag, weights=True)
    if not is_checkpoint(folder):
        return ""
    manifest = read_manifest(folder)
    adapted = {} if manifest.lora is None else dataclasses.asdict(manifest.lora)
    words = [manifest.trees["params"].digest, *(adapted.get(name) for name in ("rank", "alpha", "base_digest"))]
    if adapted.get("base_quantization", "none") != "none":
        words.append(adapted["base_quantization"])
    return checksum_of(json.dumps(words).encode())


def read_digest(path: str | os.PathLike, dtype: DTypeLike, shardings: dict, flag: str = "--config.model.path") -> str:
    """The digest of the parameters that `load_model` would give of a published folder, one leaf after the other.

    Raises:
      UserError: see `load_model`.
    """
    source = open_source(path, dtype=dtype, flag=flag)
    digest = Digest(source.leaves)
    leaves = read_leaves(source, digest, lambda leaf_path: names.get(shardings, leaf_path))
    collections.deque(leaves, maxlen=0)  # keeps none
    return digest.hexdigest()


def weight_files(path: str | os.PathLike, flag: str = "--config.model.path") -> list[epath.Path]:
    """The files that hold the parameters at `path` (see `load_model`); of a checkpoint of ours, its manifest.

    Of PEFT's adapters, theirs and those of their base.

    Raises:
      UserError: there is no model at `path`.
    """
    folder = locate(path, flag, weights=True)
    if is_checkpoint(folder):
        return [folder / "assets" / MANIFEST_FILE]
    adapters = find_adapters(folder)
    base = [] if adapters is None else weight_files(open_base(adapters).path, flag)
    return [*sorted(folder.glob("*.safetensors")), *base]
