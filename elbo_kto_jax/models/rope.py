"""Rotary position embedding, "rotate half" (docs/method.md 4)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def rotation(
    positions: Int[Array, "b s"], head_dim: int, theta: float
) -> tuple[Float32[Array, "b s 1 r"], Float32[Array, "b s 1 r"]]:
    """(cos, sin) of the angles position * theta^(-2j / head_dim) for j in 0..head_dim/2, one head axis of size 1."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "b s h e"], cos: Float32[Array, "b s 1 r"], sin: Float32[Array, "b s 1 r"]
) -> Float[Array, "b s h e"]:
    """x turned by its position: pairs are (j, j + e/2), the arithmetic is float32, the result has x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
