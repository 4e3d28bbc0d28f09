"""Bidirectional attention: every token of a segment sees that segment and no other (docs/method.md 4, 5).

Several forms of the same function; the platform decides (`form_for`). `plain_attention` writes the formula down. The
others never hold more than a tile of scores, walk over the tiles with a running softmax, and recompute the scores in
the backward pass, so that their memory is linear in the row:

    splash_attention   TPU: jax's Pallas kernel, whose tiles mask the segments
    packed_attention   GPU, Hopper or newer: cuDNN's kernel for sequences that lie behind each other in a row, which
                       visits no pair of segments; a row of more segments than usual takes cudnn_attention
    cudnn_attention    GPU: cuDNN's kernel with a mask of all pairs of positions, one for all heads, whose memory does
                       grow with the square of the row
    block_attention    CPU: visits only the tiles in which a segment meets itself, so that its time follows the segments
                       and not the row. One loop over all tiles, because a loop within a loop copies what it carries;
                       tiles whose scores stay in the cache, and no smaller, because XLA for CPUs spends most of its
                       time around small matrix products and not in them.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from elbo_kto_jax.sharding import rules

try:  # jax's public function has no argument for packed segments
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
except ImportError:
    cudnn = None

log = logging.getLogger(__name__)
BLOCK = 256  # positions of a tile's side
_LANES = 128  # positions: the tiles of the kernels for TPUs are multiples
_HOPPER = 9.0  # the compute capability from which cuDNN takes packed segments
_FEWEST_RUNS, _TOKENS_PER_RUN = 8, 256  # segments of a row that packed_attention has room for
_LOWEST = -1e30  # instead of -inf, whose differences are NaN
SAVED = "attention"  # the name of what a rematerialisation policy may keep, to do without a second forward pass


def attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b t kv e"],
    value: Float[Array, "b t kv e"],
    segment_ids: Int[Array, "b s"] | None = None,
    mesh: Mesh | None = None,
    key_segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b s h e"]:
    """softmax(q k^T / sqrt(e)) v within each segment, scores and softmax in float32.

    Query head i reads key-value head i // (h / kv). Segments are runs of equal ids; id 0 is padding, whose result is
    not meaningful. None means that the whole row is one segment. Where the keys are not those of the queries' own
    positions, `key_segment_ids` says which segment each belongs to, in any order. On a `mesh` every device attends to
    its own rows and heads alone, so that what it does follows the segments of those and of no other.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    form = form_for(platform, query.dtype, query.shape[-1])
    if segment_ids is None:
        segment_ids = jnp.ones(query.shape[:2], jnp.int32)
    segments = (segment_ids,)
    if key_segment_ids is not None:
        form, segments = plain_attention, (segment_ids, key_segment_ids)
    free = set(mesh.axis_names) - set(jax.sharding.get_abstract_mesh().manual_axes) if mesh is not None else ()
    if free:  # of the axes of the mesh; within a shard_map the rest are at hand already
        by_head = rules.spec(("rows", None, "heads", None), mesh, free)
        inner = mesh if len(free) == len(mesh.axis_names) else None  # None: the mesh around
        form = jax.shard_map(
            form,
            mesh=inner,
            in_specs=(by_head, by_head, by_head, *(rules.spec(("rows", None), mesh, free) for _ in segments)),
            out_specs=by_head,
            axis_names=free,
            check_vma=False,
        )
    return form(query, key, value, *segments)


@functools.cache  # one line in the log for each
def form_for(platform: str, dtype, head_dim: int) -> Callable[..., Array]:
    """The form for a platform (of jax.Device), the dtype of the activations and the size of a head."""
    on_gpu = packed_attention if platform == "gpu" and _has_packed_kernel() else cudnn_attention
    form = {"cpu": block_attention, "tpu": splash_attention, "gpu": on_gpu}.get(platform, plain_attention)
    if form is not block_attention and dtype == jnp.float32:
        form = plain_attention
    if form is on_gpu and (head_dim % 8 or head_dim > 128):
        form = plain_attention
    log.info("attention on %s: %s, %s", platform, form.__name__, jnp.dtype(dtype).name)
    return form


def plain_attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b t kv e"],
    value: Float[Array, "b t kv e"],
    segment_ids: Int[Array, "b s"],
    key_segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b s h e"]:
    """The formula, with all s x t scores at once; without `key_segment_ids` the keys are of the queries' positions."""
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    b, s, h, e = query.shape
    exact = _precision(query.dtype)
    grouped = query.reshape(b, s, key.shape[2], -1, e)
    scores = jnp.einsum("bqkge,btke->bkgqt", grouped, key, precision=exact, preferred_element_type=jnp.float32)
    scores *= e**-0.5
    same = segment_ids[:, None, None, :, None] == key_segment_ids[:, None, None, None, :]
    scores = jnp.where(same, scores, _LOWEST)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkgqt,btke->bqkge", weights, value, precision=exact).reshape(b, s, h, e)
    return checkpoint_name(out, SAVED)


