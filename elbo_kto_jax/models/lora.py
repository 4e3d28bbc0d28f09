"""Low-rank adapters on a frozen base, and int8 matrices for that base (arXiv 2106.09685, 2305.14314).

Every matrix of the blocks (q_proj, k_proj, v_proj, attn_out, ff_proj, up_proj, ff_out; neither the embedding nor the
head), or those that config.lora.targets names, becomes W + scale * A @ B, with A random, B zero at the start, and
scale = alpha / rank. The adapters A and B are a tree of their own, so that gradient, optimizer state and checkpoints
hold them alone:

    blocks/{name}/lora_a [n in r]    blocks/{name}/lora_b [n r out]

`Adapted` is a base with adapters. The scale is one of its leaves and not part of the program: with 0 the same compiled
program computes the base, so the reference needs no memory, and a reward is exactly 0 while B is.

An int8 matrix is W = q * s with one scale s per layer and output channel, in the place of the kernel:

    blocks/{name}/kernel int8[n in out]    blocks/{name}/kernel_scale float32[n out]

An int8 base has all matrices of the blocks rounded, whatever has an adapter, and it is the base everywhere: policy and
reference are trained and scored on it, and merging (checkpoints/adapters.py), by which every other command and the
export read adapters, adds them to q * s and not to the matrix that was rounded.
"""

import zlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8

from elbo_kto_jax.runtime.arrays import AnyArray
from elbo_kto_jax.runtime.errors import UserError, shown
from elbo_kto_jax.sharding import gather

Params = Any  # a tree of arrays or of jax.ShapeDtypeStruct
LARGEST = 127  # of an int8 value; -128 is not used, so that signs are symmetric


class Adapted(NamedTuple):
    """A base and its adapters: goes where a tree of parameters does, in `training/step.py`."""

    base: Params
    adapters: Params
    scale: Float32[AnyArray, " n"]  # alpha / rank, the same for every layer; 0: the base alone


class Base(NamedTuple):
    """What adapters are trained on; it is never copied, changed or donated."""

    params: Params
    scale: float  # alpha / rank

    def policy(self, adapters: Params) -> Adapted:
        """The adapted model."""
        return Adapted(self.params, adapters, np.full(_layers(self.params), self.scale, np.float32))

    def reference(self, adapters: Params) -> Adapted:
        """The base itself, in the form of the adapted model; the values of `adapters` do not matter."""
        return Adapted(self.params, adapters, np.zeros(_layers(self.params), np.float32))


def parameters(weights: Adapted | Params) -> Params:
    """The one tree that the model takes: `weights` itself, or the base with the adapters beside its kernels."""
    if not isinstance(weights, Adapted):
        return weights
    blocks = dict(weights.base["blocks"])
    for name, adapter in weights.adapters["blocks"].items():
        blocks[name] = {**blocks[name], **adapter, "lora_scale": weights.scale}
    return {**weights.base, "blocks": blocks}


def split_trained(weights: Adapted | Params) -> tuple[Params, Callable[[Params], Adapted | Params]]:
    """What of `weights` is trained, and the function that puts something else in its place."""
    if isinstance(weights, Adapted):
        return weights.adapters, lambda adapters: weights._replace(adapters=adapters)
    return weights, lambda params: params


class Linear(nn.Module):
    """x @ W for every position, with W as in the docstring of this module: the parameters that are there decide."""

    features: int
    dtype: Any
    param_dtype: Any
    precision: jax.lax.Precision | None
    kernel_init: Callable[..., Array]
    bias_init: Callable[..., Array] | None = None  # None: no bias
    mesh: Mesh | None = None  # over which a kernel was gathered that comes with its part (sharding/gather.py)

    @nn.compact
    def __call__(self, x: Float[Array, "*positions in"]) -> Float[Array, "*positions out"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)

        def given(name):
            return self.get_variable("params", name)

        def times(y, matrix):
            return jnp.matmul(y, matrix.astype(self.dtype), precision=self.precision)

        def scaled(y, scale):
            # In float32: rounding the scale would change every weight in the same direction.
            return (y.astype(jnp.float32) * scale).astype(self.dtype)

        # As one matrix: with two axes to sum over, XLA for CPUs transposes the operands of a weight's gradient, and
        # works out everything before them column by column.
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        if self.has_variable("params", "kernel_part"):
            out = gather.product(rows, kernel.astype(self.dtype), given("kernel_part"), self.mesh, self.precision)
        else:
            out = times(rows, kernel)  # an int8 kernel is exact in every dtype, and scaled afterwards
        if self.has_variable("params", "kernel_scale"):
            out = scaled(out, given("kernel_scale"))
        if self.has_variable("params", "lora_a"):
            out = out + times(scaled(times(rows, given("lora_a")), given("lora_scale")), given("lora_b"))
        if self.bias_init is not None:
            out = out + self.param("bias", self.bias_init, (self.features,), self.param_dtype).astype(self.dtype)
        return out.reshape(*x.shape[:-1], self.features)


