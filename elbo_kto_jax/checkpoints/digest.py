"""A digest of a tree of arrays that depends on its bits only: not on sharding, file format or number of devices.

Each leaf is read as unsigned integers; every element is mixed with its position and the results are summed modulo 2^32.
Integer sums do not depend on their order, so the arrays stay where they are, or come piece by piece from a file, and
only two words per leaf reach the host.
"""

import functools
import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt32

# Odd, so that multiplication by them is a bijection modulo 2^32; two of them make two independent 32-bit sums.
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)


class Digest:
    """The digest of a tree whose leaves come in pieces, each element exactly once."""

    def __init__(self, leaves: Mapping[tuple[str, ...], jax.ShapeDtypeStruct]):
        """`leaves`: shape and dtype of every leaf by its path."""
        self._leaves = leaves
        self._sums: dict = dict.fromkeys(leaves, np.zeros(2, np.uint32))

    def add(self, path: tuple[str, ...], start: tuple[int, ...], piece: Shaped[Array | np.ndarray, "..."]) -> None:
        """Adds the piece of the leaf at `path` whose first element has the index `start`; is done when it returns."""
        sums = _sums
        if isinstance(piece, np.ndarray) and piece.ndim > 1:
            # As integers already: XLA for CPUs would keep a copy in float32 for the loop.
            sums, piece = _sums_by_rows, piece.view(f"uint{8 * piece.dtype.itemsize}")
        found = sums(piece, np.array(start, np.uint32), self._leaves[path].shape)
        self._sums[path] = jax.block_until_ready(self._sums[path] + found)

    def hexdigest(self) -> str:
        """32 hexadecimal digits over every leaf's path, shape, dtype and bits.

        Equal trees have equal digests; different ones share theirs by accident with a chance of about 2^-64 per leaf
        that differs. It is no protection against intent.
        """
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(self._leaves):
            leaf, words = self._leaves[path], np.asarray(self._sums[path])
            dtype = np.dtype(leaf.dtype).name
            digest.update(f"{'/'.join(path)} {leaf.shape} {dtype} {words[0]:08x}{words[1]:08x}\n".encode())
        return digest.hexdigest()


def params_digest(params: PyTree) -> str:
    """`Digest` of a tree of arrays that are at hand, sharded or not."""
    leaves = {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    digest = Digest({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()})
    for path, leaf in leaves.items():
        digest.add(path, (0,) * leaf.ndim, leaf)
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnames="shape")
def _sums(piece: Shaped[Array, "..."], start: UInt32[Array, " axes"], shape: tuple[int, ...]) -> UInt32[Array, "2"]:
    """The two sums over a piece, which starts at the index `start` of a leaf of shape `shape`."""
    # The row-major position, from one iota per axis: reshaping a sharded array would gather it.
    position = _positions(piece.shape, start, shape)
    return jnp.stack([jnp.sum(words, dtype=jnp.uint32) for words in _weighted(piece, position)])


@functools.partial(jax.jit, static_argnames="shape")
def _sums_by_rows(
    piece: Shaped[Array, "..."], start: UInt32[Array, " axes"], shape: tuple[int, ...]
) -> UInt32[Array, "2"]:
    """The same of a piece in the host's memory, with a sum for every column: XLA for CPUs adds up one element after
    the other where a whole array becomes one number, in four times the time."""
    rows = piece.reshape(-1, piece.shape[-1])
    first = (_positions(piece.shape[:-1], start[:-1], shape[:-1]) * jnp.uint32(shape[-1])).ravel()
    column = jnp.arange(rows.shape[1], dtype=jnp.uint32) + start[-1]

    def add(i, sums):
        return tuple(a + b for a, b in zip(sums, _weighted(rows[i], first[i] + column), strict=True))

    sums = jax.lax.fori_loop(0, len(rows), add, (jnp.zeros_like(column),) * len(_MULTIPLIERS))
    return jnp.stack([jnp.sum(words, dtype=jnp.uint32) for words in sums])


def _positions(piece: tuple[int, ...], start: UInt32[Array, " axes"], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """The row-major positions, in an array of shape `shape`, of a piece of it that starts at the index `start`."""
    position = jnp.zeros(piece, jnp.uint32)
    for axis, size in enumerate(shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, piece, axis) + start[axis]
        position = position * jnp.uint32(size) + along
    return position


def _weighted(values: Shaped[Array, "..."], position: UInt32[Array, "..."]) -> list[UInt32[Array, "..."]]:
    """Every value's bits, mixed with its position, once for each of the two sums."""
    if not jnp.issubdtype(values.dtype, jnp.bool_):
        values = jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{8 * values.dtype.itemsize}"))
    bits = values.astype(jnp.uint32)
    return [_mix(bits + position * jnp.uint32(m)) * jnp.uint32(m) for m in _MULTIPLIERS]


def _mix(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words in which every input bit moves every output bit (Murmur3's finalizer)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
