"""The layers that architectures share, as the rows of a parameter table say (docs/method.md 4, 10).

A row decides whether a layer has what it names: a bias beside a matrix, a norm over the heads of queries and keys.
The kernels of a block may be int8 and have adapters beside them (models/lora.py).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float

from elbo_kto_jax.models import registry, rope
from elbo_kto_jax.models.attention import attention
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.lora import Linear

CACHE = "cache"  # the collection of keys and values
LAYER_INPUT = "layer_input"  # the name of what every backward pass through a layer needs
KEPT_PRODUCTS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj")  # results that a backward pass may find kept
INITIALIZERS = {
    "normal": nn.initializers.normal(0.02),
    "ones": nn.initializers.ones,
    "zeros": nn.initializers.zeros,
}


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back to x's dtype, then times the weight."""

    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b *positions d"]) -> Float[Array, "b *positions d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        return rms_norm(x.reshape(x.shape[0], -1, x.shape[-1]), scale.astype(x.dtype), self.eps).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "b s d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "b s d"]:
    """x / sqrt(mean(x^2) + eps), computed in float32 and cast back to x's dtype, then times the scale.

    Its derivative is written down, with its sums as matrix products: the scale's, as XLA for CPUs fuses it, recomputes
    the norm column by column, and sums of a product of two arrays take ten times as long as they need.
    """
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x, scale, eps):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse).astype(x.dtype) * scale, (x, scale, inverse)


def _rms_norm_backward(eps, residuals, d_out):
    x, scale, inverse = residuals
    normed = x.astype(jnp.float32) * inverse
    d_normed = (d_out * scale).astype(jnp.float32)
    inner = jnp.einsum("bsd,bsd->bs", d_normed, normed, precision=jax.lax.Precision.HIGHEST)[..., None]
    d_x = inverse * (d_normed - normed * (inner / x.shape[-1]))
    product = d_out.astype(jnp.float32) * normed.astype(x.dtype)
    d_scale = jnp.einsum("bs,bsd->d", jnp.ones(x.shape[:2]), product, precision=jax.lax.Precision.HIGHEST)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class Block(nn.Module):
    """One pre-norm transformer layer: x + attn_out(attention(...)), then x + ff_out(silu(ff_proj) * up_proj).

    Attributes:
      config: the model; the rows of its table below "blocks" are this layer's.
      dtype, param_dtype: of the activations, and of the parameters.
      mesh: over which the rows of a batch are spread; None: they are not.
    """

    config: ModelConfig
    dtype: Any
    param_dtype: Any
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, cos, sin, segment_ids, key_segment_ids):
        x = checkpoint_name(x, LAYER_INPUT)
        h = self.norm("attn_norm")(x)
        q, k, v = (self.heads(name, h) for name in ("q_proj", "k_proj", "v_proj"))
        if ("blocks", "q_norm", "scale") in registry.parameters(self.config):
            q, k = self.norm("q_norm")(q), self.norm("k_norm")(k)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        if self.is_mutable_collection(CACHE):
            self.put_variable(CACHE, "key", k)
            self.put_variable(CACHE, "value", v)
        elif self.has_variable(CACHE, "key"):
            k = jnp.concatenate([self.get_variable(CACHE, "key"), k], axis=1)
            v = jnp.concatenate([self.get_variable(CACHE, "value"), v], axis=1)
        mixed = attention(q, k, v, segment_ids, self.mesh, key_segment_ids)
        x = x + self.product("attn_out", mixed.reshape(*x.shape[:2], -1))

        h = self.norm("ff_norm")(x)
        h = nn.silu(self.product("ff_proj", h)) * self.product("up_proj", h)
        return x + self.product("ff_out", h), None

    def norm(self, name: str) -> RMSNorm:
        """The norm that the rows call `name`."""
        return RMSNorm(self.config.rms_norm_eps, self.param_dtype, name=name)

    def linear(self, name: str) -> Linear:
        """The linear map that the rows call `name`, with a bias if they have one."""
        rows = registry.parameters(self.config)
        kernel, bias = rows["blocks", name, "kernel"], rows.get(("blocks", name, "bias"))
        return Linear(
            features=kernel.shape[-1],
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=matmul_precision(self.dtype),
            kernel_init=INITIALIZERS[kernel.init],
            bias_init=None if bias is None else INITIALIZERS[bias.init],
            mesh=self.mesh,
            name=name,
        )

    def product(self, name: str, h: Float[Array, "b s in"]) -> Float[Array, "b s out"]:
        """What the linear map `name` makes of h, under that name for rematerialisation."""
        return checkpoint_name(self.linear(name)(h), name)

    def heads(self, name: str, h: Float[Array, "b s d"]) -> Float[Array, "b s h e"]:
        """The same, head by head."""
        return self.product(name, h).reshape(*h.shape[:2], -1, self.config.head_dim)


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """float32 compute means float32: TPUs and GPUs would otherwise round the operands to bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
