"""Attention in kernels that come with jax: Pallas for TPUs, cuDNN for GPUs (attention.py says which is used where)."""

import contextlib
import functools
import inspect
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float, Int

from elbo_kto_jax.models.attention_plain import SAVED

cudnn: Any = None
with contextlib.suppress(ImportError):  # jax's public function has no argument for packed segments
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

log = logging.getLogger(__name__)
_LANES = 128  # positions: the tiles of the kernels for TPUs are multiples
_HOPPER = 9.0  # the compute capability from which cuDNN takes packed segments
_FEWEST_RUNS, _TOKENS_PER_RUN = 8, 256  # segments of a row that packed_attention has room for


def splash_attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b s kv e"],
    value: Float[Array, "b s kv e"],
    segment_ids: Int[Array, "b s"],
    interpret: bool = False,
) -> Float[Array, "b s h e"]:
    """The same in a kernel for TPUs that visits no pair of blocks without a common segment, forward and backward.

    A row that is no multiple of its lanes is filled up with a segment of its own.
    """
    s, h, e = query.shape[1:]
    query, key, value, segment_ids = _fill_row(_LANES, query * e**-0.5, key, value, segment_ids)
    length = segment_ids.shape[1]
    block = splash_block(length)
    whole = splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([splash_mask.FullMask((length, length))] * h),
        block_sizes=splash.BlockSizes(*(block,) * 6, use_fused_bwd_kernel=True),
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )

    def of_row(query, key, value, ids):
        return _skipping(whole, visited_blocks(ids, block))(query, key, value, splash.SegmentIds(ids, ids))

    out = jax.vmap(of_row)(_heads_first(query), _heads_first(key), _heads_first(value), segment_ids)
    return _heads_first(out)[:, :s]


def splash_block(length: int) -> int:
    """Positions of a side of splash_attention's blocks, for a row of so many; it divides the row's length once filled.

    The largest wins: smaller blocks skip more scores, but the steps of the kernel's grid and the backward pass's
    partial sums for the queries, one for each block of keys, grow faster than that (docs/tpu.md).
    """
    filled = -(-length // _LANES) * _LANES
    return next(size for size in (512, 384, 256, 128) if filled % size == 0)


def visited_blocks(segment_ids: Int[Array, " s"], block: int) -> Bool[Array, "n n"]:
    """Which blocks of queries and keys have a segment in common, padding being one; `block` divides the row."""
    of_block = segment_ids.reshape(-1, block)
    return jnp.any(of_block[:, None, :, None] == of_block[None, :, None, :], axis=(2, 3))


def _skipping(whole: splash.SplashAttentionKernel, visited: Bool[Array, "n n"]) -> splash.SplashAttentionKernel:
    """The kernel `whole` on the visited blocks alone: a step of its grid without one neither loads nor computes.

    The library makes such tables from masks of all pairs of positions; segments need none, for the kernel masks them
    itself. Where a version of jax has no such tables, `whole` is right, too, and the log says so.
    """
    n = visited.shape[0]
    at_or_after = jax.lax.cummin(jnp.where(visited, jnp.arange(n), n), axis=1, reverse=True)
    last = jnp.max(jnp.where(visited, jnp.arange(n), 0), axis=1, keepdims=True)
    loaded: Any = jnp.minimum(at_or_after, last).astype(jnp.int32)  # the next one visited, or still the last one
    table: dict[str, Any] = {
        "block_mask": visited[None].astype(jnp.int32),
        "mask_next": None,
        "partial_mask_blocks": None,
    }
    try:
        forward = whole.fwd_mask_info._replace(data_next=loaded[None], **table)
        of_gradient: Any = whole.dkv_mask_info
        backward = of_gradient._replace(data_next=loaded.T[None], **table)
        return splash.SplashAttentionKernel(forward, None, backward, **whole.kwargs)
    except (AttributeError, TypeError, ValueError) as error:
        log.warning("attention visits all blocks: splash attention of jax %s differs: %s", jax.__version__, error)
        return whole


def _heads_first(x: Array) -> Array:
    """[b s h e] as [b h s e], or back."""
    return jnp.swapaxes(x, 1, 2)


def cudnn_attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b s kv e"],
    value: Float[Array, "b s kv e"],
    segment_ids: Int[Array, "b s"],
    implementation: Literal["cudnn", "xla"] = "cudnn",
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


def has_packed_kernel() -> bool:
    """Whether this process's GPU and this version of jax have cuDNN's kernel for packed segments."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "0")
    takes_offsets = cudnn is not None and "q_offsets" in inspect.signature(cudnn.dot_product_attention).parameters
    return takes_offsets and float(capability) >= _HOPPER


def _fill_row(multiple: int, query, key, value, segment_ids):
    """The arguments, filled up to a multiple of so many positions with a segment of its own."""
    room = -segment_ids.shape[1] % multiple

    def fill(x, by):
        return jnp.pad(x, ((0, 0), (0, room), *((0, 0),) * (x.ndim - 2)), constant_values=by)

    return fill(query, 0), fill(key, 0), fill(value, 0), fill(segment_ids, -1)
