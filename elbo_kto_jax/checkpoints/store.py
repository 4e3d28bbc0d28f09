"""Our checkpoints, and loading a model from whatever form it is in.

A checkpoint is one Orbax step folder, the same for a converted model and for a step of training:

    params/       the parameter tree, in Orbax's array format
    assets/       config.json and tokenizer files as published, byte for byte, and manifest.json, which marks the format
    opt_state/    training only: optimizer state
    progress/     training only: JSON, where training stands

It refers to nothing outside, so it can be moved. Orbax writes it under a temporary name and renames it when complete.
Arrays are stored layer by layer, and a converted model in chunks that a mesh need not share, so that each process reads
what it owns, and a conversion holds pieces of a tensor and never a leaf of stacked layers (`Source`).
Where adapters are trained (models/lora.py), params/ are those alone, and the manifest says on which base
(`Adaptation`). As a model, such a checkpoint is its base with the adapters merged into it.
Orbax's arrays carry no checksum, so each tree has a list of its files' sizes (checked before it is read) and the
manifest has a digest of its bits (checked after it was read), checksums of the assets and a copy of the progress.
It ends with a checksum of itself, in which only the place of a base is left out, since a base may be moved. Manifests
of version 1 had none: they are read, and what they say is checked for its form alone.
Weights that are not finite are refused wherever they are loaded to compute with; conversions keep every bit.
"""

import collections
import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from etils.epath import stat_utils
from jax.typing import DTypeLike
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast

from elbo_kto_jax.checkpoints import huggingface, names
from elbo_kto_jax.checkpoints.buffers import Buffers
from elbo_kto_jax.checkpoints.digest import Digest, params_digest
from elbo_kto_jax.checkpoints.finite import check_finite
from elbo_kto_jax.data import foreign
from elbo_kto_jax.models import lora, registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.table import TreePath
from elbo_kto_jax.runtime.errors import UserError, shown
from elbo_kto_jax.runtime.files import ahead, check_writable, from_json, writing

MANIFEST_FILE = "manifest.json"
SIZES_FILE = "sizes.json"
STEPS_FOLDER = "checkpoints"
_FORMAT = "elbo_kto_jax"
_VERSION = 2  # 1 had no checksum of the manifest
# Largest sizes of a chunk of a converted model by logical axis: meshes split `model` most finely, 4096 up to 64 times
# before two devices share a chunk. The others as long as the pieces in which conversions read, names.ROWS.
_CHUNK = {"layers": 1, "model": 64}
_CHUNK_BYTES = 2**26  # of a step of training, at most
_LARGEST_ALPHA = 1e30  # in manifests without a checksum; float32 has no numbers beyond 3e38
_REMEDY = "copy or convert the checkpoint again, or remove it to go on from an earlier step"


