"""Attention for CPUs, which stands here only because of how XLA compiles for them (attention.py says what it computes).

It visits only the tiles in which a segment meets itself, so that its time follows the segments and not the row. One
loop over all tiles, because a loop within a loop copies what it carries; tiles whose scores stay in the cache, and no
smaller, because XLA for CPUs spends most of its time around small matrix products and not in them.
The forward pass keeps a running softmax over the tiles of keys; the backward pass recomputes the scores.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from elbo_kto_jax.models.attention_plain import LOWEST, SAVED

BLOCK = 256  # positions of a tile's side


def block_attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b s kv e"],
    value: Float[Array, "b s kv e"],
    segment_ids: Int[Array, "b s"],
) -> Float[Array, "b s h e"]:
    """The same tile by tile; the result of padding (id 0) is 0."""
    b, s, h, e = query.shape
    kv = key.shape[2]
    block = min(BLOCK, s)

    def flat(x, *heads):  # the rows behind each other, and room for the last tile: [*heads e n]
        x = x.reshape(b * s, *heads, e)
        return jnp.moveaxis(jnp.pad(x, ((0, block), *((0, 0),) * (x.ndim - 1))), 0, -1)

    # Query heads that share a key-value head lie behind each other: [kv g e n].
    spans = _spans(segment_ids, block)
    out = _tiled_attention(flat(query * e**-0.5, kv, h // kv), flat(key, kv), flat(value, kv), spans, block)
    out = jnp.moveaxis(out, -1, 0)[: b * s].reshape(b, s, h, e)
    return jnp.where((segment_ids > 0)[..., None, None], out, 0.0).astype(query.dtype)


class _Spans(NamedTuple):
    """For each of n flat positions, where its segment starts and ends; a run of padding counts as a segment."""

    start: Int[Array, " n"]
    end: Int[Array, " n"]
    is_real: Bool[Array, " n"]


def _spans(segment_ids: Int[Array, "b s"], block: int) -> _Spans:
    b, s = segment_ids.shape
    at = jnp.arange(b * s).reshape(b, s)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((b, 1), bool)
    start = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], axis=1), at, 0), axis=1)
    end = jax.lax.cummin(jnp.where(jnp.concatenate([changes, edge], axis=1), at + 1, b * s), axis=1, reverse=True)

    def room(x, fill):
        return jnp.pad(x.ravel(), (0, block), constant_values=fill)

    return _Spans(room(start, b * s), room(end, b * s + block), room(segment_ids > 0, False))


class _Tile(NamedTuple):
    """A tile of scores: the queries from `at` to `end` (nothing is kept of those behind) and the keys from `key`."""

    at: Int[Array, ""]
    end: Int[Array, ""]
    key: Int[Array, ""]


def _queries_from(spans: _Spans, at, block: int) -> _Tile:
    """The first tile of the queries that start at `at`.

    They never end in the middle of a segment that started among them, so that a long segment has tiles of its own, and
    short ones share a tile. Padding shares none that it would start.
    """
    last = at + block - 1
    whole = (spans.start[last] == at) | (spans.end[last] == at + block)
    new = jnp.where(whole, at + block, spans.start[last])
    alone = (spans.start[at] < at) | ~spans.is_real[at]
    end = jnp.where(alone, jnp.minimum(at + block, spans.end[at]), new)
    return _Tile(at, end, spans.start[at])


def _next(spans: _Spans, tile: _Tile, block: int) -> _Tile:
    """The next keys that the same queries can see, or else the next queries. Padding is shown one tile of keys."""
    seen = jnp.where(spans.is_real[tile.at], spans.end[tile.end - 1], 0)
    same_queries = tile._replace(key=tile.key + block)
    following = _queries_from(spans, tile.end, block)
    return jax.tree.map(functools.partial(jnp.where, same_queries.key < seen), same_queries, following)


class _Residuals(NamedTuple):
    query: Array
    key: Array
    value: Array
    spans: _Spans
    out: Array
    log_sum: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled_attention(query, key, value, spans, block):
    """Attention of queries [kv g e n] over keys and values [kv e n], within spans: float32 [kv g e n]."""
    return _forward(query, key, value, spans, block)[0]


def _forward(query, key, value, spans, block):
    kv, g, e, n = query.shape
    ones = jnp.ones(block)

    def visit(carry):
        tile, highest, total, mixed, out, log_sum = carry
        is_first = tile.key == spans.start[tile.at]
        highest = jnp.where(is_first, LOWEST, highest)
        scores = _scores(_rows(query, tile.at, block), key, spans, tile, block)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new_highest[..., None])
        shrink = jnp.where(is_first, 0.0, jnp.exp(highest - new_highest))
        mixed = mixed * shrink[..., None] + _matmul("nrk,nek->nre", weights, _cut(value, tile.key, block))
        total = total * shrink + _matmul("nrk,k->nr", weights, ones)  # three times as fast as a sum on a CPU
        # Written after every tile of keys, the last of which leaves what is meant; the next queries write what follows.
        out = _put(out, tile.at, _columns(mixed / total[..., None], g))
        log_sum = _put(log_sum, tile.at, (new_highest + jnp.log(total)).reshape(kv, g, block))
        return _next(spans, tile, block), new_highest, total, mixed, out, log_sum

    rows = jnp.zeros((kv, g * block))
    carry = (
        _first(spans, block),
        rows,
        rows,
        jnp.zeros((kv, g * block, e)),
        jnp.zeros((kv, g, e, n)),
        jnp.zeros((kv, g, n)),
    )
    *_, out, log_sum = jax.lax.while_loop(_inside(n - block), visit, carry)
    out, log_sum = checkpoint_name(out, SAVED), checkpoint_name(log_sum, SAVED)
    return out, _Residuals(query, key, value, spans, out, log_sum)


def _backward(block, residuals: _Residuals, d_out):
    query, key, value, spans, out, log_sum = residuals
    kv, g, _, n = query.shape
    # d score = weight * (d weight - sum over keys of weight * d weight), and that sum is d_out . out
    inner = _matmul("kgen,kgen->kgn", d_out, out)  # a matrix product: a sixteenth of the time of a sum on a CPU

    def visit(carry):
        tile, d_query, d_key, d_value = carry
        at, j = tile.at, tile.key
        is_meant = at + jnp.arange(block) < tile.end

        def of_row(x):
            return jnp.where(is_meant, _cut(x, at, block), 0.0)

        query_rows, d_mixed = _rows(query, at, block), _to_rows(of_row(d_out))
        log_total = _cut(log_sum, at, block).reshape(kv, g * block, 1)
        weights = jnp.exp(_scores(query_rows, key, spans, tile, block) - log_total)
        d_weights = _matmul("nre,nek->nrk", d_mixed, _cut(value, j, block))
        d_scores = weights * (d_weights - of_row(inner).reshape(kv, g * block, 1))
        d_value = _add(d_value, j, _matmul("ner,nrk->nek", jnp.swapaxes(d_mixed, 1, 2), weights))
        d_key = _add(d_key, j, _matmul("ner,nrk->nek", jnp.swapaxes(query_rows, 1, 2), d_scores))
        d_query = _add(d_query, at, _columns(_matmul("nrk,nek->nre", d_scores, _cut(key, j, block)), g))
        return _next(spans, tile, block), d_query, d_key, d_value

    carry = _first(spans, block), jnp.zeros(query.shape), jnp.zeros(key.shape), jnp.zeros(value.shape)
    _, d_query, d_key, d_value = jax.lax.while_loop(_inside(n - block), visit, carry)
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None


_tiled_attention.defvjp(_forward, _backward)


def _first(spans: _Spans, block: int) -> _Tile:
    return _queries_from(spans, jnp.zeros((), jnp.int32), block)


def _inside(n: int):
    return lambda carry: carry[0].at < n


def _scores(query_rows, key, spans: _Spans, tile: _Tile, block):
    """Float32 scores [kv g*block block] of a tile.

    `LOWEST` across segments, and for queries of padding, whose log_sum is not meaningful.
    """
    same = _cut(spans.start, tile.at, block)[:, None] == _cut(spans.start, tile.key, block)
    same &= _cut(spans.is_real, tile.at, block)[:, None]
    scores = _matmul("nre,nek->nrk", query_rows, _cut(key, tile.key, block))
    grouped = scores.reshape(scores.shape[0], -1, block, block)
    return jnp.where(same, grouped, LOWEST).reshape(scores.shape)


def _cut(x, at, block):
    return jax.lax.dynamic_slice_in_dim(x, at, block, axis=-1)


def _put(x, at, part):
    return jax.lax.dynamic_update_slice_in_dim(x, part, at, axis=-1)


def _add(x, at, part):
    return _put(x, at, _cut(x, at, part.shape[-1]) + part)


def _rows(query, at, block):
    """The tile of queries from `at`, [kv g*block e]."""
    return _to_rows(_cut(query, at, block))


def _to_rows(tile):
    kv, g, e, block = tile.shape
    return jnp.swapaxes(tile, 2, 3).reshape(kv, g * block, e)


def _columns(tile, g):
    """[kv g*block e] as [kv g e block]."""
    kv, rows, e = tile.shape
    return jnp.swapaxes(tile.reshape(kv, g, rows // g, e), 2, 3)


def _matmul(equation, a, b):
    # As float32, which changes no result: XLA for CPUs lacks some products of bfloat16 with float32 sums.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)