def is_matrix(path: tuple[str, ...]) -> bool:
    """Whether the leaf of the base at `path` is one that gets an adapter and may be int8."""
    return path[0] == "blocks" and path[-1] == "kernel"


def abstract_adapters(base: Params, rank: int, dtype: DTypeLike, targets: Collection[str] = ()) -> Params:
    """Shapes and dtypes of the adapters of `base`, which may be abstract; `targets`: of these matrices, not of all.

    Raises:
      UserError: the blocks have no matrix of such a name.
    """
    matrices = {name: layer["kernel"] for name, layer in base["blocks"].items() if "kernel" in layer}
    for name in targets:
        if name not in matrices:
            known = ", ".join(matrices)
            raise UserError(f"config.lora.targets: expected matrices of a layer ({known}), got {shown(name)}")

    def of(kernel) -> Params:
        n, rows, columns = kernel.shape
        shapes = {"lora_a": (n, rows, rank), "lora_b": (n, rank, columns)}
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}

    return {"blocks": {name: of(kernel) for name, kernel in matrices.items() if not targets or name in targets}}


def init_adapters(abstract: Params, shardings: Params, seed: int) -> Params:
    """Adapters that change nothing yet: A normal with variance 1 / in, B zero.

    The numbers depend on the seed and the matrix's name alone, not on the devices.
    """

    def leaf(path, shape, sharding):
        name = "/".join(key.key for key in path)
        values = np.zeros(shape.shape, shape.dtype)
        if name.endswith("lora_a"):
            random = np.random.default_rng([seed, zlib.crc32(name.encode())])
            values = (random.standard_normal(shape.shape, np.float32) / np.sqrt(shape.shape[1])).astype(shape.dtype)
        return jax.make_array_from_callback(shape.shape, sharding, lambda index: values[index])

    return jax.tree_util.tree_map_with_path(leaf, abstract, shardings)


def abstract_base(params: Params, dtype: DTypeLike, quantized: bool) -> Params:
    """Shapes and dtypes of the base made of `params`: in `dtype` what is not int8."""

    def of(path, leaf) -> Params:
        if quantized and is_matrix(path):
            return jax.eval_shape(quantize, leaf)
        return {path[-1]: jax.ShapeDtypeStruct(leaf.shape, dtype)}

    def convert(tree: Params, path: tuple[str, ...] = ()) -> Params:
        out: dict[str, Params] = {}
        for name, child in tree.items():
            out |= {name: convert(child, (*path, name))} if isinstance(child, dict) else of((*path, name), child)
        return out

    return convert(params)


def quantize(kernel: Float[Array, "n in out"]) -> dict[str, Array]:
    """Symmetric int8 with one scale per layer and output channel: no weight is off by more than half a scale.

    The scale is max |w| / 127 over the channel's inputs; a channel of zeros has the scale 0.
    """
    kernel = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(kernel), axis=1, keepdims=True) / LARGEST
    steps = jnp.round(kernel / jnp.where(scale > 0, scale, 1.0))
    return {"kernel": jnp.clip(steps, -LARGEST, LARGEST).astype(jnp.int8), "kernel_scale": scale[:, 0]}


def dequantize(kernel: Int8[Array, "n in out"], kernel_scale: Float32[Array, "n out"]) -> Float32[Array, "n in out"]:
    """The matrix that `Linear` multiplies with."""
    return kernel.astype(jnp.float32) * kernel_scale[:, None]


def rounded(kernel: Float[Array, "n in out"]) -> Float32[Array, "n in out"]:
    """The matrix of an int8 base that `kernel` becomes, a layer at a time."""
    return jax.lax.map(lambda w: dequantize(**quantize(w[None]))[0], kernel)


def merge(
    kernel: Float[Array, "n in out"],
    lora_a: Float[Array, "n in r"],
    lora_b: Float[Array, "n r out"],
    scale: float,
    dtype: DTypeLike,
) -> Float[Array, "n in out"]:
    """W + scale * A @ B, computed in float32 and rounded to `dtype`, a layer at a time."""

    def layer(matrices):
        w, a, b = (matrix.astype(jnp.float32) for matrix in matrices)
        return (w + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)).astype(dtype)

    return jax.lax.map(layer, (kernel, lora_a, lora_b))


def _layers(base: Params) -> int:
    return next(iter(jax.tree.leaves(base["blocks"]))).shape[0]
