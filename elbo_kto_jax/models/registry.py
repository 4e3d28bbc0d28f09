"""The architectures that are supported: one file each, found by being in this folder (docs/extending.md)."""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import elbo_kto_jax.models
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.table import Table
from elbo_kto_jax.runtime.errors import UserError, shown

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A file of this folder, as its `ARCHITECTURE`.

    Attributes:
      name: of the file; ModelConfig.architecture.
      model_type: what config.json says under this key.
      classes: what config.json may say under `architectures`, for files without a model_type.
      example: a published model of this kind, for messages.
      read: (mapping, where) -> the architecture that the parsed config.json at `where` describes, or a UserError.
      parameters: the table of its parameters.
      published: the config.json of a model with these dimensions; `read` is its inverse.
      sizes: name -> the dimensions of a published model, the first being the one to plan for by default.
      mask_ids: vocab_size -> the mask token of the published model with so many tokens, where only its authors' text
        says it.
      recipe: the one of configs/ whose settings suit it, for commands that are given none.
    """

    name: str
    model_type: str
    classes: tuple[str, ...]
    example: str
    read: Callable[[Mapping[str, Any], str], ModelConfig]
    parameters: Callable[[ModelConfig], Table]
    published: Callable[[ModelConfig], dict[str, Any]]
    sizes: Mapping[str, ModelConfig]
    mask_ids: Mapping[int, int] = dataclasses.field(default_factory=dict)
    recipe: str = "kto_mix"


@functools.cache
def architectures() -> dict[str, Architecture]:
    """Every architecture by its name."""
    modules = [module.name for module in pkgutil.iter_modules(elbo_kto_jax.models.__path__)]
    found = [importlib.import_module(f"{elbo_kto_jax.models.__name__}.{name}") for name in modules]
    return {module.ARCHITECTURE.name: module.ARCHITECTURE for module in found if hasattr(module, "ARCHITECTURE")}


def architecture(config: ModelConfig) -> Architecture:
    """The architecture of a model."""
    return architectures()[config.architecture]


@functools.cache
def parameters(config: ModelConfig) -> Table:
    """Every parameter of a model, by its path."""
    return architecture(config).parameters(config)


def read_config(mapping: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that `mapping`, the parsed config.json at `where`, describes.

    Raises:
      UserError: there is none for it, a key is missing or out of range, or switches on a feature that is not
        implemented.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: expected a JSON object with the keys of a config.json")
    _refuse_experts(mapping, where)
    classes, model_type = _classes(mapping), mapping.get("model_type")
    for candidate in architectures().values():
        if model_type == candidate.model_type or (model_type is None and set(classes) & set(candidate.classes)):
            return candidate.read(mapping, where)
    key = "model_type" if model_type is not None or not classes else "architectures"
    supported = ", ".join(f"{known.model_type!r} ({known.example})" for known in architectures().values())
    raise UserError(f"{where}: `{key}`: expected one of {supported}, got {shown(mapping.get(key))}")


def _classes(mapping: Mapping[str, Any]) -> list[str]:
    classes = mapping.get("architectures")
    return [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []


def _refuse_experts(mapping: Mapping[str, Any], where: str) -> None:
    """Says what a LLaDA-MoE is: its model_type may be 'llada' too, and its other keys are those of another class."""
    classes = _classes(mapping)
    kind = mapping["model_type"] if isinstance(mapping.get("model_type"), str) else ""
    if not any("llada" in name.lower() for name in (kind, *classes)):
        return
    found = [key for key in _EXPERTS if mapping.get(key)]
    found += ["architectures"] if any("moe" in name.lower() for name in classes) else []
    found += ["model_type"] if "moe" in kind.lower() else []
    if found:
        raise UserError(
            f"{where}: `{found[0]}`: {shown(mapping[found[0]])}: this is LLaDA-MoE, a mixture of experts, which is "
            "not supported; choose a LLaDA with dense layers, such as LLaDA-8B"
        )
