"""Parameters inside a shard_map over the rows: each device holds a part, and gathers a layer when it needs it.

Written down rather than left to the compiler, which sums a weight's gradient everywhere before it keeps a part of it:
here a gradient is summed and split in one go. What travels has the dtype of the activations.

Where fsdp is two axes of the mesh, a layer is gathered along both at once, which keeps the links of both axes busy. Of
a gradient, half goes along one axis and then along the other, and half the other way round: of a sum along both at once
XLA would make an all-reduce, twice the traffic. It goes in single sends, since for a reduce-scatter a TPU v5e waits.
The gradient of a layer's matrix is a product, and is worked out in the pieces that are sent: while one travels, the
next is computed (`product`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from elbo_kto_jax.runtime.arrays import AnyArray
from elbo_kto_jax.sharding import rules

AxesOf = Callable[[str], tuple[str, ...]]  # path of a parameter -> its logical axes (models/axes.py)


def over_rows(function: Callable, mesh: Mesh, params: Any, axes_of: AxesOf) -> Callable:
    """function(params, rows) as a shard_map in which every device sees its rows and its parts of the parameters.

    The tensor axis is left to the compiler; where it is 1, attention's kernels want it in the shard_map as well.
    """
    manual = {name for name in mesh.axis_names if name != "tensor" or mesh.shape[name] == 1}
    specs = jax.tree_util.tree_map_with_path(lambda path, _: rules.spec(axes_of(_name(path)), mesh, manual), params)
    rows = rules.spec(["rows"], mesh)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=(specs, rows), out_specs=rows, axis_names=manual, check_vma=False
    )
    if not _on_cpu(mesh):
        return mapped
    return lambda params, rows: mapped(jax.tree.map(_widened, params), rows)


def _widened(leaf: Any) -> Any:
    """bfloat16 as float32, anything else as it is."""
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf


def whole(params: Any, mesh: Mesh, dtype: Any, axes_of: AxesOf, prefix: str = "") -> Any:
    """The tree below `prefix`, such as "blocks/", gathered in `dtype`; one layer or all.

    Each device has its part of it along fsdp.
    """

    over = _split_axes(mesh)

    def gathered(path, leaf):
        axes = axes_of(prefix + _name(path))[-leaf.ndim :]
        split = [i for i, axis in enumerate(axes) if axis == "model"] if over else []
        # int8 matrices travel as they are, and the scales of their channels are not to be rounded.
        keeps = leaf.ndim == 1 or leaf.dtype == jnp.int8 or _on_cpu(mesh)

        def gather(part):
            for dimension in split:
                part = _all_gather(part, over, dimension)
            return part

        if not split:
            return leaf
        leaf = leaf if keeps else leaf.astype(dtype)
        if mesh.shape["tensor"] == 1:
            return gather(leaf)
        # The compiler would gather the tensor axis, too, before a collective that is written down.
        by_tensor = rules.spec(axes, mesh, {"tensor"})
        return jax.shard_map(gather, in_specs=by_tensor, out_specs=by_tensor, axis_names={"tensor"}, check_vma=False)(
            leaf
        )

    return jax.tree_util.tree_map_with_path(gathered, params)


def layer(params: Any, mesh: Mesh, dtype: Any, axes_of: AxesOf) -> Any:
    """One layer's parameters, gathered; where fsdp is two axes, each matrix with the device's own part beside it.

    The gradient of such a matrix goes to the part, by `product`. It is then {kernel, kernel_part}.
    """
    gathered = whole(params, mesh, dtype, axes_of, "blocks/")
    if len(_split_axes(mesh)) < 2:
        return gathered

    def with_part(name, leaves):
        if "kernel" not in leaves or leaves["kernel"].dtype == jnp.int8:  # no gradient
            return leaves
        return {**leaves, "kernel": jax.lax.stop_gradient(leaves["kernel"]), "kernel_part": params[name]["kernel"]}

    return {name: with_part(name, leaves) for name, leaves in gathered.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(
    x: Float[Array, "t in"],
    kernel: Float[Array, "in out"],
    part: Float[Array, "part_in part_out"],
    mesh: Mesh,
    precision: jax.lax.Precision | None,
) -> Float[Array, "t out"]:
    """x @ kernel, for a mesh with two fsdp axes.

    The kernel has no gradient: that of `part`, this device's part of it, is summed over all devices instead.
    """
    return jnp.matmul(x, kernel, precision=precision)


def _product_forward(x, kernel, part, mesh, precision):
    return product(x, kernel, part, mesh, precision), (x, kernel, part)


def _product_backward(mesh, precision, residuals, d_out):
    x, kernel, part = residuals
    dimension = 0 if part.shape[0] < kernel.shape[0] else 1
    d_part = summed_product(x, d_out, _split_axes(mesh), dimension, precision)
    return jnp.matmul(d_out, kernel.T, precision=precision), None, d_part.astype(part.dtype)


def summed_product(
    x: Float[Array, "t in"],
    d_out: Float[Array, "t out"],
    axes: tuple[str, ...],
    dimension: int,
    precision: jax.lax.Precision | None,
) -> Float[Array, "part_in part_out"]:
    """`sum_along_both` of x^T d_out, whose pieces are computed as they are sent."""
    split, halved = (x, d_out) if dimension == 0 else (d_out, x)
    split = split.reshape(len(split), *map(jax.lax.axis_size, axes), -1)
    names = "tnp,tc->npc" if dimension == 0 else "tnp,tc->ncp"

    def along(first: str, then: str, half: Float[Array, "t c"]) -> Array:
        def piece(index, before):
            chosen = jax.lax.dynamic_index_in_dim(split, index, 1 + axes.index(first), keepdims=False)
            return jnp.einsum(names, chosen, _after(before, half), precision=precision)

        return ring_reduce_scatter(ring_sum(piece, first), then, 0)

    one, other = jnp.split(halved, [halved.shape[1] // 2], 1)
    major, minor = axes
    return jnp.concatenate([along(major, minor, one), along(minor, major, other)], 1 - dimension)


def _after(before: Array | None, x: Array) -> Array:
    """x, of which nothing is computed before `before` is there: XLA would compute all pieces first, then send them."""
    return x if before is None else jax.lax.optimization_barrier((x, before))[0]


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(part: Shaped[Array, "..."], names: tuple[str, ...], dimension: int) -> Shaped[Array, "..."]:
    """The parts of all devices along these axes of the mesh, the major one first; see the module."""
    return jax.lax.all_gather(part, names, axis=dimension, tiled=True)


def _reduce_scatter(
    names: tuple[str, ...], dimension: int, _: None, whole: Float[Array, "..."]
) -> tuple[Float[Array, "..."]]:
    """The transpose: each device's part of the sum over these devices."""
    if len(names) == 1:
        return (jax.lax.psum_scatter(whole, names[0], scatter_dimension=dimension, tiled=True),)
    major, minor = names
    return (sum_along_both(whole, major, minor, dimension),)