@dataclasses.dataclass(frozen=True)
class Model:
    """A mask predictor with everything needed to use it or to publish it again.

    Attributes:
      config: the architecture.
      params: parameter tree (registry.parameters).
      assets: file name -> content: config.json and the tokenizer files, byte for byte as published.
      source: the folder that it was loaded from.
    """

    config: ModelConfig
    params: dict
    assets: Mapping[str, bytes]
    source: str

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the checkpoint, chat template included.

        Raises:
          UserError: the checkpoint came without a readable tokenizer.json.
        """
        return build_tokenizer(self.assets, self.source)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model whose parameters are read piece by piece, from wherever they are.

    Attributes:
      config, assets, path: as in `Model` (there: `source`).
      leaves: shape and dtype of every parameter by its path.
      read: (path of a leaf, index into one layer of it, Buffers or None) -> that piece, in memory of the former or new
        memory.
      arrays_per_read: how many arrays of its Buffers a call of `read` takes, the one that it returns among them.
      digest: of the bits that were saved, where that is known.
    """

    config: ModelConfig
    assets: Mapping[str, bytes]
    path: str
    leaves: Mapping[TreePath, jax.ShapeDtypeStruct]
    read: Callable[[TreePath, names.Index, Buffers | None], np.ndarray]
    arrays_per_read: int
    digest: str | None = None

    @classmethod
    def of(cls, model: Model) -> "Source":
        """The model in memory."""
        params = {path: names.get(model.params, path) for path in registry.parameters(model.config)}
        leaves = {path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype)) for path, leaf in params.items()}
        read = lambda path, index, buffers: np.asarray(params[path][index])  # noqa: E731
        return cls(model.config, model.assets, model.source, leaves, read, arrays_per_read=0)

    @property
    def nbytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves.values())

    def published(self, dtype: DTypeLike | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype (of all: `dtype`, or None: as read) of every published tensor, in the order of writing."""
        tensors = names.published_tensors(self.config)
        return {
            name: jax.ShapeDtypeStruct(t.shape, np.dtype(dtype or self.leaves[t.path].dtype))
            for name, t in tensors.items()
        }

    def buffers(self, pieces: int, *, published: bool) -> Buffers:
        """Memory in which that many of the latest pieces are valid at a time.

        Args:
          pieces: those in use, and the one that is read meanwhile.
          published: they come from `published_pieces`; otherwise from `read`.
        """
        return Buffers(pieces * (self.arrays_per_read + published))

    def published_pieces(
        self,
        tensor: names.PublishedTensor,
        buffers: Buffers,
        digest: Digest | None = None,
        dtype: DTypeLike | None = None,
    ) -> Iterator[np.ndarray]:
        """A published tensor, names.ROWS of its rows at a time; what is read is added to `digest`.

        Args:
          buffers: from the method `buffers`.
          dtype: of the pieces; None: as they are read.

        Raises:
          UserError: a value is too large for `dtype`.
        """
        leaf = registry.parameters(self.config)[tensor.path]
        dtype = self.leaves[tensor.path].dtype if dtype is None else np.dtype(dtype)
        for index in names.pieces(leaf, tensor.layer or 0):
            piece = self.read(tensor.path, index, buffers)
            if digest is not None:
                digest.add(tensor.path, tuple(axis.start for axis in index), piece)
            piece = piece[0] if leaf.stacked else piece
            piece = piece.T if leaf.transposed else piece
            if leaf.transposed or piece.dtype != dtype:
                rows = buffers.empty(piece.shape, dtype)
                names.convert(rows, piece, f"{self.path}: tensor {leaf.tensors[tensor.layer or 0]}")
                piece = rows
            yield piece

    def check(self, digest: Digest) -> None:
        """Raises UserError where what was read, all of it, is not what was saved."""
        if self.digest not in (None, digest.hexdigest()):
            raise _damaged(self.path)


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What the adapters in a checkpoint belong to.

    Attributes:
      rank, alpha: of the adapters; the merged matrix is W + alpha / rank * A @ B.
      base_path: folder or hub id of the base.
      base_digest: digest of the base's parameters as they are stored there.
    """

    rank: int
    alpha: float
    base_path: str
    base_digest: str


class TrainingState(NamedTuple):
    """What a step of training saves: parameters, optimizer state, and where training stands (JSON)."""

    params: Any
    opt_state: Any
    progress: dict


def build_tokenizer(assets: Mapping[str, bytes], source: str) -> PreTrainedTokenizerFast:
    """The tokenizer in the files `assets` of the checkpoint `source`; needs no network and runs no code of theirs.

    Raises:
      UserError: the tokenizer's files are missing or damaged.
    """
    kind = PreTrainedTokenizerFast
    if "tokenizer.json" in assets:
        try:
            foreign.check_tokenizer_file(assets["tokenizer.json"])
        except foreign.ForeignError as error:
            raise UserError(f"{source}: unreadable tokenizer.json ({error}); copy it again") from error
    elif {"vocab.json", "merges.txt"} <= assets.keys():
        kind = Qwen2TokenizerFast  # Dream's tokenizer is Qwen's, and is published in these files only
    else:
        raise UserError(f"{source}: no tokenizer.json; copy the tokenizer files of the published model into the folder")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in assets.items():
            # Without config.json, whose `auto_map` makes transformers ask whether it may run the model's own code.
            if name != huggingface.CONFIG_FILE and not name.endswith(".py"):
                (Path(folder) / name).write_bytes(content)
        try:
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
        except BaseException as error:
            reason = foreign.failure(error)
            if not reason:
                raise
            raise UserError(f"{source}: unreadable tokenizer files ({reason}); copy them again") from error
    # Texts are cut by the settings of a run; what stands in the file may be no number.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def load_config(path: str | os.PathLike, flag: str = "--config.model.path") -> tuple[ModelConfig, dict[str, bytes]]:
    """The architecture and the assets of a model in any form that `load_model` takes, without its weights.

    Args:
      path: see load_model.
      flag: the flag or config key that named `path`, for errors.

    Raises:
      UserError: there is no model at `path`, or its config.json is missing, damaged or not supported.
    """
    folder = locate(path, flag, weights=False)
    if is_checkpoint(folder):
        return _read_assets(folder, _read_manifest(folder))
    assets = huggingface.read_assets(Path(folder))
    return huggingface.parse_config(assets, str(folder / huggingface.CONFIG_FILE)), assets


def load_model(
    path: str | os.PathLike,
    *,
    param_dtype: DTypeLike | None = None,
    shardings: dict | None = None,
    flag: str = "--config.model.path",
) -> Model:
    """Loads a model; what `path` is, is recognised by its content.

    Args:
      path: a folder of Hugging Face safetensors, a hub id, a converted checkpoint, one step of a training run, or the
        working folder of a training run (its latest step).
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

    if not is_checkpoint(folder):
        published = huggingface.open_folder(Path(folder))
        params = huggingface.load_params(published, dtype, sharding_of)
        return Model(published.config, params, huggingface.read_assets(published.path), str(folder))

    manifest = _read_manifest(folder)
    config, assets = _read_assets(folder, manifest)
    if manifest.lora is not None:
        return Model(config, _load_merged(folder, manifest, config, dtype, sharding_of), assets, str(folder))
    stored, leaves = manifest.trees["params"], registry.parameters(config)
    _check_arrays(folder / "params", stored, {leaf_path: leaf.shape for leaf_path, leaf in leaves.items()})
    abstract = {
        leaf_path: jax.ShapeDtypeStruct(
            leaf.shape, stored.dtypes[leaf_path] if dtype is None else dtype, sharding=sharding_of(leaf_path)
        )
        for leaf_path, leaf in leaves.items()
    }
    params = _restore_tree(folder / "params", stored, names.unflatten(abstract))
    for leaf_path, leaf in leaves.items():
        check_finite(names.get(params, leaf_path), [f"{folder}: tensor {name}" for name in leaf.tensors])
    return Model(config, params, assets, str(folder))


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
    if is_checkpoint(folder) and _read_manifest(folder).lora is not None:
        raise UserError(
            f"{flag}={path}: holds adapters, and a whole model is needed; merge them into their base first:\n"
            f"python -m conversion.to_hf {shlex.quote(f'--source={path}')} --out=FOLDER"
        )
    source = open_source(path, flag=flag)
    digest, params = Digest(source.leaves), {}
    for leaf_path, leaf in _read_leaves(source, digest, lambda leaf_path: names.get(shardings, leaf_path)):
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
    name = source.path if _absolute(path).exists() else str(path)
    return names.unflatten(params), name, digest.hexdigest()


def manifest_digest(path: str | os.PathLike, flag: str = "--config.model.path") -> str:
    """What the manifest at `path` (see `load_model`) says of the parameters' bits, adapters' base and scale included.

    No values are read: loading checks that they are those of the manifest. A published folder has no digest: "".

    Raises:
      UserError: there is no model at `path`, or its manifest is damaged.
    """
    folder = locate(path, flag, weights=True)
    if not is_checkpoint(folder):
        return ""
    manifest = _read_manifest(folder)
    adapted = {} if manifest.lora is None else dataclasses.asdict(manifest.lora)
    words = (manifest.trees["params"].digest, *(adapted.get(name) for name in ("rank", "alpha", "base_digest")))
    return _checksum(json.dumps(words).encode())


def read_digest(path: str | os.PathLike, dtype: DTypeLike, shardings: dict, flag: str = "--config.model.path") -> str:
    """The digest of the parameters that `load_model` would give of a published folder, one leaf after the other.

    Raises:
      UserError: see `load_model`.
    """
    source = open_source(path, dtype=dtype, flag=flag)
    digest = Digest(source.leaves)
    leaves = _read_leaves(source, digest, lambda leaf_path: names.get(shardings, leaf_path))
    collections.deque(leaves, maxlen=0)  # keeps none
    return digest.hexdigest()


def weight_files(path: str | os.PathLike, flag: str = "--config.model.path") -> list[epath.Path]:
    """The files that hold the parameters at `path` (see `load_model`); of a checkpoint of ours, its manifest.

    Raises:
      UserError: there is no model at `path`.
    """
    folder = locate(path, flag, weights=True)
    return [folder / "assets" / MANIFEST_FILE] if is_checkpoint(folder) else sorted(folder.glob("*.safetensors"))


def _load_merged(
    folder: epath.Path,
    manifest: "_Manifest",
    config: ModelConfig,
    dtype: np.dtype | None,
    sharding_of: Callable[[TreePath], jax.sharding.Sharding],
) -> dict:
    """The base of the adapters at `folder` with the adapters merged into it, in `dtype` or the base's own."""
    adaptation, stored = manifest.lora, manifest.trees["params"]
    try:
        base = locate(adaptation.base_path, "base", weights=True)
        if is_checkpoint(base) and _read_manifest(base).lora is not None:
            raise UserError(f"{base} holds adapters itself")  # its own folder, perhaps
        source = open_source(base, flag="base")
    except UserError as error:
        raise UserError(
            f"{folder}: holds adapters, whose base is not usable: {str(error).splitlines()[0]}\n"
            f"Put it there, or write where it is now into {folder / 'assets' / MANIFEST_FILE} (lora, base_path)"
        ) from error
    leaf_shapes = names.unflatten(dict(source.leaves))
    expected = _by_path(lora.abstract_adapters(leaf_shapes, adaptation.rank, np.float32))
    _check_arrays(folder / "params", stored, {path: leaf.shape for path, leaf in expected.items()})

    def everywhere(path: TreePath) -> jax.sharding.Sharding:
        sharding = sharding_of((*path[:-1], "kernel"))
        mesh = getattr(sharding, "mesh", None)
        return sharding if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, stored.dtypes[path], sharding=everywhere(path))
        for path, leaf in expected.items()
    }
    adapters = _restore_tree(folder / "params", stored, names.unflatten(abstract))
    digest, params, scale = Digest(source.leaves), {}, adaptation.alpha / adaptation.rank
    for path, leaf in _read_leaves(source, digest, sharding_of):
        to = leaf.dtype if dtype is None else dtype
        merge = jax.jit(
            lambda w, adapter, to=to: lora.merge(w, **adapter, scale=scale, dtype=to) if adapter else w.astype(to),
            out_shardings=leaf.sharding,
        )
        params[path] = merge(leaf, names.get(adapters, path[:-1]) if lora.is_matrix(path) else {})
        tensors = registry.parameters(config)[path].tensors
        check_finite(params[path], [f"{folder}: with its base {source.path}: tensor {name}" for name in tensors])
        del leaf
    if digest.hexdigest() != adaptation.base_digest:
        raise _other_base(folder, adaptation, source.path, digest.hexdigest())
    return names.unflatten(params)


