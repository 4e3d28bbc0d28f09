"""What a checkpoint says about itself: assets/manifest.json, and the assets beside it.

Orbax's arrays carry no checksum, so the manifest has a digest of each tree's bits (checked after it was read; the sizes
of its files are listed in arrays.py), checksums of the assets and a copy of the progress. It ends with a checksum of
itself, in which only the place of a base is left out, since a base may be moved. Manifests of version 1 had none: they
are read, and what they say is checked for its form alone.
Where adapters are trained (models/lora.py), params/ are those alone, and the manifest says on which base
(`Adaptation`).
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from elbo_kto_jax.checkpoints.assets import CONFIG_FILE, check_link, parse_config
from elbo_kto_jax.checkpoints.folders import MANIFEST_FILE
from elbo_kto_jax.checkpoints.safetensors_file import DTYPE_NAMES
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.table import TreePath
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError, shown
from elbo_kto_jax.runtime.files import from_json

REMEDY = "copy or convert the checkpoint again, or remove it to go on from an earlier step"
_FORMAT = "elbo_kto_jax"
_VERSION = 2  # 1 had no checksum of the manifest
_LARGEST_ALPHA = 1e30  # in manifests without a checksum; float32 has no numbers beyond 3e38
# Of what is stored: parameters, and the counters and other state of an optimizer.
_DTYPES = (*DTYPE_NAMES, "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32")


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What the adapters in a checkpoint belong to.

    Attributes:
      rank, alpha: of the adapters; the merged matrix is W + alpha / rank * A @ B.
      base_path: folder or hub id of the base.
      base_digest: digest of the base's parameters as they are stored there.
      base_quantization: "none" or "int8": what became of the base's matrices before adapters were trained on them.
        Checkpoints of earlier versions do not say it: "none".
      targets: the matrices of a layer that have adapters; (): all.
    """

    rank: int
    alpha: float
    base_path: str
    base_digest: str
    base_quantization: str = "none"
    targets: tuple[str, ...] = ()

    def to_json(self) -> dict:
        """Without what earlier versions did not know, where it has the meaning that it had then."""
        old_meaning = {"base_quantization": "none", "targets": ()}
        return {key: value for key, value in dataclasses.asdict(self).items() if value != old_meaning.get(key)}

    @classmethod
    def from_json(cls, said: dict) -> "Adaptation":
        """Raises ValueError or TypeError where it does not have the form that was saved."""
        found = cls(**{**said, "targets": tuple(said.get("targets", ()))})
        if type(found.rank) is not int or not 0 < found.rank < 2**31:
            raise ValueError("rank")
        if type(found.alpha) not in (int, float) or not abs(found.alpha) < _LARGEST_ALPHA:
            raise ValueError("alpha")
        if not isinstance(found.base_path, str) or not found.base_path or "\0" in found.base_path:
            raise ValueError("base_path")
        if found.base_quantization not in ("none", "int8") or not all(isinstance(name, str) for name in found.targets):
            raise ValueError("base_quantization or targets")
        _hexadecimal(found.base_digest)
        return found


@dataclasses.dataclass(frozen=True)
class StoredTree:
    """What the manifest says of one tree: its digest, and the shape and dtype of each array by its path.

    Orbax's own description of a tree is unreadable on a machine that does not have the devices that wrote it.
    """

    digest: str
    shapes: dict[TreePath, tuple[int, ...]]
    dtypes: dict[TreePath, np.dtype]

    @classmethod
    def of(cls, leaves: Mapping[TreePath, Any], digest: str) -> "StoredTree":
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        return cls(digest, shapes, {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()})

    def to_json(self) -> dict:
        arrays = {"/".join(path): [shape, self.dtypes[path].name] for path, shape in self.shapes.items()}
        return {"digest": self.digest, "arrays": arrays}

    @classmethod
    def from_json(cls, tree: dict) -> "StoredTree":
        """Raises ValueError, TypeError or KeyError where it is not of the form that `to_json` gives it."""
        arrays = {tuple(path.split("/")): array for path, array in tree["arrays"].items()}
        shapes = {path: tuple(shape) for path, (shape, _) in arrays.items()}
        if not all(type(size) is int and 0 <= size < 2**63 for shape in shapes.values() for size in shape):
            raise ValueError("a shape")
        if not all(dtype in _DTYPES for _, dtype in arrays.values()):
            raise ValueError("a dtype")
        return cls(_hexadecimal(tree["digest"]), shapes, {path: np.dtype(dtype) for path, (_, dtype) in arrays.items()})


class Manifest(NamedTuple):
    """What a manifest says, checked for its form."""

    assets: dict[str, str | None]  # name -> checksum; None in checkpoints of earlier versions, which had none
    trees: dict[str, StoredTree]
    lora: Adaptation | None  # params are adapters
    progress: dict | None  # what progress/ must say; None where there is none, or as above
    mask_token_id: int | None  # None: config.json says it


