"""Parameter -> logical axes, by the table of its architecture, and its place on a mesh (sharding/rules.py)."""

import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sharding import rules


def check_heads(model: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError where the tensor axis would split a head."""
    for name in ("n_heads", "n_kv_heads"):
        if getattr(model, name) % mesh.shape["tensor"]:
            raise UserError(
                f"config.mesh.tensor: {mesh.shape['tensor']} does not divide {name} {getattr(model, name)} of the model"
            )


@functools.cache
def parameter_axes(model: ModelConfig) -> tuple[dict[str, tuple[str, ...]], ...]:
    """The logical axes of every parameter by its path, in tables of which a tree has all rows or none.

    They are the model's own, and what models/lora.py puts beside a matrix of the blocks: the scales of int8 channels,
    and for each matrix its adapters, and the adapters' scale. These lie as their matrix does; the rank is never split.
    """
    rows = registry.parameters(model).values()
    matrices = [("/".join(row.path), row.axes) for row in rows if row.is_matrix]
    adapters: list[dict[str, tuple[str, ...]]] = []
    for name, (layers, into, out) in matrices:
        a, b = (name.replace("kernel", leaf) for leaf in ("lora_a", "lora_b"))
        adapters += [{a: (layers, into, "rank"), b: (layers, "rank", out)}]
        adapters += [{name.replace("kernel", "lora_scale"): (layers,)}]
    return (
        {"/".join(row.path): row.axes for row in rows},
        {f"{name}_scale": (layers, out) for name, (layers, _, out) in matrices},
        *adapters,
    )


def axes_of(name: str, model: ModelConfig) -> tuple[str, ...]:
    """The logical axes of the parameter with this path.

    Raises:
      ValueError: the model has no such parameter.
    """
    axes = next((table[name] for table in parameter_axes(model) if name in table), None)
    if axes is None:
        raise ValueError(f"parameter {name} has no row in models/{model.architecture}.py")
    return axes


def param_shardings(abstract_params: Any, mesh: Mesh, model: ModelConfig) -> Any:
    """A NamedSharding for each parameter of the tree (arrays or ShapeDtypeStructs): a model, its adapters, or both.

    Raises:
      UserError: a dimension is not divisible by its mesh axis.
      ValueError: a parameter has no row in a table, or a row no parameter though others of its table have.
    """
    used: set[str] = set()

    def sharding(path, leaf):
        name = "/".join(key.key for key in path)
        axes = axes_of(name, model)
        used.add(name)
        if len(axes) != len(leaf.shape):
            raise ValueError(f"parameter {name}: axes {axes} do not describe the shape {leaf.shape}")
        for dimension, axis in zip(leaf.shape, axes, strict=True):
            parts = math.prod(mesh.shape[name] for name in rules.mesh_axes(axis, mesh))
            if dimension % parts:
                raise UserError(
                    f"config.mesh.{rules.MESH_AXES[axis]}: {parts} does not divide the axis `{axis}` "
                    f"({dimension}) of parameter {name}"
                )
        return NamedSharding(mesh, rules.spec(axes, mesh))

    shardings = jax.tree_util.tree_map_with_path(sharding, abstract_params)
    for table in parameter_axes(model):
        unused = [name for name in table if name not in used]
        if 0 < len(unused) < len(table):
            raise ValueError(f"rows of models/{model.architecture}.py without a parameter: {unused}")
    return shardings
