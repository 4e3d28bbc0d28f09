"""Bidirectional attention: every token of a segment sees that segment and no other (docs/method.md 4, 5).

Several forms of the same function; the platform decides (`form_for`). `plain_attention` writes the formula down
(attention_plain.py). The others never hold more than a tile of scores, walk over the tiles with a running softmax, and
recompute the scores in the backward pass, so that their memory is linear in the row:

    splash_attention   TPU: jax's Pallas kernel, told which tiles hold a common segment: it visits no other
                       (attention_kernels.py)
    packed_attention   GPU, Hopper or newer: cuDNN's kernel for sequences that lie behind each other in a row, which
                       visits no pair of segments; a row of more segments than usual takes cudnn_attention
    cudnn_attention    GPU: cuDNN's kernel with a mask of all pairs of positions, one for all heads, whose memory does
                       grow with the square of the row
    block_attention    CPU: a loop over the tiles in which a segment meets itself (attention_cpu.py)
"""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from elbo_kto_jax.models.attention_cpu import block_attention
from elbo_kto_jax.models.attention_kernels import (
    cudnn_attention,
    has_packed_kernel,
    packed_attention,
    splash_attention,
)
from elbo_kto_jax.models.attention_plain import plain_attention
from elbo_kto_jax.sharding import rules

log = logging.getLogger(__name__)


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
    segments: tuple[Array, ...] = (segment_ids,)
    if key_segment_ids is not None:
        form, segments = plain_attention, (segment_ids, key_segment_ids)
    free = set(mesh.axis_names) - set(jax.sharding.get_abstract_mesh().manual_axes) if mesh is not None else set()
    if mesh is not None and free:  # of the axes of the mesh; within a shard_map the rest are at hand already
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
    on_gpu = packed_attention if platform == "gpu" and has_packed_kernel() else cudnn_attention
    form = {"cpu": block_attention, "tpu": splash_attention, "gpu": on_gpu}.get(platform, plain_attention)
    if form is not block_attention and dtype == jnp.float32:
        form = plain_attention
    if form is on_gpu and (head_dim % 8 or head_dim > 128):
        form = plain_attention
    log.info("attention on %s: %s, %s", platform, form.__name__, jnp.dtype(dtype).name)
    return form
