"""Bidirectional attention: every token of a segment sees every token of that segment, and no other (METHOD 4, 5).

Two forms of the same function. `plain_attention` writes the formula down and lets the accelerator's compiler fuse it.
`block_attention` never holds more than a tile of scores: it walks over tiles of BLOCK x BLOCK positions with a running
softmax, visits only the tiles in which some segment meets itself, and recomputes the scores in the backward pass. Its
memory is linear in the row, its time follows the segments and not the row, and its matrix products are laid out so that
no operand is transposed (which costs XLA a factor of four on a CPU).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from elbo_kto_jax.sharding.rules import MESH_AXES

BLOCK = 128  # positions of a tile's side: its scores for 8 heads take 0.5 MB, which a core's cache holds
_LOWEST = -1e30  # instead of -inf, whose differences are NaN
SAVED = "attention"  # the name of what a rematerialisation policy may keep, to do without a second forward pass


def attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b s kv e"],
    value: Float[Array, "b s kv e"],
    segment_ids: Int[Array, "b s"] | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "b s h e"]:
    """softmax(q k^T / sqrt(e)) v within each segment, scores and softmax in float32.

    Query head i reads key-value head i // (h / kv). Segments are runs of equal ids; id 0 is padding, whose result is
    not meaningful. None means that the whole row is one segment. On a `mesh` every device attends to its own rows and
    heads alone, so that what it does follows the segments of those and of no other.
    """
    form = block_attention if jax.default_backend() == "cpu" else plain_attention
    if segment_ids is None:
        segment_ids = jnp.ones(query.shape[:2], jnp.int32)
    if mesh is not None:
        rows, by_head = MESH_AXES["rows"], P(MESH_AXES["rows"], None, MESH_AXES["heads"], None)
        form = jax.shard_map(
            form, mesh=mesh, in_specs=(by_head, by_head, by_head, P(rows, None)), out_specs=by_head, check_vma=False
        )
    return checkpoint_name(form(query, key, value, segment_ids), SAVED)


def plain_attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b s kv e"],
    value: Float[Array, "b s kv e"],
    segment_ids: Int[Array, "b s"] | None = None,
) -> Float[Array, "b s h e"]:
    """The formula, with all s x s scores at once."""
    b, s, h, e = query.shape
    exact = _precision(query.dtype)
    grouped = query.reshape(b, s, key.shape[2], -1, e)
    scores = jnp.einsum("bqkge,btke->bkgqt", grouped, key, precision=exact, preferred_element_type=jnp.float32)
    scores *= e**-0.5
    if segment_ids is not None:
        same = segment_ids[:, None, None, :, None] == segment_ids[:, None, None, None, :]
        scores = jnp.where(same, scores, _LOWEST)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgqt,btke->bqkge", weights, value, precision=exact).reshape(b, s, h, e)


def block_attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b s kv e"],
    value: Float[Array, "b s kv e"],
    segment_ids: Int[Array, "b s"] | None = None,
) -> Float[Array, "b s h e"]:
    """The same tile by tile; padding (id 0) is skipped, and its result is 0."""
    b, s, h, e = query.shape
    if segment_ids is None:
        segment_ids = jnp.ones((b, s), jnp.int32)
    kv, padding = key.shape[2], -s % BLOCK
    pad = lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
    segment_ids = pad(segment_ids)
    # A tile of queries has the g query heads that share a key-value head below each other: [b kv g*BLOCK e].
    tiles = pad(query * e**-0.5).reshape(b, -1, BLOCK, kv, h // kv, e)
    tiles = tiles.transpose(1, 0, 3, 4, 2, 5).reshape(-1, b, kv, h // kv * BLOCK, e)
    key_t, value_t = (pad(x).transpose(0, 2, 3, 1) for x in (key, value))  # [b kv e s]
    first, last = _tile_ranges(segment_ids)
    out = _tiled_attention(tiles, key_t, value_t, segment_ids, first, last)
    out = out.reshape(-1, b, kv, h // kv, BLOCK, e).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(b, s + padding, h, e)[:, :s].astype(query.dtype)


def _tile_ranges(segment_ids: Int[Array, "b s"]) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """For each tile of positions, the first and the last + 1 of the tiles that its segments reach in any row."""
    s = segment_ids.shape[1]
    at = jnp.arange(s)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((segment_ids.shape[0], 1), bool)
    starts = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], axis=1), at, 0), axis=1)
    ends = jax.lax.cummin(jnp.where(jnp.concatenate([changes, edge], axis=1), at, s), axis=1, reverse=True)
    real = segment_ids > 0
    first = jnp.min(jnp.where(real, starts, s).reshape(-1, s // BLOCK, BLOCK), axis=(0, 2)) // BLOCK
    last = jnp.max(jnp.where(real, ends, -1).reshape(-1, s // BLOCK, BLOCK), axis=(0, 2)) // BLOCK + 1
    return first, last


class _Residuals(NamedTuple):
    tiles: Array
    key_t: Array
    value_t: Array
    segment_ids: Array
    first: Array
    last: Array
    out: Array
    log_sum: Array


@jax.custom_vjp
def _tiled_attention(tiles, key_t, value_t, segment_ids, first, last):
    """Attention of query tiles [n b kv r e] over keys and values [b kv e s]: float32 [n b kv r e]."""
    return _forward(tiles, key_t, value_t, segment_ids, first, last)[0]


def _forward(tiles, key_t, value_t, segment_ids, first, last):
    n, b, kv, r, e = tiles.shape

    def query_tile(_, i):
        query = tiles[i]

        def key_tile(j, carry):
            highest, total, out = carry
            scores = _scores(query, key_t, segment_ids, i, j)
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_highest[..., None])
            shrink = jnp.exp(highest - new_highest)
            out = out * shrink[..., None] + _matmul("bnrk,bnek->bnre", weights.astype(query.dtype), _tile(value_t, j))
            return new_highest, total * shrink + jnp.sum(weights, axis=-1), out

        start = jnp.full((b, kv, r), _LOWEST), jnp.zeros((b, kv, r)), jnp.zeros((b, kv, r, e))
        highest, total, out = jax.lax.fori_loop(first[i], last[i], key_tile, start)
        # A row of padding saw only masked scores: with `highest` still at the bottom it has no meaning.
        seen = highest > 0.5 * _LOWEST
        out = jnp.where(seen[..., None], out / jnp.where(seen, total, 1.0)[..., None], 0.0)
        return None, (out, jnp.where(seen, highest + jnp.log(jnp.where(seen, total, 1.0)), -_LOWEST))

    _, (out, log_sum) = jax.lax.scan(query_tile, None, jnp.arange(n))
    out, log_sum = checkpoint_name(out, SAVED), checkpoint_name(log_sum, SAVED)
    return out, _Residuals(tiles, key_t, value_t, segment_ids, first, last, out, log_sum)


def _backward(residuals: _Residuals, d_out):
    tiles, key_t, value_t, segment_ids, first, last, out, log_sum = residuals
    dtype = tiles.dtype

    def query_tile(carry, i):
        query, d_tile, log_total = tiles[i], d_out[i].astype(dtype), log_sum[i]
        query_t, d_tile_t = jnp.swapaxes(query, -1, -2), jnp.swapaxes(d_tile, -1, -2)
        # d score = weight * (d weight - sum over keys of weight * d weight), and that sum is d_out . out
        inner = jnp.sum(d_out[i] * out[i], axis=-1)

        def key_tile(j, carry):
            d_query, d_key_t, d_value_t = carry
            weights = jnp.exp(_scores(query, key_t, segment_ids, i, j) - log_total[..., None])
            d_weights = _matmul("bnre,bnek->bnrk", d_tile, _tile(value_t, j))
            d_scores = (weights * (d_weights - inner[..., None])).astype(dtype)
            d_value_t = _add_tile(d_value_t, j, _matmul("bner,bnrk->bnek", d_tile_t, weights.astype(dtype)))
            d_key_t = _add_tile(d_key_t, j, _matmul("bner,bnrk->bnek", query_t, d_scores))
            d_query += _matmul("bnrk,bnek->bnre", d_scores, _tile(key_t, j))
            return d_query, d_key_t, d_value_t

        start = jnp.zeros(query.shape, jnp.float32), *carry
        d_query, *carry = jax.lax.fori_loop(first[i], last[i], key_tile, start)
        return tuple(carry), d_query

    zeros = jnp.zeros(key_t.shape, jnp.float32)
    (d_key_t, d_value_t), d_tiles = jax.lax.scan(query_tile, (zeros, zeros), jnp.arange(len(tiles)))
    return d_tiles.astype(dtype), d_key_t.astype(dtype), d_value_t.astype(dtype), None, None, None


_tiled_attention.defvjp(_forward, _backward)


def _scores(query, key_t, segment_ids, i, j):
    """Float32 scores [b kv r BLOCK] of query tile i against key tile j, `_LOWEST` across segments and on padding."""
    mine = jax.lax.dynamic_slice_in_dim(segment_ids, i * BLOCK, BLOCK, axis=1)[:, None, :, None]
    theirs = _tile(segment_ids, j)[:, None, None, :]
    same = jnp.tile((mine == theirs) & (mine > 0), (1, 1, query.shape[2] // BLOCK, 1))
    return jnp.where(same, _matmul("bnre,bnek->bnrk", query, _tile(key_t, j)), _LOWEST)


def _tile(x, j):
    return jax.lax.dynamic_slice_in_dim(x, j * BLOCK, BLOCK, axis=-1)


def _add_tile(x, j, tile):
    return jax.lax.dynamic_update_slice_in_dim(x, _tile(x, j) + tile, j * BLOCK, axis=-1)


def _matmul(equation, a, b):
    # As float32, which changes no result: XLA for CPUs lacks some products of bfloat16 with float32 sums.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)


def _precision(dtype) -> jax.lax.Precision | None:
    """float32 operands stay float32: accelerators would round them."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
