"""Logical axes -> mesh axes; everything that is sharded follows this table.

Which logical axes a parameter has is said by its architecture's table (models/axes.py).

The mesh has the axes data, fsdp and tensor. Rows of a micro-batch are split over (data, fsdp); parameters, gradients
and optimizer state over fsdp (their model dimension) and tensor (heads, MLP width, vocabulary). A parameter without
a row, a row without a parameter and a dimension that does not divide are errors; replication is written down, never
fallen back to.

On a TPU whose chips form a square, fsdp becomes two axes of the mesh, fsdp_x and fsdp_y, one for each axis of the
torus: over one flat axis of 16, 64 or 256 chips XLA replaces every reduce-scatter by an all-reduce of twice the bytes.
"""

import contextlib
import math
import os
from collections.abc import Collection, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool

from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError

MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
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


def split_cpu(sizes: config.Mesh) -> None:
    """Lets jax see the CPU as the devices of the mesh, where every size is given; accelerators are not touched.

    A device for each core does more than one device whose threads share every small product (docs/troubleshooting.md).
    Left as it is where there are fewer cores, or several processes. Must come before anything runs on a device.
    """
    devices = sizes.data * sizes.fsdp * sizes.tensor
    given = min(sizes.data, sizes.fsdp, sizes.tensor) > 0 and 1 < devices <= (os.cpu_count() or 1)
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if given and not chosen and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # too late; make_mesh says what there is
            jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(sizes: config.Mesh, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices; a size of -1 takes what the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape: dict[str, int] = {"data": sizes.data, "fsdp": sizes.fsdp, "tensor": sizes.tensor}
    given = math.prod(size for size in shape.values() if size != -1)
    shape = {name: len(devices) // given if size == -1 else size for name, size in shape.items()}
    if math.prod(shape.values()) != len(devices):
        raise UserError(f"config.mesh: {dict(shape)} does not use exactly the {len(devices)} devices of this run")
    side = _torus_side(devices)
    if side and shape["fsdp"] == len(devices):
        shape = {"data": 1, "fsdp_x": len(devices) // side, "fsdp_y": side, "tensor": 1}
    auto = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), auto, devices=devices)


def _torus_side(devices: list[jax.Device]) -> int:
    """Chips along each of the longest two axes of a TPU's torus, where those are equal and at least 4; else 0."""
    if devices[0].platform != "tpu":
        return 0
    *_, second, longest = sorted(len({device.coords[axis] for device in devices}) for axis in range(3))
    return longest if second == longest >= 4 else 0


def mesh_axes(axis: str, mesh: Mesh) -> tuple[str, ...]:
    """The axes of `mesh` over which a logical axis is split, the major one first."""
    found = MESH_AXES[axis] or ()
    names = (found,) if isinstance(found, str) else found
    return tuple(name for name in mesh.axis_names if name.partition("_")[0] in names)


def spec(axes: Sequence[str | None], mesh: Mesh, among: Collection[str] | None = None) -> P:
    """The partition of an array with these logical axes over the mesh, or over only those of its axes in `among`."""

    def entry(axis):
        names = [name for name in mesh_axes(axis, mesh) if among is None or name in among] if axis else []
        return names[0] if len(names) == 1 else tuple(names) or None

    return P(*map(entry, axes))


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a micro-batch are split."""
    return math.prod(mesh.shape[name] for name in mesh_axes("rows", mesh))


def row_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec(["rows"], mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place(x: np.ndarray | np.generic | jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array on the devices; each process hands over only what its own devices hold, and need not know the rest.

    One that lies there already is returned as it is.
    """
    if isinstance(x, jax.Array):
        return x
    host = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: host[index])


def own_rows(mesh: Mesh, rows: int) -> Bool[np.ndarray, " m"]:
    """Which of the `rows` rows of a micro-batch are on devices of this process."""
    own = np.zeros(rows, bool)
    for index in row_sharding(mesh).addressable_devices_indices_map((rows,)).values():
        own[index] = True
    return own
