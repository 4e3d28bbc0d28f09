"""Our checkpoints, and loading a model from whatever form it is in.

A checkpoint is one Orbax step folder, the same for a converted model and for a step of training:

    params/       the parameter tree, in Orbax's array format
    assets/       config.json and tokenizer files as published, byte for byte, and manifest.json, which marks the format
    opt_state/    training only: optimizer state
    progress/     training only: JSON, where training stands

It refers to nothing outside, so it can be moved. Orbax writes it under a temporary name and renames it when complete.
Orbax's arrays carry no checksum, so each tree has a list of its files' sizes (checked before it is read) and the
manifest has a digest of its bits (checked after it was read), checksums of the assets and a copy of the progress.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerFast

from elbo_kto_jax.checkpoint import huggingface, names
from elbo_kto_jax.checkpoint.digest import params_digest
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.files import check_writable, writing
from elbo_kto_jax.model.config import ModelConfig

MANIFEST_FILE = "manifest.json"
SIZES_FILE = "sizes.json"
STEPS_FOLDER = "checkpoints"
_FORMAT = {"format": "elbo_kto_jax", "version": 1}
_REMEDY = "copy or convert the checkpoint again, or remove it to go on from an earlier step"


@dataclasses.dataclass(frozen=True)
class Model:
    """A mask predictor with everything needed to use it or to publish it again.

    Attributes:
      config: the architecture.
      params: parameter tree (names.parameter_leaves).
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


class TrainingState(NamedTuple):
    """What a step of training saves: parameters, optimizer state, and where training stands (JSON)."""

    params: Any
    opt_state: Any
    progress: dict


def build_tokenizer(assets: Mapping[str, bytes], source: str) -> PreTrainedTokenizerFast:
    """The tokenizer in the files `assets` of the checkpoint `source`; needs no network and runs no code of theirs.

    Raises:
      UserError: tokenizer.json is missing or damaged.
    """
    if "tokenizer.json" not in assets:
        raise UserError(f"{source}: no tokenizer.json; copy the tokenizer files of the published model into the folder")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in assets.items():
            # Without config.json, whose `auto_map` makes transformers ask whether it may run the model's own code.
            if name != huggingface.CONFIG_FILE and not name.endswith(".py"):
                (Path(folder) / name).write_bytes(content)
        try:
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the Rust parser raises bare Exception
            reason = str(error).splitlines()[0]
            raise UserError(f"{source}: unreadable tokenizer files ({reason}); copy them again") from error


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

    def sharding_of(leaf_path: names.TreePath) -> jax.sharding.Sharding:
        if shardings is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return names.get(shardings, leaf_path)

    if not is_checkpoint(folder):
        published = huggingface.open_folder(Path(folder))
        params = huggingface.load_params(published, dtype, sharding_of)
        return Model(published.config, params, huggingface.read_assets(published.path), str(folder))

    manifest = _read_manifest(folder)
    config, assets = _read_assets(folder, manifest)
    stored, leaves = manifest.trees["params"], names.parameter_leaves(config)
    _check_arrays(folder / "params", stored, {leaf_path: leaf.shape for leaf_path, leaf in leaves.items()})
    abstract = {
        leaf_path: jax.ShapeDtypeStruct(
            leaf.shape, stored.dtypes[leaf_path] if dtype is None else dtype, sharding=sharding_of(leaf_path)
        )
        for leaf_path, leaf in leaves.items()
    }
    params = _restore_tree(folder / "params", stored, names.unflatten(abstract))
    return Model(config, params, assets, str(folder))


def save_model(path: str | os.PathLike, model: Model, overwrite: bool = False) -> None:
    """Writes a model as a checkpoint folder.

    Args:
      path: the new folder.
      overwrite: replace a checkpoint that is already there.

    Raises:
      UserError: `path` exists and may not be replaced.
    """
    folder = _absolute(path)
    check_destination(folder, overwrite, is_checkpoint)
    _remove_unfinished(folder)  # of a save that was killed
    try:
        with writing(folder), contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as checkpointer:
            checkpointer.save(folder, args=ocp.args.Composite(**_model_items(model.params, model.assets)), force=True)
    except UserError:  # the disk is full: what there is of the checkpoint only takes room
        _remove_unfinished(folder)
        raise