def _read_leaves(
    source: Source, digest: Digest, sharding_of: Callable[[TreePath], jax.sharding.Sharding]
) -> Iterator[tuple[TreePath, jax.Array]]:
    """The parameters of `source` one by one, in their stored dtypes; each is added to `digest`."""

    def read(path: TreePath) -> jax.Array:
        shape = source.leaves[path].shape
        leaf = jax.make_array_from_callback(shape, sharding_of(path), lambda index: source.read(path, index, None))
        digest.add(path, (0,) * leaf.ndim, leaf)
        return leaf

    for path in tqdm(source.leaves, desc="reading weights", unit="leaf", disable=None, leave=False):
        yield path, read(path)  # not kept here: a caller that drops it before the next has one at a time


def _other_base(folder: epath.Path, adaptation: Adaptation, path: str, digest: str) -> UserError:
    return UserError(
        f"{folder}: its adapters were trained on another base (digest {adaptation.base_digest}) than the one at {path} "
        f"(digest {digest}); put the former there"
    )


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
    if not is_checkpoint(folder):
        published = huggingface.open_folder(Path(folder))
        leaves = registry.parameters(published.config)
        stored = {
            path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype or huggingface.stored_dtype(published, leaf)))
            for path, leaf in leaves.items()
        }

        def read_published(path: TreePath, index: names.Index, buffers: Buffers | None) -> np.ndarray:
            return published.read_leaf(leaves[path], index, stored[path].dtype, buffers)

        assets = huggingface.read_assets(published.path)
        return Source(published.config, assets, str(folder), stored, read_published, arrays_per_read=2)

    manifest = _read_manifest(folder)
    config, assets = _read_assets(folder, manifest)
    if manifest.lora is not None:
        return Source.of(load_model(path, param_dtype=dtype, flag=flag))
    tree, stored = folder / "params", manifest.trees["params"]
    _check_arrays(tree, stored, {path: leaf.shape for path, leaf in registry.parameters(config).items()})
    _check_files(tree)
    arrays = {}

    def read(path: TreePath, index: names.Index, buffers: Buffers | None) -> np.ndarray:
        try:
            if path not in arrays:
                arrays[path] = _open_array(tree, path)
            stored = arrays[path][index]
            if buffers is None:
                return stored.read().result()
            out = buffers.empty(stored.shape, stored.dtype.numpy_dtype)
            tensorstore.array(out, copy=False).write(stored.translate_to[(0,) * out.ndim]).result()
            return out
        except ValueError as error:
            raise _unreadable(tree, error) from error

    leaves = {path: jax.ShapeDtypeStruct(shape, stored.dtypes[path]) for path, shape in stored.shapes.items()}
    return Source(config, assets, str(folder), leaves, read, arrays_per_read=1, digest=stored.digest)


