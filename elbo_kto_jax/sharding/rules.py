"""Two tables: parameter path -> logical axes -> mesh axes; everything that is sharded follows them.

The mesh has the axes data, fsdp and tensor. Rows of a micro-batch are split over (data, fsdp); parameters, gradients
and optimizer state over fsdp (their model dimension) and tensor (heads, MLP width, vocabulary). A parameter without
a line, a line without a parameter and a dimension that does not divide are errors; replication is written down, never
fallen back to.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool

from elbo_kto_jax import config
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.model.config import ModelConfig

# First match wins; the path is the whole path of the parameter.
PARAMETER_AXES = (
    (r"wte/embedding", ("vocabulary", "model")),
    (r"blocks/(attn_norm|ff_norm)/scale", ("layers", "norm")),
    (r"blocks/q_proj/kernel", ("layers", "model", "heads")),
    (r"blocks/(k_proj|v_proj)/kernel", ("layers", "model", "kv_heads")),
    (r"blocks/attn_out/kernel", ("layers", "heads", "model")),
    (r"blocks/(ff_proj|up_proj)/kernel", ("layers", "model", "mlp")),
    (r"blocks/ff_out/kernel", ("layers", "mlp", "model")),
    (r"ln_f/scale", ("norm",)),
    (r"head/kernel", ("model", "vocabulary")),
)
_MATRICES = tuple(line for line in PARAMETER_AXES if line[0].startswith("blocks/") and line[0].endswith("/kernel"))
# What model/lora.py puts beside a matrix of the blocks lies as that matrix does; the rank is never split.
QUANTIZED_AXES = tuple((f"{matrix}_scale", (axes[0], axes[2])) for matrix, axes in _MATRICES)
ADAPTER_AXES = (
    *((matrix.replace("kernel", "lora_a"), (*axes[:2], "rank")) for matrix, axes in _MATRICES),
    *((matrix.replace("kernel", "lora_b"), (axes[0], "rank", axes[2])) for matrix, axes in _MATRICES),
)
_TABLES = (PARAMETER_AXES, QUANTIZED_AXES, ADAPTER_AXES)
MESH_AXES = {
    "rows": ("data", "fsdp"),
    "layers": None,
    "norm": None,
    "rank": None,
    "model": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocabulary": "tensor",
}


def make_mesh(sizes: config.Mesh, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices; a size of -1 takes what the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = {"data": sizes.data, "fsdp": sizes.fsdp, "tensor": sizes.tensor}
    given = math.prod(size for size in shape.values() if size != -1)
    shape = {name: len(devices) // given if size == -1 else size for name, size in shape.items()}
    if math.prod(shape.values()) != len(devices):
        raise UserError(f"config.mesh: {dict(shape)} does not use exactly the {len(devices)} devices of this run")
    return jax.make_mesh(tuple(shape.values()), tuple(shape), (AxisType.Auto,) * 3, devices=np.asarray(devices))


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a micro-batch are split."""
    return math.prod(mesh.shape[axis] for axis in MESH_AXES["rows"])


def row_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(MESH_AXES["rows"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array on the devices; each process hands over only what its own devices hold, and need not know the rest."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def own_rows(mesh: Mesh, rows: int) -> Bool[np.ndarray, " m"]:
    """Which of the `rows` rows of a micro-batch are on devices of this process."""
    own = np.zeros(rows, bool)
    for (index,) in row_sharding(mesh).addressable_devices_indices_map((rows,)).values():
        own[index] = True
    return own


def check_heads(model: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError where the tensor axis would split a head."""
    for name in ("n_heads", "n_kv_heads"):
        if getattr(model, name) % mesh.shape["tensor"]:
            raise UserError(
                f"config.mesh.tensor: {mesh.shape['tensor']} does not divide {name} {getattr(model, name)} of the model"
            )


def line_of(name: str) -> tuple[str, tuple[str, ...]]:
    """The line of a table for the parameter with this path: its pattern and logical axes."""
    line = next((line for table in _TABLES for line in table if re.fullmatch(line[0], name)), None)
    if line is None:
        raise ValueError(f"parameter {name} has no line in a table of sharding/rules.py")
    return line


def param_shardings(abstract_params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each parameter of the tree (arrays or ShapeDtypeStructs): a model, its adapters, or both.

    Raises:
      UserError: a dimension is not divisible by its mesh axis.
      ValueError: a parameter has no line in a table, or a line no parameter though others of its table have.
    """
    used = set()

    def sharding(path, leaf):
        name = "/".join(key.key for key in path)
        pattern, axes = line_of(name)
        used.add(pattern)
        if len(axes) != len(leaf.shape):
            raise ValueError(f"parameter {name}: axes {axes} do not describe the shape {leaf.shape}")
        spec = [MESH_AXES[axis] for axis in axes]
        for dimension, axis, mesh_axis in zip(leaf.shape, axes, spec, strict=True):
            if mesh_axis is not None and dimension % mesh.shape[mesh_axis]:
                raise UserError(
                    f"config.mesh.{mesh_axis}: {mesh.shape[mesh_axis]} does not divide the axis `{axis}` "
                    f"({dimension}) of parameter {name}"
                )
        return NamedSharding(mesh, P(*spec))

    shardings = jax.tree_util.tree_map_with_path(sharding, abstract_params)
    for table in _TABLES:
        unused = [pattern for pattern, _ in table if pattern not in used]
        if 0 < len(unused) < len(table):
            raise ValueError(f"lines of sharding/rules.py without a parameter: {unused}")
    return shardings
