"""What a checkpoint carries besides its weights: config.json and the tokenizer, byte for byte as published.

Read from a published folder, and changed for an export only where config.json would not be true of it.
"""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.registry import read_config
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import from_json

CONFIG_FILE = "config.json"
_DTYPE_KEYS = ("torch_dtype", "dtype")  # of config.json: transformers 4 and 5
_OF_MODEL = (CONFIG_FILE, "generation_config.json")
# What a checkpoint carries besides its weights: the configuration, the tokenizer, and the Python files to which the
# `auto_map` of config.json points (copied so that an exported folder is complete; never executed here).
ASSETS = (
    *_OF_MODEL,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py", "generation_utils.py")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's (peft.py)


def read_assets(folder: Path) -> dict[str, bytes]:
    """The configuration and tokenizer files of a published folder, byte for byte.

    Raises:
      UserError: one is a link to a file of somebody else's.
    """
    named = [folder / name for name in ASSETS if (folder / name).is_file()]
    found = named + sorted(file for pattern in CODE for file in folder.glob(pattern) if file.is_file())
    for file in found:
        check_link(file, folder)
    return {file.name: file.read_bytes() for file in found}


def tokenizer_of(assets: Mapping[str, bytes]) -> dict[str, bytes]:
    """The tokenizer's files among `assets`, without the model's."""
    return {name: assets[name] for name in assets if name in ASSETS and name not in _OF_MODEL}


def with_tokenizer(assets: Mapping[str, bytes], other: Mapping[str, bytes]) -> dict[str, bytes]:
    """`assets` with the tokenizer of `other`, if that has one."""
    if "tokenizer.json" not in other:
        return dict(assets)
    tokenizer = tokenizer_of(assets)
    return {name: assets[name] for name in assets if name not in tokenizer} | tokenizer_of(other)


def check_link(file: Path, folder: Path) -> None:
    """Checks that a file of the checkpoint `folder` is not a link out of it: what it holds would be published with it.

    In the hub's cache the files of snapshots/COMMIT are links to ../../blobs.

    Raises:
      UserError: it is one.
    """
    if paths.is_remote(file):
        return
    target, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    if target.is_relative_to(home) or (home.parent.name == "snapshots" and target.parent == blobs):
        return
    raise UserError(f"{file}: a link to {target}, outside of the checkpoint; it is not read: put a copy in its place")


def parse_config(assets: Mapping[str, bytes], where: str) -> ModelConfig:
    """The architecture in the config.json among `assets`; `where` names that file in errors.

    Raises:
      UserError: it is missing, is not JSON, or describes a network that is not implemented.
    """
    if CONFIG_FILE not in assets:
        raise UserError(f"{where}: no such file; a model needs its config.json")
    try:
        mapping = from_json(assets[CONFIG_FILE])
    except ValueError as error:
        raise UserError(f"{where}: not readable as JSON ({error}); download or copy the file again") from error
    if not isinstance(mapping, dict):
        raise UserError(f"{where}: expected a JSON object with the keys of a config.json")
    return read_config(mapping, where)


def with_dtype(assets: Mapping[str, bytes], tensors: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, bytes]:
    """`assets` whose config.json names the dtype of `tensors` (of several: of the most bytes).

    Where it names that one or none, it stays as it is, byte for byte.
    """
    mapping = from_json(assets[CONFIG_FILE])
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype.name] += tensor.size * tensor.dtype.itemsize
    ((dtype, _),) = sizes.most_common(1)
    named = [key for key in _DTYPE_KEYS if mapping.get(key) is not None]
    if all(str(mapping[key]).removeprefix("torch.") == dtype for key in named):
        return dict(assets)
    return _with_keys(assets, dict.fromkeys(named, dtype))


def with_mask(assets: Mapping[str, bytes], mask_token_id: int | None) -> dict[str, bytes]:
    """`assets` whose config.json says the mask token; None: whatever it says, it stays as it is, byte for byte."""
    return dict(assets) if mask_token_id is None else _with_keys(assets, {"mask_token_id": mask_token_id})


def _with_keys(assets: Mapping[str, bytes], changes: Mapping[str, Any]) -> dict[str, bytes]:
    mapping = from_json(assets[CONFIG_FILE]) | changes
    return {**assets, CONFIG_FILE: (json.dumps(mapping, indent=2, ensure_ascii=False) + "\n").encode()}
