"""The choice of tokens: from the hidden states of a step to what it writes, and where (device)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key, Shaped

from elbo_kto_jax.models.layers import matmul_precision
from elbo_kto_jax.models.network import MaskPredictor, Params, head_kernel, head_part
from elbo_kto_jax.runtime.arrays import AnyArray
from elbo_kto_jax.runtime.config import Sampler

_MAX_CHUNK = 64  # response positions whose logits exist at once; they take 4 * _MAX_CHUNK * vocabulary bytes a row
_LEAST = float(jnp.finfo(jnp.float32).min)  # log-probability 0 of a position that may still be written
_NOISE, _PRIORITY = 0, 1  # the two random draws at a position


class Guess(NamedTuple):
    """What a step would write at each position of the response; meaningful at candidates only."""

    token: Int[Array, "b g"]
    log_confidence: Float32[Array, "b g"]  # nats
    priority: Float32[Array, "b g"]  # the highest are written


def guess_tokens(
    model: MaskPredictor,
    params: Params,
    hidden: list[Float[Array, "b w d"]],
    start: Int[AnyArray, " b"],
    end: Int[AnyArray, " b"],
    candidate: Bool[Array, "b g"],
    keys: Key[Array, " b"],
    options: Sampler,
    eot_id: int | None,
) -> Guess:
    """The token, its confidence and its priority at the candidates, a chunk of each response at a time.

    The chunks go from the `end` of each row's block to the left. Those without a candidate are skipped, so logits are
    computed in the current block only (and where a mask token was written before).
    """
    b, g = candidate.shape
    chunk = max(size for size in range(1, _MAX_CHUNK + 1) if options.block_length % size == 0)

    def guess_chunk(i, guess: Guess) -> Guess:
        at = end - (i + 1) * chunk
        exists, at = at >= 0, jnp.maximum(at, 0)
        new_here = _take(candidate, at, chunk) & exists[:, None]

        def compute(guess: Guess) -> Guess:
            logits = [_head_logits(params, _take(states, at - start, chunk)) for states in hidden]
            position = at[:, None] + jnp.arange(chunk)
            position_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, position)
            new = _predict(logits, position_keys, model.config.eos_id, options, eot_id)
            put = jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice_in_dim(row, part, at, axis=0))
            return jax.tree.map(
                lambda old, part: put(old, jnp.where(new_here, part, _take(old, at, chunk)), at), guess, new
            )

        return jax.lax.cond(new_here.any(), compute, lambda guess: guess, guess)

    empty = Guess(jnp.zeros((b, g), jnp.int32), jnp.zeros((b, g), jnp.float32), jnp.zeros((b, g), jnp.float32))
    return jax.lax.fori_loop(0, g // chunk, guess_chunk, empty)


def _take(x: Shaped[Array, "b g *rest"], start: Int[Array, " b"], size: int) -> Shaped[Array, "b c *rest"]:
    """`size` columns of each row of x, from its own `start` on."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(x, start)


def _head_logits(params: Params, hidden: Float[Array, "b c d"]) -> Float32[Array, "b c v"]:
    """Logits accumulated in float32: bfloat16 ones would tie, and ties decide what is written."""
    kernel = head_kernel(head_part(params)).astype(hidden.dtype)
    precision = matmul_precision(hidden.dtype)
    return jnp.einsum("bcd,dv->bcv", hidden, kernel, precision=precision, preferred_element_type=jnp.float32)


def _predict(
    logits: list[Float32[Array, "b c v"]],
    keys: Key[Array, "b c"],
    eos_id: int,
    options: Sampler,
    eot_id: int | None,
) -> Guess:
    """Chooses a token from the logits at each position (the second set, for guidance, is of a masked prompt)."""
    if options.cfg_scale:
        conditional, unconditional = logits
        scores = unconditional + (options.cfg_scale + 1) * (conditional - unconditional)
    else:
        (scores,) = logits
    if options.logits_eos_inf:
        scores = scores.at[..., eos_id].set(-jnp.inf)
    token = jnp.argmax(_add_noise(scores, keys, options.temperature), axis=-1).astype(jnp.int32)
    if options.confidence_eos_eot_inf:  # after the choice: these tokens stay possible, but are written last
        scores = scores.at[..., jnp.array([eos_id, eot_id])].set(-jnp.inf)
    log_confidence = _log_probability(scores, token)
    if options.remasking == "random":

        def draw(key: Key[Array, ""]) -> Float32[Array, ""]:
            return jax.random.uniform(jax.random.fold_in(key, _PRIORITY))

        priority = jax.vmap(jax.vmap(draw))(keys)
    else:
        priority = jnp.maximum(log_confidence, _LEAST)
    return Guess(token, log_confidence, priority)


def _log_probability(scores: Float32[Array, "b c v"], token: Int[Array, "b c"]) -> Float32[Array, "b c"]:
    """log softmax(scores)[token], exact to float32's precision near 0 as well.

    A trained model is sure of many tokens at once; in float32 their log-softmax, or their probability, would round to
    the same number, and the order in which they are written would be lost.
    """
    chosen = jnp.take_along_axis(scores, token[..., None], axis=-1)
    is_other = jnp.arange(scores.shape[-1]) != token[..., None]
    odds_against = jnp.sum(jnp.where(is_other, jnp.exp(scores - chosen), 0.0), axis=-1)
    return jnp.where(jnp.isneginf(chosen[..., 0]), -jnp.inf, -jnp.log1p(odds_against))


def _add_noise(scores: Float32[Array, "b c v"], keys: Key[Array, "b c"], temperature: float) -> Float32[Array, "b c v"]:
    """Scores whose argmax is a sample of softmax(scores / temperature), by the Gumbel-max trick.

    The published sampler takes the argmax of exp(s) / (-log u)^T in float64, since exp overflows float32 and float32
    uniforms cut the noise off. The logarithm of that is s + T * gumbel, with the same argmax: it stays in float32's
    range, where its rounding (1e-7 relative) does not matter, and mode "high" draws the upper tail of the noise
    with 46 bits instead of 23. (With 23 the noise ends at 16, which makes rare tokens rarer still.)
    """
    if not temperature:
        return scores

    def draw(key: Key[Array, ""]) -> Float32[Array, " v"]:
        return jax.random.gumbel(jax.random.fold_in(key, _NOISE), scores.shape[-1:], mode="high")

    return scores + temperature * jax.vmap(jax.vmap(draw))(keys)


def choose(
    guess: Guess, candidate: Bool[Array, "b g"], quota: Int[AnyArray, " b"], threshold: float
) -> Bool[Array, "b g"]:
    """The candidates that a step writes: the `quota` of highest priority, from the left where they tie, and, with a
    threshold, every one whose confidence exceeds it."""
    order = jnp.argsort(jnp.where(candidate, -guess.priority, jnp.inf), axis=1, stable=True)
    write = jnp.argsort(order, axis=1) < quota[:, None]
    if threshold:
        write |= jnp.exp(guess.log_confidence) > threshold
    return write & candidate