def _remove_unfinished(folder: epath.Path) -> None:
    for left in folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"):
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
    if "://" not in str(folder):
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
    return epath.Path(huggingface.download(str(path), flag, weights))


class TrainingCheckpoints:
    """The checkpoints/ folder of a training run: one checkpoint per saved step, written in the background."""

    def __init__(self, directory: str | os.PathLike, keep: int | None = None):
        """Opens or creates the folder, and removes what an interrupted save left there.

        Args:
          directory: the folder, usually WORKDIR/checkpoints.
          keep: how many of the latest steps to keep; None keeps all.
        """
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
        items = _model_items(state.params, assets, state.progress, opt_state=state.opt_state)
        items["progress"] = ocp.args.JsonSave(state.progress)
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
            progress = json.loads(progress_file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{progress_file}: missing or damaged; {_REMEDY}") from error
        manifest, trees = _read_manifest(folder), {}
        if manifest.progress not in (None, progress):
            raise UserError(f"{progress_file}: damaged: it is not what was saved; {_REMEDY}")
        _read_assets(folder, manifest)
        for item in ("params", "opt_state"):
            if item not in manifest.trees:
                raise UserError(f"{folder}: a model without {item}, not a step of training; {_REMEDY}")
            tree, stored = getattr(abstract, item), manifest.trees[item]
            _check_arrays(folder / item, stored, {path: leaf.shape for path, leaf in _by_path(tree).items()})
            trees[item] = _restore_tree(folder / item, stored, tree)
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
            raise UserError(f"{error}\nNo earlier step is whole either; --overwrite starts again") from error

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
    """Writes plain files into an item of a checkpoint."""

    def save(self, directory: epath.Path, args: "_AssetsSave"):
        if jax.process_index() == 0:
            for name, content in args.files.items():
                (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: Any = None):
        return {file.name: file.read_bytes() for file in directory.iterdir()}


@ocp.args.register_with_handler(_AssetsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _AssetsSave(ocp.args.CheckpointArgs):
    """Saves files, name -> content, through _AssetsHandler."""

    files: Mapping[str, bytes]


class _TreeHandler(ocp.StandardCheckpointHandler):
    """Orbax's array trees, with a list of the sizes of their files."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        sizes = {str(file.relative_to(directory)): file.stat().length for file in _files(directory)}
        (directory / SIZES_FILE).write_text(json.dumps(sizes))


@ocp.args.register_with_handler(_TreeHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _TreeSave(ocp.args.StandardSave):
    """Saves a tree through _TreeHandler."""


@dataclasses.dataclass(frozen=True)
class _StoredTree:
    """What the manifest says of one tree: its digest, and the shape and dtype of each array by its path.

    Orbax's own description of a tree is unreadable on a machine that does not have the devices that wrote it.
    """

    digest: str
    shapes: dict[names.TreePath, tuple[int, ...]]
    dtypes: dict[names.TreePath, np.dtype]

    @classmethod
    def of(cls, tree: Any) -> "_StoredTree":
        leaves = _by_path(tree)
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        return cls(params_digest(tree), shapes, {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()})

    def to_json(self) -> dict:
        arrays = {"/".join(path): [shape, self.dtypes[path].name] for path, shape in self.shapes.items()}
        return {"digest": self.digest, "arrays": arrays}

    @classmethod
    def from_json(cls, tree: dict) -> "_StoredTree":
        arrays = {tuple(path.split("/")): array for path, array in tree["arrays"].items()}
        shapes = {path: tuple(shape) for path, (shape, _) in arrays.items()}
        return cls(tree["digest"], shapes, {path: np.dtype(dtype) for path, (_, dtype) in arrays.items()})


class _Manifest(NamedTuple):
    assets: dict[str, str | None]  # name -> checksum; None in checkpoints of earlier versions, which had none
    trees: dict[str, _StoredTree]
    progress: dict | None  # what progress/ must say; None where there is none, or as above


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for child in directory.iterdir():
        if child.is_dir():
            yield from _files(child)
        else:
            yield child


def _absolute(path: str | os.PathLike) -> epath.Path:
    """`path` in the form that Orbax wants; gs:// and the like stay as they are."""
    try:
        path = epath.Path(os.path.expanduser(path))
    except KeyError:  # a URI of a kind that epath does not know
        raise UserError(
            f"{path}: no place that can be read; expected a folder, gs://BUCKET/FOLDER or a hub id"
        ) from None
    return path if "://" in str(path) else path.absolute()


def _model_items(
    params: Any, assets: Mapping[str, bytes], progress: dict | None = None, **trees: Any
) -> dict[str, ocp.args.CheckpointArgs]:
    """The items of a checkpoint that make it a model, and further trees to save beside it."""
    trees = {"params": params, **trees}
    manifest = {
        **_FORMAT,
        "assets": sorted(assets),
        "checksums": {name: _checksum(content) for name, content in assets.items()},
        "progress": progress,
        "trees": {item: _StoredTree.of(tree).to_json() for item, tree in trees.items()},
    }
    files = {**assets, MANIFEST_FILE: json.dumps(manifest).encode()}
    return {"assets": _AssetsSave(files), **{item: _TreeSave(tree) for item, tree in trees.items()}}


def _read_manifest(folder: epath.Path) -> _Manifest:
    file = folder / "assets" / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text())
        found = {key: manifest[key] for key in _FORMAT}
        if found != _FORMAT:
            raise UserError(f"{file}: expected {_FORMAT}, got {found}; convert the model again with this version")
        trees = {item: _StoredTree.from_json(tree) for item, tree in manifest["trees"].items()}
        if "params" not in trees:
            raise KeyError("params")
        checksums = dict(manifest.get("checksums", {}))
        assets = {name: checksums.get(name) for name in manifest["assets"]}
        if any(not name or "/" in name or "\\" in name or name == ".." for name in assets):
            raise ValueError("an asset outside of the checkpoint")
        return _Manifest(assets, trees, manifest.get("progress"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: missing or damaged ({type(error).__name__}); {_REMEDY}") from error


def _read_assets(folder: epath.Path, manifest: _Manifest) -> tuple[ModelConfig, dict[str, bytes]]:
    """The architecture and the assets of a checkpoint of ours."""
    assets = {}
    for name, checksum in manifest.assets.items():
        file = folder / "assets" / name
        if not file.is_file():
            raise UserError(f"{file}: missing; {_REMEDY}")
        assets[name] = file.read_bytes()
        if checksum not in (None, _checksum(assets[name])):
            raise UserError(f"{file}: damaged: it does not have the checksum of what was saved; {_REMEDY}")
    return huggingface.parse_config(assets, str(folder / "assets" / huggingface.CONFIG_FILE)), assets


def _check_arrays(tree: epath.Path, stored: _StoredTree, shapes: Mapping[names.TreePath, tuple[int, ...]]) -> None:
    """Raises UserError unless the arrays `stored` at `tree` are those of `shapes`, naming the first that is not."""
    for path in sorted(shapes.keys() ^ stored.shapes.keys()):
        what = "is missing" if path in shapes else "belongs to another model or configuration"
        raise UserError(f"{tree}: array {'/'.join(path)} {what}; {_REMEDY}")
    for path, shape in shapes.items():
        if stored.shapes[path] != shape:
            raise UserError(
                f"{tree}: array {'/'.join(path)}: expected shape {shape}, got {stored.shapes[path]}; {_REMEDY}"
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
        raise UserError(f"{tree}: damaged: its values do not have the digest of what was saved; {_REMEDY}")

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
        sizes = dict(json.loads(sizes_file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{sizes_file}: missing or damaged; {_REMEDY}") from error
    for name, size in sizes.items():
        file = tree / name
        found = file.stat().length if file.is_file() else "no file"
        if found != size:
            raise UserError(f"{file}: expected {size} bytes, got {found}; {_REMEDY}")
    # Listing the store checks its index: one error here, where Orbax would have one for each array.
    base = f"{tree}/" if "://" in str(tree) else {"driver": "file", "path": f"{tree}/"}
    try:
        tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    except ValueError as error:
        raise _unreadable(tree, error) from error


def _unreadable(tree: epath.Path, error: Exception) -> UserError:
    return UserError(f"{tree}: cannot be read ({str(error).splitlines()[0][:200]}); {_REMEDY}")


def _by_path(tree: Any) -> dict[names.TreePath, Any]:
    """The leaves by their paths; names, indices and attributes of the tree all become strings."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_names(path): leaf for path, leaf in leaves}


def _names(path: tuple) -> names.TreePath:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
