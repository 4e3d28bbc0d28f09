"""Adapters as the library PEFT stores them: adapter_config.json and adapter_model.safetensors.

The file has base_model.model.MODULE.lora_A.weight [r in] and base_model.model.MODULE.lora_B.weight [out r] for every
matrix MODULE that has an adapter, by the name of the published model. Ours (models/lora.py) are their transposes, with
the layers stacked. What PEFT has no key for stands in the metadata of the file, which PEFT passes over: the digest of
the base's bits, whether the base was int8, and the mask token, where the user chose it.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from elbo_kto_jax.checkpoints.assets import ADAPTERS
from elbo_kto_jax.checkpoints.manifest import Adaptation
from elbo_kto_jax.checkpoints.safetensors_file import DTYPES, damaged, data_offsets, open_file
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig, Reader
from elbo_kto_jax.models.table import TreePath
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError, shown
from elbo_kto_jax.runtime.files import from_json

CONFIG_FILE, WEIGHTS_FILE = ADAPTERS
BASE_KEY = "base_model_name_or_path"
_METADATA = "elbo_kto_jax"  # the key of ours in the metadata of the file
_PREFIX = "base_model.model."
_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
# What each key of adapter_config.json must say for the adapters to be W + alpha / r B A, and nothing else.
_REQUIRED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
}
_KNOWN = {  # read below, seen in the tensors, or without influence on the function that is computed
    *"""alpha_pattern auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout
    megatron_config megatron_core peft_version qalora_group_size r rank_pattern revision runtime_config target_modules
    task_type use_rslora""".split()  # noqa: SIM905
}
# Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base as well.
_INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")


class PeftConfig(NamedTuple):
    """What adapter_config.json and the metadata say, as far as it is known without the base.

    Attributes:
      adaptation: its targets are not known yet, and its base_digest is "" where the file does not say it.
      mask_token_id: of the model, where its config.json does not say it.
    """

    adaptation: Adaptation
    mask_token_id: int | None


class Slot(NamedTuple):
    """Where a tensor of the file lies in our tree: in layer number `layer` of blocks/`matrix`/`leaf`, transposed."""

    matrix: str
    leaf: str
    layer: int


def is_peft(folder: epath.Path) -> bool:
    """Whether `folder` holds adapters of PEFT's, and no whole model beside them."""
    return (folder / CONFIG_FILE).is_file() and not any(folder.glob("model*.safetensors*"))


def read_config(folder: epath.Path) -> PeftConfig:
    """What the folder says of its adapters.

    Raises:
      UserError: a file is missing or damaged, or the adapters are none that can be represented here.
    """
    file, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    try:
        said = from_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}); download or copy the file again") from error
    if not isinstance(said, dict):
        raise UserError(f"{file}: expected a JSON object with the keys of an adapter_config.json")
    _check_kind(said, str(file))
    rank, alpha = _number(said, "r", (int,), str(file)), _number(said, "lora_alpha", (int, float), str(file))
    _check_patterns(said, str(file))
    alpha = alpha * math.sqrt(rank) if said.get("use_rslora") else alpha  # there the scale is alpha / sqrt(r)
    if not weights.is_file():
        raise UserError(f"{weights}: missing; save the adapters as safetensors, or download or copy the folder again")
    ours = _metadata(weights)
    base = _base(said, str(file))
    digest, quantization = ours.get("base_digest", ""), ours.get("base_quantization", "none")
    return PeftConfig(Adaptation(int(rank), float(alpha), base, digest, quantization), ours.get("mask_token_id"))


def _number(said: Mapping[str, Any], key: str, kinds: tuple[type, ...], where: str) -> float:
    """The positive number at a key.

    Raises:
      UserError: it is missing, or none.
    """
    value: Any = said.get(key)
    if type(value) not in kinds or not 0 < value < 2**31:
        kind = "number" if float in kinds else "integer"
        raise UserError(f"{where}: `{key}`: expected a positive {kind}, got {shown(value)}")
    return value