def save_model(path: str | os.PathLike, model: Model | Source, overwrite: bool = False) -> None:
    """Writes a model as a checkpoint folder, piece by piece.

    Args:
      path: the new folder.
      overwrite: replace a checkpoint that is already there.

    Raises:
      UserError: `path` exists and may not be replaced.
    """
    folder = _absolute(path)
    check_destination(folder, overwrite, is_checkpoint)
    source = Source.of(model) if isinstance(model, Model) else model
    digest = Digest(source.leaves)
    bar = tqdm(total=source.nbytes, desc="writing parameters", unit="B", unit_scale=True, disable=None, leave=False)

    def manifest() -> dict[str, _StoredTree]:
        source.check(digest)
        return {"params": _StoredTree.of(source.leaves, digest.hexdigest())}

    tree = names.unflatten({path: _Streamed(source, path, digest, bar) for path in source.leaves})
    mask_token_id = unsaid_mask(source.config, source.assets)
    items = {
        "assets": _AssetsSave(source.assets, manifest, mask_token_id=mask_token_id),
        "params": _StreamedTreeSave(tree),
    }
    _remove_unfinished(folder)  # of a save that was killed
    try:
        with (
            writing(folder),
            bar,
            contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as checkpointer,
        ):
            checkpointer.save(folder, args=ocp.args.Composite(**items), force=True)
    except BaseException:  # a full disk, a signal: what there is of the checkpoint only takes room
        _remove_unfinished(folder)
        raise


def _remove_unfinished(folder: epath.Path) -> None:
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.orbax-checkpoint-tmp*"):
        if os.path.islink(left):
            os.unlink(left)
        else:
            left.rmtree()


