"""Attention as its formula says it, which every other form agrees with (attention.py)."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

LOWEST = -1e30  # instead of -inf, whose differences are NaN
SAVED = "attention"  # the name of what a rematerialisation policy may keep, to do without a second forward pass


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
    scores = jnp.where(same, scores, LOWEST)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkgqt,btke->bqkge", weights, value, precision=exact).reshape(b, s, h, e)
    return checkpoint_name(out, SAVED)


def _precision(dtype) -> jax.lax.Precision | None:
    """float32 operands stay float32: accelerators would round them."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
