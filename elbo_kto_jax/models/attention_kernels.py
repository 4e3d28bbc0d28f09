"""Attention in kernels that come with jax: Pallas for TPUs, cuDNN for GPUs (attention.py says which is used where)."""

import contextlib
import functools
import inspect
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

    out = jax.vmap(of_row)(_heads_first(query), _heads_first(key), _heads_first(value), segment_ids)
    return _heads_first(out)[:, :s]


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