def check_destination(path: str | os.PathLike, overwrite: bool, same_kind: Callable[[epath.Path], bool]) -> None:
    """Refuses to write a checkpoint over anything but a checkpoint of the same kind, and over that unless asked to.

    Args:
      path: the folder to write.
      overwrite: the user allowed to replace what is there.
      same_kind: whether a folder is of the kind that would replace it.

    Raises:
      UserError: naming `path` and what to do.
    """
    folder = _absolute(path)
    check_writable(folder, "--out")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{path}: exists already; name another folder or pass --overwrite to replace it")
    if not same_kind(folder):
        raise UserError(f"{path}: not a checkpoint that could be replaced; name another folder or remove it")


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether `folder` is a checkpoint of ours: a converted model or a step of training, perhaps damaged."""
    return (folder / "assets" / MANIFEST_FILE).is_file() or (folder / "params" / SIZES_FILE).is_file()


def locate(path: str | os.PathLike, flag: str, weights: bool) -> epath.Path:
    """The folder that `path` means: a checkpoint of ours or a published folder, downloaded if need be.

    Args:
      path: see load_model.
      flag: the flag or config key that named `path`, for errors.
      weights: False: a download may leave out the weights.

    Raises:
      UserError: there is no such folder, or no finished step in it.
    """
    folder = _absolute(path)
    if ocp.utils.is_tmp_checkpoint(folder):
        raise UserError(f"{flag}={path}: an incomplete checkpoint of an interrupted save; choose a finished one")
    if folder.is_dir():
        steps = folder / STEPS_FOLDER
        if not steps.is_dir() or any(folder.glob("*.safetensors")):
            return folder
        complete = [step for step in steps.iterdir() if step.name.isdecimal()]
        if not complete:
            raise UserError(f"{flag}={path}: a training folder without a finished step in {steps}; train it further")
        return max(complete, key=lambda step: int(step.name))
    if folder.exists():
        raise UserError(f"{flag}={path}: a file; expected the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?", str(path)):
        raise UserError(f"{flag}={path}: no such folder; expected a Hugging Face folder, a hub id or a checkpoint")
    return _absolute(huggingface.download(str(path), flag, weights))


class TrainingCheckpoints:
    """The checkpoints/ folder of a training run: one checkpoint per saved step, written in the background."""

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int | None = None,
        adaptation: Adaptation | None = None,
        model: ModelConfig | None = None,
    ):
        """Opens or creates the folder, and removes what an interrupted save left there.

        Args:
          directory: the folder, usually WORKDIR/checkpoints.
          keep: how many of the latest steps to keep; None keeps all.
          adaptation: what `params` belong to if they are adapters.
          model: whose special tokens the run uses; None: those of config.json.
        """
        self._adaptation, self._model = adaptation, model
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, save_root_metadata=False, enable_async_checkpointing=True
        )
        with writing(directory):
            self._manager = ocp.CheckpointManager(_absolute(directory), options=options)

    def save(self, step: int, state: TrainingState, assets: Mapping[str, bytes]) -> None:
        """Starts to save a step; returns when the arrays may be donated or changed, before they are on disk.

        Args:
          step: name of the checkpoint; must be new.
          state: what to save; `progress` must be JSON.
          assets: config.json and tokenizer files of the model, so that the step is a complete model.
        """
        trees = {"params": state.params, "opt_state": state.opt_state}
        stored = {item: _StoredTree.of(_by_path(tree), params_digest(tree)) for item, tree in trees.items()}
        items = {
            "assets": _AssetsSave(
                assets,
                lambda: stored,
                self._adaptation,
                state.progress,
                None if self._model is None else unsaid_mask(self._model, assets),
            ),
            "progress": ocp.args.JsonSave(state.progress),
        }
        items |= {item: _TreeSave(tree, save_args=jax.tree.map(_save_args, tree)) for item, tree in trees.items()}
        with writing(self._manager.directory / str(step)):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, abstract: TrainingState) -> TrainingState:
        """Reads a step back.

        Args:
          step: one of the saved steps.
          abstract: trees of jax.ShapeDtypeStruct with shardings for `params` and `opt_state`; `progress` is not used.

        Raises:
          UserError: a part of the step is missing or damaged, or does not have the expected form.
        """
        folder = self._manager.directory / str(step)
        progress_file = folder / "progress" / "metadata"
        try:
            progress = dict(from_json(progress_file.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{progress_file}: missing or damaged; {_REMEDY}") from error
        manifest, trees = _read_manifest(folder), {}
        ours, theirs = self._adaptation, manifest.lora
        if ours is not None and theirs is not None and ours.base_digest != theirs.base_digest:
            raise _other_base(folder, theirs, ours.base_path, ours.base_digest)
        if ours is not None and theirs is not None and (ours.rank, ours.alpha) != (theirs.rank, theirs.alpha):
            raise UserError(
                f"{folder}: its adapters have rank {theirs.rank} and alpha {theirs.alpha:g}, the config asks for "
                f"rank {ours.rank} and alpha {ours.alpha:g}; choose another --workdir"
            )
        if manifest.progress not in (None, progress):
            raise UserError(f"{progress_file}: damaged: it is not what was saved; {_REMEDY}")
        if not isinstance(progress, dict) or progress.get("step", step) != step:
            raise UserError(f"{folder}: not step {step} but a copy of another: {progress_file} says so; remove it")
        _read_assets(folder, manifest)
        for item in ("params", "opt_state"):
            if item not in manifest.trees:
                raise UserError(f"{folder}: a model without {item}, not a step of training; {_REMEDY}")
            tree, stored = getattr(abstract, item), manifest.trees[item]
            _check_arrays(folder / item, stored, {path: leaf.shape for path, leaf in _by_path(tree).items()})
            trees[item] = _restore_tree(folder / item, stored, tree)
        for path, leaf in _by_path(trees["params"]).items():
            check_finite(leaf, [f"{folder}: array {'/'.join(path)}"])
        return TrainingState(**trees, progress=progress)

    def restore_latest(self, abstract: TrainingState) -> TrainingState:
        """Reads the latest step back, as `restore` does.

        Raises:
          UserError: it cannot be used; the newest step that can is named.
        """
        latest, *earlier = sorted(self._manager.all_steps(), reverse=True)
        try:
            return self.restore(latest, abstract)
        except UserError as error:
            damaged = [latest]
            for step in earlier:
                try:
                    self.restore(step, abstract)
                except UserError:
                    damaged.append(step)
                    continue
                folders = ", ".join(str(self._manager.directory / str(step)) for step in damaged)
                offer = (
                    f"The newest step that is whole is {step}: remove {folders}, and the same command goes on from it"
                )
                raise UserError(f"{error}\n{offer}") from error
            raise UserError(
                f"{error}\nNo earlier step is whole either; remove {self._manager.directory} to start again"
            ) from error

    def latest_step(self) -> int | None:
        """The last step whose checkpoint is complete; None if there is none."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Blocks until every save that was started is on disk; raises what went wrong in one."""
        with writing(self._manager.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does and releases the background threads."""
        with writing(self._manager.directory):
            self._manager.close()


class _AssetsHandler(ocp.CheckpointHandler):
    """Writes plain files, and the manifest once every tree has been written, into an item of a checkpoint."""

    def save(self, directory: epath.Path, args: "_AssetsSave"):
        self._args = args

    def finalize(self, directory: epath.Path) -> None:
        files, trees, adaptation = self._args.files, self._args.trees(), self._args.adaptation
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "assets": sorted(files),
            "checksums": {name: _checksum(content) for name, content in files.items()},
            "progress": self._args.progress,
            "trees": {item: tree.to_json() for item, tree in trees.items()},
        }
        if adaptation is not None:
            manifest["lora"] = dataclasses.asdict(adaptation)
        if self._args.mask_token_id is not None:
            manifest["mask_token_id"] = self._args.mask_token_id
        manifest["checksum"] = _manifest_checksum(json.loads(json.dumps(manifest)))
        for name, content in {**files, MANIFEST_FILE: json.dumps(manifest).encode()}.items():
            (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: Any = None):
        return {file.name: file.read_bytes() for file in directory.iterdir()}


@ocp.args.register_with_handler(_AssetsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _AssetsSave(ocp.args.CheckpointArgs):
    """Saves files, name -> content, through _AssetsHandler, and what the manifest says of the trees, by item."""

    files: Mapping[str, bytes]
    trees: Callable[[], "dict[str, _StoredTree]"]
    adaptation: Adaptation | None = None
    progress: dict | None = None
    mask_token_id: int | None = None  # None: config.json says it


class _ListsSizes(ocp.CheckpointHandler):
    """Adds a list of the sizes of its files to a tree."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        sizes = {str(file.relative_to(directory)): file.stat().length for file in files_in(directory)}
        (directory / SIZES_FILE).write_bytes(json.dumps(sizes).encode())


class _TreeHandler(_ListsSizes, ocp.StandardCheckpointHandler):
    """Orbax's array trees."""


@ocp.args.register_with_handler(_TreeHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _TreeSave(ocp.args.StandardSave):
    """Saves a tree of arrays through _TreeHandler."""


def _save_args(leaf: jax.Array) -> ocp.SaveArgs:
    """Chunks of a device's part of an array: of one layer where there are layers, so that `Source` can read pieces."""
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())


@dataclasses.dataclass(frozen=True)
class _Streamed:
    """The leaf `path` of `source`, in the place of an array in a tree that is saved."""

    source: Source
    path: TreePath
    digest: Digest
    bar: tqdm

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.leaves[self.path].shape

    @property
    def dtype(self) -> np.dtype:
        return self.source.leaves[self.path].dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def write(self, array: tensorstore.TensorStore) -> None:
        """Writes every piece; one is read, one is added to the digest and two are written at a time."""
        leaf = registry.parameters(self.source.config)[self.path]
        indices = (index for layer in range(len(leaf.tensors)) for index in names.pieces(leaf, layer))
        buffers, writing = self.source.buffers(3, published=False), None
        for index, piece in ahead((index, self.source.read(self.path, index, buffers)) for index in indices):
            before, writing = writing, array[index].write(piece, can_reference_source_data_indefinitely=True)
            self.digest.add(self.path, tuple(axis.start for axis in index), piece)
            if before is not None:
                before.result()
            self.bar.update(piece.nbytes)
        writing.result()


def chunk_shape(axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the chunks of a converted model's array, by its logical axes."""
    return tuple(min(size, _CHUNK.get(axis, names.ROWS)) for size, axis in zip(shape, axes, strict=True))


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Writes _Streamed leaves as Orbax writes numpy arrays, but in pieces, uncompressed and in finer chunks."""

    async def serialize(self, values, infos, args=None):
        for value, info in zip(values, infos, strict=True):
            axes = registry.parameters(value.source.config)[value.path].axes
            array = tensorstore.open(
                {
                    "driver": "zarr",
                    # Where Orbax has each process write; it merges these folders when it is done.
                    "kvstore": _kvstore(_absolute(info.parent_dir) / "ocdbt.process_0", info.name),
                    "metadata": {"compressor": None, "chunks": chunk_shape(axes, value.shape)},
                    "store_data_equal_to_fill_value": True,
                },
                dtype=value.dtype.name,
                shape=value.shape,
                create=True,
            ).result()
            value.write(array)
        return []


class _StreamedTreeHandler(_ListsSizes, ocp.PyTreeCheckpointHandler):
    """Trees of _Streamed leaves."""

    def __init__(self):
        registry = ocp.type_handlers.create_type_handler_registry(
            (_Streamed, _StreamedHandler()),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # there are none, but without it Orbax warns
        )
        super().__init__(type_handler_registry=registry)


@ocp.args.register_with_handler(_StreamedTreeHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _StreamedTreeSave(ocp.args.PyTreeSave):
    """Saves a tree of _Streamed leaves through _StreamedTreeHandler."""


# Of what is stored: parameters, and the counters and other state of an optimizer.
_DTYPES = (*huggingface.DTYPE_NAMES, "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32")


@dataclasses.dataclass(frozen=True)
class _StoredTree:
    """What the manifest says of one tree: its digest, and the shape and dtype of each array by its path.

    Orbax's own description of a tree is unreadable on a machine that does not have the devices that wrote it.
    """

    digest: str
    shapes: dict[TreePath, tuple[int, ...]]
    dtypes: dict[TreePath, np.dtype]

    @classmethod
    def of(cls, leaves: Mapping[TreePath, Any], digest: str) -> "_StoredTree":
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        return cls(digest, shapes, {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()})

    def to_json(self) -> dict:
        arrays = {"/".join(path): [shape, self.dtypes[path].name] for path, shape in self.shapes.items()}
        return {"digest": self.digest, "arrays": arrays}

    @classmethod
    def from_json(cls, tree: dict) -> "_StoredTree":
        """Raises ValueError, TypeError or KeyError where it is not of the form that `to_json` gives it."""
        arrays = {tuple(path.split("/")): array for path, array in tree["arrays"].items()}
        shapes = {path: tuple(shape) for path, (shape, _) in arrays.items()}
        if not all(type(size) is int and 0 <= size < 2**63 for shape in shapes.values() for size in shape):
            raise ValueError("a shape")
        if not all(dtype in _DTYPES for _, dtype in arrays.values()):
            raise ValueError("a dtype")
        return cls(_hexadecimal(tree["digest"]), shapes, {path: np.dtype(dtype) for path, (_, dtype) in arrays.items()})


class _Manifest(NamedTuple):
    assets: dict[str, str | None]  # name -> checksum; None in checkpoints of earlier versions, which had none
    trees: dict[str, _StoredTree]
    lora: Adaptation | None  # params are adapters
    progress: dict | None  # what progress/ must say; None where there is none, or as above
    mask_token_id: int | None  # None: config.json says it


def files_in(directory: epath.Path) -> Iterator[epath.Path]:
    """Every file below `directory`, in no particular order."""
    for child in directory.iterdir():
        if child.is_dir():
            yield from files_in(child)
        else:
            yield child


class _LocalPath(type(epath.Path())):
    """A path on this machine for Orbax, whatever its name is; paths that are derived from it are of this kind, too.

    epath itself takes /gs/NAME, /s3/NAME and /hf/NAME for buckets and, in `glob`, a folder's name for a pattern; its
    `stat` fails for owners without a name, which containers and network file systems have.
    """

    _uri_scheme = None

    def glob(self, pattern: str) -> Iterator["_LocalPath"]:
        return map(type(self), glob.glob(os.path.join(glob.escape(str(self)), pattern)))

    def stat(self) -> stat_utils.StatResult:
        found = os.stat(self)
        return stat_utils.StatResult(self.is_dir(), found.st_size, int(found.st_mtime), mode=found.st_mode)


def _absolute(path: str | os.PathLike) -> epath.Path:
    """`path` in the form that Orbax wants."""
    return _LocalPath(os.path.abspath(path))


def _read_manifest(folder: epath.Path) -> _Manifest:
    file = folder / "assets" / MANIFEST_FILE
    try:
        manifest = from_json(file.read_bytes())
        version = manifest["version"]
        if manifest["format"] != _FORMAT or version not in (1, _VERSION):
            raise UserError(
                f"{file}: expected the format {_FORMAT}, version 1 or {_VERSION}, got {shown(manifest['format'])}, "
                f"version {shown(version)}; convert the model again with this version"
            )
        # A manifest of version 1 with a checksum is one of version 2 that was edited.
        if manifest.get("checksum") != (_manifest_checksum(manifest) if version == _VERSION else None):
            raise UserError(f"{file}: damaged: it does not have the checksum of what was saved; {_REMEDY}")
        trees = {item: _StoredTree.from_json(tree) for item, tree in manifest["trees"].items()}
        if "params" not in trees:
            raise KeyError("params")
        adaptation = _adaptation(manifest["lora"]) if "lora" in manifest else None
        checksums = {name: _hexadecimal(value) for name, value in manifest.get("checksums", {}).items()}
        assets = {name: checksums.get(name) for name in manifest["assets"]}
        if "checksums" in manifest and checksums.keys() != assets.keys():
            raise ValueError("an asset without a checksum")
        if any(not name or "/" in name or "\\" in name or name == ".." for name in assets):
            raise ValueError("an asset outside of the checkpoint")
        mask_token_id = manifest.get("mask_token_id")
        if mask_token_id is not None and (type(mask_token_id) is not int or not 0 <= mask_token_id < 2**31):
            raise ValueError("mask_token_id")
        return _Manifest(assets, trees, adaptation, manifest.get("progress"), mask_token_id)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: missing or damaged ({type(error).__name__}); {_REMEDY}") from error


def _manifest_checksum(manifest: dict) -> str:
    """Of all that a manifest says but itself and the place of a base, whose digest says which one it must be."""
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    if isinstance(said.get("lora"), dict):
        said["lora"] = {key: value for key, value in said["lora"].items() if key != "base_path"}
    return _checksum(json.dumps(said, sort_keys=True).encode())


def _adaptation(said: dict) -> Adaptation:
    """Raises ValueError or TypeError where it does not have the form that was saved."""
    found = Adaptation(**said)
    if type(found.rank) is not int or not 0 < found.rank < 2**31:
        raise ValueError("rank")
    if type(found.alpha) not in (int, float) or not abs(found.alpha) < _LARGEST_ALPHA:
        raise ValueError("alpha")
    if not isinstance(found.base_path, str) or not found.base_path or "\0" in found.base_path:
        raise ValueError("base_path")
    _hexadecimal(found.base_digest)
    return found


def _hexadecimal(digest: str) -> str:
    """`digest`, if it is one: 32 hexadecimal digits."""
    if not re.fullmatch("[0-9a-f]{32}", digest):
        raise ValueError("a digest")
    return digest


def _read_assets(folder: epath.Path, manifest: _Manifest) -> tuple[ModelConfig, dict[str, bytes]]:
    """The architecture and the assets of a checkpoint of ours."""
    assets = {}
    for name, checksum in manifest.assets.items():
        file = folder / "assets" / name
        if not file.is_file():
            raise UserError(f"{file}: missing; {_REMEDY}")
        if "://" not in str(folder):
            huggingface.check_link(Path(file), Path(folder))
        assets[name] = file.read_bytes()
        if checksum not in (None, _checksum(assets[name])):
            raise UserError(f"{file}: damaged: it does not have the checksum of what was saved; {_REMEDY}")
    config = huggingface.parse_config(assets, str(folder / "assets" / huggingface.CONFIG_FILE))
    if manifest.mask_token_id is not None:
        config = dataclasses.replace(config, mask_token_id=manifest.mask_token_id, mask_is_chosen=True)
    return config, assets


def unsaid_mask(config: ModelConfig, assets: Mapping[str, bytes]) -> int | None:
    """The mask token of `config`, unless the config.json among `assets` says it, and no user had to."""
    said = huggingface.parse_config(assets, huggingface.CONFIG_FILE).mask_token_id
    return None if config.mask_token_id == said and not config.mask_is_chosen else config.mask_token_id


def _check_arrays(tree: epath.Path, stored: _StoredTree, shapes: Mapping[TreePath, tuple[int, ...]]) -> None:
    """Raises UserError unless the arrays `stored` at `tree` are those of `shapes`, naming the first that is not."""
    for path in sorted(shapes.keys() ^ stored.shapes.keys()):
        what = "is missing" if path in shapes else "belongs to another model or configuration"
        raise UserError(f"{tree}: array {'/'.join(path)[:200]} {what}; {_REMEDY}")
    for path, shape in shapes.items():
        if stored.shapes[path] != shape:
            raise UserError(
                f"{tree}: array {'/'.join(path)}: expected shape {shape}, got {shown(stored.shapes[path])}; {_REMEDY}"
            )


def _restore_tree(tree: epath.Path, stored: _StoredTree, abstract: Any) -> Any:
    """The arrays at `tree`, in the structure, dtypes and shardings of `abstract`.

    They are read as they were stored, so that they must have the digest of what was written, and then converted, one
    after the other.
    """
    _check_files(tree)
    as_stored = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, stored.dtypes[_names(path)], sharding=leaf.sharding),
        abstract,
    )
    try:
        restored = ocp.StandardCheckpointHandler().restore(tree, args=ocp.args.StandardRestore(as_stored))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # for a damaged file Orbax raises anything from ValueError to bare Exception
        raise _unreadable(tree, error) from error
    if params_digest(restored) != stored.digest:
        raise _damaged(str(tree))

    def convert(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == wanted.dtype:
            return leaf
        converted = leaf.astype(wanted.dtype).block_until_ready()
        leaf.delete()  # two copies of one array at a time, not of the tree
        return converted

    return jax.tree.map(convert, restored, abstract)


def _check_files(tree: epath.Path) -> None:
    """Checks that the files of a stored tree are there, whole and indexed, without reading values."""
    sizes_file = tree / SIZES_FILE
    try:
        sizes = from_json(sizes_file.read_bytes())
        if not isinstance(sizes, dict) or any("\0" in name for name in sizes):
            raise ValueError("no sizes of files")
    except (OSError, ValueError) as error:
        raise UserError(f"{sizes_file}: missing or damaged; {_REMEDY}") from error
    for name, size in sizes.items():
        file = tree / name
        found = file.stat().length if file.is_file() else "no file"
        if found != size:
            raise UserError(f"{file}: expected {shown(size)} bytes, got {found}; {_REMEDY}")
    # Listing the store checks its index: one error here, where Orbax would have one for each array.
    try:
        tensorstore.KvStore.open(_kvstore(tree)).result().list().result()
    except ValueError as error:
        raise _unreadable(tree, error) from error


def _kvstore(tree: epath.Path, array: str = "") -> dict:
    """TensorStore's name for the files of a stored tree, or of an array in it."""
    return {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{tree}/"},
        **({"path": f"{array}/"} if array else {}),
    }


def _open_array(tree: epath.Path, path: TreePath) -> tensorstore.TensorStore:
    """The array at `path` of a stored tree, to read from."""
    return tensorstore.open({"driver": "zarr", "kvstore": _kvstore(tree, ".".join(path))}, read=True).result()


def _damaged(where: str) -> UserError:
    return UserError(f"{where}: damaged: its values do not have the digest of what was saved; {_REMEDY}")


def _unreadable(tree: epath.Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{tree}: cannot be read ({reason[:200]}); {_REMEDY}")


def _by_path(tree: Any) -> dict[TreePath, Any]:
    """The leaves by their paths; names, indices and attributes of the tree all become strings."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_names(path): leaf for path, leaf in leaves}


def _names(path: tuple) -> TreePath:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
