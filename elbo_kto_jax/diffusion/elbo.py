"""From hidden states to ELBO estimates: log-probabilities at the hidden positions only, in chunks (docs/method.md 1).

The output head and the cross-entropy are computed for `CHUNK` targets of each row at a time, forward and backward, so
that no [batch, length, vocabulary] array exists, and the number of chunks follows the number of targets: positions that
are not hidden cost nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Shaped

from elbo_kto_jax.runtime.arrays import AnyArray

CHUNK = 256  # targets of a row whose logits exist at once; its logits take 4 * CHUNK * vocabulary bytes a row
_SUM = 64  # log-probabilities that are added up before these sums are


def elbo_draws(
    hidden: Float[Array, "m s d"],
    head: Float[Array, "d v"],
    target_position: Int[AnyArray, "m p"],
    target_token: Int[AnyArray, "m p"],
    target_slot: Int[AnyArray, "m p"],
    target_weight: Float32[AnyArray, "m p"],
    num_targets: Int[AnyArray, " m"],
    slots: int,
) -> Float32[Array, "m g"]:
    """One ELBO estimate in nats per slot (one draw of one example): weight * sum over its targets of log p.

    Row i has `num_targets[i]` targets, first in the p axis; later entries are ignored. `target_slot` says to which of
    the row's `slots` draws a target belongs. The sums run over a row in a fixed order, so equal inputs give equal bits,
    and in two steps, whose rounding is a tenth of that of one long sum: rewards are small differences of large sums.
    """
    log_probs = target_log_probs(hidden, head, target_position, target_token, num_targets)
    in_slot = _groups(target_slot)[..., None] == jnp.arange(slots)
    sums = jnp.einsum(
        "mip,mipg->mig",
        _groups(log_probs * target_weight),
        in_slot.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.sum(sums, axis=1)


def _groups(x: Shaped[AnyArray, "m p"]) -> Shaped[Array, "m groups _"]:
    """Each row in groups of _SUM, the last one filled up with zeros."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _SUM))).reshape(x.shape[0], -1, _SUM)


def target_log_probs(
    hidden: Float[Array, "m s d"],
    head: Float[Array, "d v"],
    target_position: Int[AnyArray, "m p"],
    target_token: Int[AnyArray, "m p"],
    num_targets: Int[AnyArray, " m"],
) -> Float32[Array, "m p"]:
    """log softmax(hidden[position] @ head)[token] in nats, float32; 0 from `num_targets` on."""
    width = target_position.shape[1]
    padding = ((0, 0), (0, -width % CHUNK))
    valid = jnp.arange(width) < num_targets[:, None]
    # Targets that do not exist point behind the row: reading them gives row s - 1, writing them is dropped.
    position = jnp.pad(jnp.where(valid, target_position, hidden.shape[1]), padding, constant_values=hidden.shape[1])
    chunks = -(-jnp.max(num_targets) // CHUNK)
    log_probs = _chunked_log_probs(hidden, head, position, jnp.pad(target_token, padding), chunks)[:, :width]
    return jnp.where(valid, log_probs, 0.0)


@jax.custom_vjp
def _chunked_log_probs(hidden, head, position, token, chunks):
    def body(i, out):
        logits, _ = _chunk_logits(hidden, head, position, i)
        picked = jnp.take_along_axis(logits, _chunk(token, i)[..., None], axis=-1)[..., 0]
        return jax.lax.dynamic_update_slice(out, picked - jax.nn.logsumexp(logits, axis=-1), (0, i * CHUNK))

    return jax.lax.fori_loop(0, chunks, body, jnp.zeros(position.shape, jnp.float32))


def _chunked_log_probs_forward(hidden, head, position, token, chunks):
    return _chunked_log_probs(hidden, head, position, token, chunks), (hidden, head, position, token, chunks)


def _chunked_log_probs_backward(residuals, cotangent):
    hidden, head, position, token, chunks = residuals
    rows = jnp.arange(hidden.shape[0])[:, None]

    def body(i, carry):
        d_hidden, d_head = carry
        logits, states = _chunk_logits(hidden, head, position, i)
        # d log softmax(z)[y] / dz = onehot(y) - softmax(z)
        onehot = _chunk(token, i)[..., None] == jnp.arange(logits.shape[-1])
        d_logits = (_chunk(cotangent, i)[..., None] * (onehot - jax.nn.softmax(logits, axis=-1))).astype(hidden.dtype)
        d_states = _matmul("mcv,dv->mcd", d_logits, head)
        d_hidden = d_hidden.at[rows, _chunk(position, i)].add(d_states, mode="drop", unique_indices=False)
        return d_hidden, d_head + _matmul("mcd,mcv->dv", states, d_logits)

    zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32)
    d_hidden, d_head = jax.lax.fori_loop(0, chunks, body, zeros)
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), None, None, None


_chunked_log_probs.defvjp(_chunked_log_probs_forward, _chunked_log_probs_backward)


def _chunk(x, i):
    return jax.lax.dynamic_slice_in_dim(x, i * CHUNK, CHUNK, axis=1)


def _chunk_logits(hidden, head, position, i):
    """Float32 logits [m c v] of chunk i, and the hidden states [m c d] that they come from."""
    states = jnp.take_along_axis(hidden, _chunk(position, i)[..., None], axis=1, mode="clip")
    return _matmul("mcd,dv->mcv", states, head), states


def _matmul(equation, a, b):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b.astype(a.dtype), precision=exact, preferred_element_type=jnp.float32)