def read_manifest(folder: epath.Path) -> Manifest:
    """The manifest of the checkpoint `folder`, whose every part has the form that was saved.

    Raises:
      UserError: it is missing, damaged, or of another version.
    """
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
        if manifest.get("checksum") != (manifest_checksum(manifest) if version == _VERSION else None):
            raise UserError(f"{file}: damaged: it does not have the checksum of what was saved; {REMEDY}")
        trees = {item: StoredTree.from_json(tree) for item, tree in manifest["trees"].items()}
        if "params" not in trees:
            raise KeyError("params")
        adaptation = Adaptation.from_json(manifest["lora"]) if "lora" in manifest else None
        checksums = {name: _hexadecimal(value) for name, value in manifest.get("checksums", {}).items()}
        assets = {name: checksums.get(name) for name in manifest["assets"]}
        if "checksums" in manifest and checksums.keys() != assets.keys():
            raise ValueError("an asset without a checksum")
        if any(not name or "/" in name or "\\" in name or name == ".." for name in assets):
            raise ValueError("an asset outside of the checkpoint")
        mask_token_id = manifest.get("mask_token_id")
        if mask_token_id is not None and (type(mask_token_id) is not int or not 0 <= mask_token_id < 2**31):
            raise ValueError("mask_token_id")
        return Manifest(assets, trees, adaptation, manifest.get("progress"), mask_token_id)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: missing or damaged ({type(error).__name__}); {REMEDY}") from error


def manifest_checksum(manifest: dict) -> str:
    """Of all that a manifest says but itself and the place of a base, whose digest says which one it must be."""
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    if isinstance(said.get("lora"), dict):
        said["lora"] = {key: value for key, value in said["lora"].items() if key != "base_path"}
    return checksum_of(json.dumps(said, sort_keys=True).encode())


def checksum_of(content: bytes) -> str:
    """Of a file's content: 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _hexadecimal(digest: str) -> str:
    """`digest`, if it is one: 32 hexadecimal digits."""
    if not re.fullmatch("[0-9a-f]{32}", digest):
        raise ValueError("a digest")
    return digest


def stored_assets(folder: epath.Path, manifest: Manifest) -> tuple[ModelConfig, dict[str, bytes]]:
    """The architecture and the assets of the checkpoint of ours at `folder`, which has this manifest.

    Raises:
      UserError: a file is missing, or is not what was saved.
    """
    assets = {}
    for name, checksum in manifest.assets.items():
        file = folder / "assets" / name
        if not file.is_file():
            raise UserError(f"{file}: missing; {REMEDY}")
        if not paths.is_remote(folder):
            check_link(Path(file), Path(folder))
        assets[name] = file.read_bytes()
        if checksum not in (None, checksum_of(assets[name])):
            raise UserError(f"{file}: damaged: it does not have the checksum of what was saved; {REMEDY}")
    config = parse_config(assets, str(folder / "assets" / CONFIG_FILE))
    if manifest.mask_token_id is not None:
        config = dataclasses.replace(config, mask_token_id=manifest.mask_token_id, mask_is_chosen=True)
    return config, assets


def unsaid_mask(config: ModelConfig, assets: Mapping[str, bytes]) -> int | None:
    """The mask token of `config`, unless the config.json among `assets` says it, and no user had to."""
    said = parse_config(assets, CONFIG_FILE).mask_token_id
    return None if config.mask_token_id == said and not config.mask_is_chosen else config.mask_token_id


def other_base(folder: epath.Path, adaptation: Adaptation, path: str, digest: str) -> UserError:
    """The error for adapters at `folder` whose base is not the one at `path`, which has another digest."""
    return UserError(
        f"{folder}: its adapters were trained on another base (digest {adaptation.base_digest}) than the one at {path} "
        f"(digest {digest}); put the former there"
    )


class _AssetsHandler(ocp.CheckpointHandler):
    """Writes plain files, and the manifest once every tree has been written, into an item of a checkpoint."""

    def save(self, directory: epath.Path, args: "AssetsSave"):
        self._args = args

    def finalize(self, directory: epath.Path) -> None:
        files, trees, adaptation = self._args.files, self._args.trees(), self._args.adaptation
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "assets": sorted(files),
            "checksums": {name: checksum_of(content) for name, content in files.items()},
            "progress": self._args.progress,
            "trees": {item: tree.to_json() for item, tree in trees.items()},
        }
        if adaptation is not None:
            manifest["lora"] = adaptation.to_json()
        if self._args.mask_token_id is not None:
            manifest["mask_token_id"] = self._args.mask_token_id
        manifest["checksum"] = manifest_checksum(json.loads(json.dumps(manifest)))
        for name, content in {**files, MANIFEST_FILE: json.dumps(manifest).encode()}.items():
            (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: Any = None):
        return {file.name: file.read_bytes() for file in directory.iterdir()}


@ocp.args.register_with_handler(_AssetsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class AssetsSave(ocp.args.CheckpointArgs):
    """Saves files, name -> content, through _AssetsHandler, and what the manifest says of the trees, by item."""

    files: Mapping[str, bytes]
    trees: Callable[[], dict[str, StoredTree]]
    adaptation: Adaptation | None = None
    progress: dict | None = None
    mask_token_id: int | None = None  # None: config.json says it
