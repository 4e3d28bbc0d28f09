"""Bidirectional attention: every token of a segment sees every token of that segment, and no other (METHOD 4, 5)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    query: Float[Array, "b s h e"],
    key: Float[Array, "b s kv e"],
    value: Float[Array, "b s kv e"],
    segment_ids: Int[Array, "b s"] | None = None,
) -> Float[Array, "b s h e"]:
    """softmax(q k^T / sqrt(e)) v within each segment, scores and softmax in float32; query head i reads key-value head i // (h // kv).

    `segment_ids` None means that the whole row is one segment.
    """
    b, s, h, e = query.shape
    exact = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None  # accelerators round float32 operands
    grouped = query.reshape(b, s, key.shape[2], -1, e)
    scores = (
        jnp.einsum("bqkge,btke->bkgqt", grouped, key, precision=exact, preferred_element_type=jnp.float32) * e**-0.5
    )
    if segment_ids is not None:
        same = segment_ids[:, None, None, :, None] == segment_ids[:, None, None, None, :]
        scores = jnp.where(same, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgqt,btke->bqkge", weights, value, precision=exact).reshape(b, s, h, e)