def _base(said: Mapping[str, Any], where: str) -> str:
    """The folder or hub id of the base, with the revision if one is named.

    Raises:
      UserError: there is none.
    """
    base, revision = said.get(BASE_KEY), said.get("revision")
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(f"{where}: `{BASE_KEY}`: expected the folder or hub id of the base, got {shown(base)}")
    is_pinned = isinstance(revision, str) and revision and not paths.at(base).exists()
    return f"{base}@{revision}" if is_pinned else base


def _check_kind(said: Mapping[str, Any], where: str) -> None:
    """Raises UserError where the adapters are not plain low-rank products beside an unchanged base."""
    if "peft_type" not in said:
        raise UserError(f"{where}: `peft_type` is missing; is this an adapter_config.json of PEFT?")
    Reader(said, where, "LoRA").require(_REQUIRED, {}, _KNOWN)
    initial = said.get("init_lora_weights")
    if not any(initial is known or (isinstance(initial, str) and initial == known) for known in _INITIAL):
        raise UserError(
            f"{where}: `init_lora_weights`: {shown(initial)} changes the base as well; save the adapters as plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _check_patterns(said: Mapping[str, Any], where: str) -> None:
    """Raises UserError where ranks or scales differ between the matrices."""
    for key, number in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = said.get(key) or {}
        if not isinstance(pattern, dict) or any(value != said[number] for value in pattern.values()):
            raise UserError(
                f"{where}: `{key}`: {shown(pattern)}: adapters of different {'ranks' if number == 'r' else 'scales'} "
                f"are not implemented; every matrix must have `{number}` {said[number]}"
            )


def _metadata(weights: epath.Path) -> dict[str, Any]:
    """What we wrote into the metadata of the file; {} for files of others.

    Raises:
      UserError: the file is damaged, or it says what we never write.
    """
    with open_file(paths.at(weights)) as file:
        text = (file.metadata() or {}).get(_METADATA)
    if text is None:
        return {}
    try:
        said = from_json(text)
        mask = said.get("mask_token_id")
        if mask is not None and (type(mask) is not int or not 0 <= mask < 2**31):
            raise ValueError("mask_token_id")
        if not re.fullmatch("([0-9a-f]{32})?", said["base_digest"]):
            raise ValueError("base_digest")
        if said["base_quantization"] not in ("none", "int8"):
            raise ValueError("base_quantization")
        return said
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{weights}: its metadata are damaged ({error!r}); download or copy it again") from error


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor that adapters of a model may have -> where it lies in our tree, in the order of the layers."""
    matrices = [row for row in registry.parameters(config).values() if row.is_matrix]
    return {
        f"{_PREFIX}{row.tensors[layer].removesuffix('weight')}{name}": Slot(row.path[1], leaf, layer)
        for layer in range(config.n_layers)
        for row in matrices
        for leaf, name in _LEAVES.items()
    }


def find_tensors(folder: epath.Path, config: ModelConfig, rank: int) -> dict[TreePath, jax.ShapeDtypeStruct]:
    """Shape and dtype of each leaf of our tree that the folder's tensors make.

    Raises:
      UserError: a tensor is of no matrix that can have an adapter, is missing, or has another shape or dtype.
    """
    file, known, rows = folder / WEIGHTS_FILE, slots(config), registry.parameters(config)
    with open_file(paths.at(file)) as opened:
        found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # it is no dictionary
        headers = {name: (tuple(header.get_shape()), header.get_dtype()) for name, header in found.items()}
    for name in headers:
        if name not in known:
            raise UserError(
                f"{file}: tensor {shown(name)[1:-1]}: no adapter of a matrix of the model's layers; those of the "
                "embedding, the head and other modules are not implemented, and whole modules and biases neither"
            )
    matrices = {known[name].matrix for name in headers}
    if not matrices:
        raise UserError(f"{file}: no adapters; download or copy it again")
    leaves: dict[TreePath, jax.ShapeDtypeStruct] = {}
    for name, slot in known.items():
        if slot.matrix not in matrices:
            continue
        if name not in headers:
            raise UserError(f"{file}: tensor {name} is missing; the adapters of a matrix must be those of every layer")
        n, rows_in, columns = rows["blocks", slot.matrix, "kernel"].shape
        here = (n, rows_in, rank) if slot.leaf == "lora_a" else (n, rank, columns)
        shape, dtype = headers[name]
        if shape != here[:0:-1]:
            raise UserError(f"{file}: tensor {name}: expected shape {here[:0:-1]}, got {shape}")
        if dtype not in DTYPES:
            raise UserError(f"{file}: tensor {name} is stored as {dtype}; expected one of {', '.join(DTYPES)}")
        path = ("blocks", slot.matrix, slot.leaf)
        leaf = leaves.setdefault(path, jax.ShapeDtypeStruct(here, DTYPES[dtype]))
        if leaf.dtype != DTYPES[dtype]:
            raise UserError(
                f"{file}: tensor {name} is {DTYPES[dtype]}, that of another layer {leaf.dtype}; use one dtype"
            )
    return leaves


def read_tensors(folder: epath.Path, config: ModelConfig, leaves: Mapping[TreePath, Any]) -> dict[TreePath, np.ndarray]:
    """The leaves that `find_tensors` found, bit by bit.

    Raises:
      UserError: the file has become shorter.
    """
    stacked, file = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}, folder / WEIGHTS_FILE
    offsets = data_offsets(paths.at(file))
    with file.open("rb") as opened:
        for name, (matrix, leaf, layer) in slots(config).items():
            if ("blocks", matrix, leaf) in stacked:
                to = stacked["blocks", matrix, leaf][layer]
                opened.seek(offsets[name])
                content = opened.read(to.nbytes)
                if len(content) != to.nbytes:
                    raise damaged(paths.at(file), ValueError(f"it ends within tensor {name}"))
                to[...] = np.frombuffer(content, to.dtype).reshape(to.shape[::-1]).T
    return stacked


def config_text(config: ModelConfig, adaptation: Adaptation, matrices: Collection[str], base: str) -> bytes:
    """adapter_config.json; `matrices` have adapters, and `base` is what PEFT is to load, perhaps NAME@REVISION.

    With a task type PEFT would ask the model for methods that a mask predictor does not have. `auto_mapping` says
    instead by which class AutoPeftModel loads the base.
    """
    name, _, revision = base.partition("@")
    is_pinned = bool(revision) and not paths.at(base).exists()
    alpha = adaptation.alpha
    said = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": "AutoModel", "parent_library": "transformers"},
        BASE_KEY: name if is_pinned else base,
        "revision": revision if is_pinned else None,
        "r": adaptation.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(config, set(matrices)),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    return (json.dumps(said, indent=2) + "\n").encode()


def _target_modules(config: ModelConfig, matrices: set[str]) -> list[str]:
    """Names of modules for PEFT, which takes every module whose name ends with one of them.

    The last part of a module's name where that means no other (`q_proj`), else the names of all layers: LLaDA's head is
    a ff_out as its layers' matrices are.
    """
    rows = registry.parameters(config)
    modules = {tensor.rpartition(".")[0]: path for path, row in rows.items() for tensor in row.tensors}
    targets = []
    for path, row in rows.items():
        if not row.is_matrix or path[1] not in matrices:
            continue
        short = row.tensors[0].removesuffix(".weight").rpartition(".")[2]
        meant = {owner[:-1] for module, owner in modules.items() if module.rpartition(".")[2] == short}
        targets += [short] if meant == {path[:-1]} else [tensor.removesuffix(".weight") for tensor in row.tensors]
    return targets


def metadata(adaptation: Adaptation, mask_token_id: int | None) -> dict[str, str]:
    """What stands in the metadata of the file; `mask_token_id`: None where config.json says it."""
    mask = {} if mask_token_id is None else {"mask_token_id": mask_token_id}
    base = {"base_digest": adaptation.base_digest, "base_quantization": adaptation.base_quantization}
    return {_METADATA: json.dumps({**base, **mask})}