def splash_attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b s kv e"],
    value: Float[Array, "b s kv e"],
    segment_ids: Int[Array, "b s"],
    interpret: bool = False,
) -> Float[Array, "b s h e"]:
    """The same in a kernel for TPUs; a row that is no multiple of its lanes is filled up with a segment of its own."""
    s, h, e = query.shape[1:]
    query, key, value, segment_ids = _fill_row(_LANES, query * e**-0.5, key, value, segment_ids)
    length = segment_ids.shape[1]
    block = next(size for size in (512, 384, 256, 128) if length % size == 0)

    def of_row(query, key, value, ids):
        kernel = splash.make_splash_mha_single_device(
            splash_mask.MultiHeadMask([splash_mask.FullMask((length, length))] * h),
            block_sizes=splash.BlockSizes(*(block,) * 6, use_fused_bwd_kernel=True),
            residual_checkpoint_name=SAVED,
            interpret=interpret,
        )
        return kernel(query, key, value, splash.SegmentIds(ids, ids))

    heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    run = jax.vmap(of_row)
    out = run(heads_first(query), heads_first(key), heads_first(value), segment_ids)
    return heads_first(out)[:, :s]


def cudnn_attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b s kv e"],
    value: Float[Array, "b s kv e"],
    segment_ids: Int[Array, "b s"],
    implementation: str = "cudnn",
) -> Float[Array, "b s h e"]:
    """The same in a kernel for GPUs, which wants an even number of positions; half of Triton's time in the gradient."""
    s = query.shape[1]
    query, key, value, segment_ids = _fill_row(2, query, key, value, segment_ids)
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    out = jax.nn.dot_product_attention(query, key, value, mask=same, implementation=implementation)
    return checkpoint_name(out[:, :s], SAVED)


def packed_attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b s kv e"],
    value: Float[Array, "b s kv e"],
    segment_ids: Int[Array, "b s"],
) -> Float[Array, "b s h e"]:
    """The same in a kernel for GPUs that is given where each segment starts: a quarter of the masked kernel's time.

    A run of padding is a segment like any other, so that nothing is left unwritten. The kernel's time grows with the
    number of segments that it has room for, whether they are there or not; rows that have more are left to the mask.
    """
    s = query.shape[1]
    query, key, value, segment_ids = _fill_row(2, query, key, value, segment_ids)
    room = max(_FEWEST_RUNS, segment_ids.shape[1] // _TOKENS_PER_RUN)
    edge = jnp.ones((segment_ids.shape[0], 1), bool)
    is_start = jnp.concatenate([edge, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)

    def packed(query, key, value):
        length = segment_ids.shape[1]
        start = jax.vmap(functools.partial(_positions, size=room + 1, fill=length))(is_start)
        run_length = start[:, 1:] - start[:, :-1]
        run_length, start = jnp.where(run_length > 0, run_length, -1), jnp.where(start < length, start, -1)
        return cudnn.dot_product_attention(
            query,
            key,
            value,
            q_seqlen=run_length,
            kv_seqlen=run_length,
            q_offsets=start,
            kv_offsets=start,
            scale=query.shape[-1] ** -0.5,
            mask_type=cudnn.MaskType.PADDING,
        )

    def masked(query, key, value):
        return cudnn_attention(query, key, value, segment_ids)

    fits = jnp.max(jnp.sum(is_start, axis=1)) <= room
    out = jax.lax.cond(fits, packed, masked, query, key, value)
    return checkpoint_name(out[:, :s], SAVED)


def _positions(where: Bool[Array, " s"], size: int, fill: int) -> Int[Array, " size"]:
    """The positions at which `where` holds, and `fill` behind them."""
    return jnp.nonzero(where, size=size, fill_value=fill)[0].astype(jnp.int32)


def _has_packed_kernel() -> bool:
    """Whether this process's GPU and this version of jax have cuDNN's kernel for packed segments."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "0")
    takes_offsets = cudnn is not None and "q_offsets" in inspect.signature(cudnn.dot_product_attention).parameters
    return takes_offsets and float(capability) >= _HOPPER


def _fill_row(multiple: int, query, key, value, segment_ids):
    """The arguments, filled up to a multiple of so many positions with a segment of its own."""
    room = -segment_ids.shape[1] % multiple
    fill = lambda x, by: jnp.pad(x, ((0, 0), (0, room), *((0, 0),) * (x.ndim - 2)), constant_values=by)  # noqa: E731
    return fill(query, 0), fill(key, 0), fill(value, 0), fill(segment_ids, -1)


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
    room = lambda x, fill: jnp.pad(x.ravel(), (0, block), constant_values=fill)  # noqa: E731
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
        highest = jnp.where(is_first, _LOWEST, highest)
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
        of_row = lambda x: jnp.where(is_meant, _cut(x, at, block), 0.0)  # noqa: E731
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

    `_LOWEST` across segments, and for queries of padding, whose log_sum is not meaningful.
    """
    same = _cut(spans.start, tile.at, block)[:, None] == _cut(spans.start, tile.key, block)
    same &= _cut(spans.is_real, tile.at, block)[:, None]
    scores = _matmul("nre,nek->nrk", query_rows, _cut(key, tile.key, block))
    grouped = scores.reshape(scores.shape[0], -1, block, block)
    return jnp.where(same, grouped, _LOWEST).reshape(scores.shape)


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


def _precision(dtype) -> jax.lax.Precision | None:
    """float32 operands stay float32: accelerators would round them."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