def sum_along_both(whole: Float[Array, "..."], major: str, minor: str, dimension: int) -> Float[Array, "..."]:
    """psum_scatter along two axes. Half of a matrix goes along the one first, half along the other, so that the links
    of both are in use at any time."""
    sizes = jax.lax.axis_size(major), jax.lax.axis_size(minor)
    parts = whole.reshape(*whole.shape[:dimension], *sizes, -1, *whole.shape[dimension + 1 :])
    across = dimension + 3 if dimension + 3 < parts.ndim else 0
    if across == dimension:  # a vector
        return ring_reduce_scatter(ring_reduce_scatter(parts, major, 0), minor, 0)
    one, other = jnp.split(parts, [parts.shape[across] // 2], across)
    one = ring_reduce_scatter(ring_reduce_scatter(one, major, dimension), minor, dimension)
    other = ring_reduce_scatter(ring_reduce_scatter(other, minor, dimension + 1), major, dimension)
    return jnp.concatenate([one, other], across - 2 if across else 0)


def ring_reduce_scatter(parts: Float[Array, "..."], name: str, dimension: int) -> Float[Array, "..."]:
    """Each device's element along `dimension` of the sum over one axis."""
    return ring_sum(lambda index, _: jax.lax.dynamic_index_in_dim(parts, index, dimension, keepdims=False), name)


def ring_sum(part_of: Callable[[Int[Array, ""], Array | None], Array], name: str) -> Float[Array, "..."]:
    """Each device's part of the sum over one axis, in as many sends as it has devices but one.

    The ring goes up by the even devices and comes back by the odd ones, so that no send goes further than two devices:
    where an axis of a TPU is an open line, a send over more of them does not run in the background.

    Args:
      part_of: makes the part of the device with this index, given what is about to be sent (None: nothing yet).
      name: of the axis.
    """
    devices = jax.lax.axis_size(name)
    order = [*range(0, devices, 2), *reversed(range(1, devices, 2))]
    onwards = list(zip(order, order[1:] + order[:1], strict=True))
    place = jnp.asarray(np.argsort(order))[jax.lax.axis_index(name)]

    def device(step: int) -> Int[Array, ""]:
        return jnp.asarray(order)[(place - step) % devices]

    total = part_of(device(1), None)
    for step in range(2, devices + 1):
        part = part_of(device(step), total)
        total = jax.lax.ppermute(total, name, onwards) + part
    return total


_all_gather.defvjp(lambda part, names, dimension: (_all_gather(part, names, dimension), None), _reduce_scatter)


def embed(table: Float[Array, "v part"], tokens: Int[AnyArray, "b s"], mesh: Mesh, dtype: Any) -> Float[Array, "b s d"]:
    """The tokens' embeddings: each device looks up its part for the tokens of all, and they swap the results."""
    names = _split_axes(mesh)
    if not names:
        return table[tokens].astype(dtype)
    everyones = jax.lax.all_gather(tokens, names, axis=0, tiled=True)
    return jax.lax.all_to_all(table[everyones].astype(dtype), names, split_axis=0, concat_axis=2, tiled=True)


def _split_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh over which the model dimension lies in parts, the major one first."""
    return tuple(name for name in rules.mesh_axes("model", mesh) if mesh.shape[name] > 1)


def _on_cpu(mesh: Mesh) -> bool:
    """There parameters enter and travel as float32: XLA for CPUs cannot sum bfloat16 where the compiler has an axis."""
    return mesh.devices.flat[0].platform == "cpu"


def _name(path) -> str:
    return "/".join(key.key for key in path)
