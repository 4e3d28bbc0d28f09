"""Stochastic rounding to bfloat16, so that updates below half a unit in the last place count (docs/method.md 12)."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Key, UInt32

_DROPPED_BITS = 16  # of a float32, in a bfloat16


def in_float32(tree: Any) -> Any:
    """The tree with every bfloat16 leaf as float32, which changes no value; others as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def round_like(tree: Any, like: Any, key: Key[Array, ""]) -> Any:
    """`tree` in the dtypes of `like`, a tree of the same structure: float32 to bfloat16 stochastically.

    The random bits of an element are a function of the key, of its leaf's path and of its place in the leaf. So
    neither the mesh nor other leaves change them.
    """

    def leaf(path: tuple, x: Array, as_this: Array) -> Array:
        if x.dtype != jnp.float32 or as_this.dtype != jnp.bfloat16:
            return x.astype(as_this.dtype)
        return stochastic_round(x, jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())))

    return jax.tree_util.tree_map_with_path(leaf, tree, like)


def stochastic_round(x: Float32[Array, "*n"], key: Key[Array, ""]) -> BFloat16[Array, "*n"]:
    """Each number becomes one of its two neighbours in bfloat16; the expectation is the number itself.

    A bfloat16 is the upper half of a float32. The lower half, over 2^16, is how far the number lies above the neighbour
    nearer to 0. Adding 16 random bits carries into the upper half with exactly that probability. What is no number
    stays so.
    """
    random = jax.random.bits(key, x.shape, jnp.uint32) >> _DROPPED_BITS
    bits: UInt32[Array, "*n"] = jax.lax.bitcast_convert_type(x, jnp.uint32) + random
    upper = jax.lax.bitcast_convert_type((bits >> _DROPPED_BITS).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))
