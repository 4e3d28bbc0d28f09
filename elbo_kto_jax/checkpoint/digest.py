"""A digest of a tree of arrays that depends on its bits only: not on sharding, file format or number of devices.

Each leaf is read as unsigned integers; every element is mixed with its position and the results are summed modulo 2^32.
Integer sums do not depend on their order, so the arrays stay where they are and only two words per leaf reach the host.
"""

import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped, UInt32

# Odd, so that multiplication by them is a bijection modulo 2^32; two of them make two independent 32-bit sums.
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)


def params_digest(params: PyTree) -> str:
    """The digest of a tree of arrays: 32 hexadecimal digits over every leaf's path, shape, dtype and bits.

    Equal trees have equal digests; different ones share theirs by accident with a chance of about 2^-64 per leaf that
    differs. It is no protection against intent.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    digest = hashlib.blake2b(digest_size=16)
    sums = jax.device_get([_position_weighted_sums(leaf) for _, leaf in leaves])
    for (path, leaf), words in zip(leaves, sums, strict=True):
        keys = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{keys} {leaf.shape} {leaf.dtype.name} {words[0]:08x}{words[1]:08x}\n".encode())
    return digest.hexdigest()


@jax.jit
def _position_weighted_sums(leaf: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    bits = leaf
    if not jnp.issubdtype(leaf.dtype, jnp.bool_):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    bits = bits.astype(jnp.uint32)
    # The row-major position, from one iota per axis: reshaping a sharded array would gather it.
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    sums = [jnp.sum(_mix(bits + position * jnp.uint32(m)) * jnp.uint32(m), dtype=jnp.uint32) for m in _MULTIPLIERS]
    return jnp.stack(sums)


def _mix(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words in which every input bit moves every output bit (Murmur3's finalizer)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
