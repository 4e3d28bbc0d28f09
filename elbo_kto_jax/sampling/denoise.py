"""Denoising: the steps of a round over a batch of rows (device); one program, or with key/value reuse two, per shape.

A step predicts every masked position and writes the best of them: its share of the block's masked positions, and with a
threshold every one whose confidence exceeds it.

Masked means "holds the mask token", as in the published sampler: a position that was written, but whose most probable
token was the mask token itself, stays a candidate and may be written again in later steps and blocks (with key/value
reuse: in the first step of later blocks). A mask token in a prompt is left alone.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from elbo_kto_jax.models.network import MaskPredictor, Params
from elbo_kto_jax.runtime.arrays import AnyArray
from elbo_kto_jax.runtime.config import Sampler
from elbo_kto_jax.sampling import reuse
from elbo_kto_jax.sampling.choice import choose, guess_tokens
from elbo_kto_jax.sampling.rows import DecodeRows, DecodeState, whole_rows
from elbo_kto_jax.sampling.stops import has_ended, stop_tokens
from elbo_kto_jax.sharding import rules


@functools.partial(jax.jit, static_argnames=("model", "options", "eot_id", "mesh"))
def refresh(
    model: MaskPredictor,
    params: Params,
    rows: DecodeRows,
    state: DecodeState,
    *,
    options: Sampler,
    eot_id: int | None,
    mesh: jax.sharding.Mesh | None,
) -> tuple[DecodeState, Bool[Array, ""], reuse.Cache]:
    """A round's first step over the whole rows: (state, whether there is more to do, keys and values)."""
    hidden, cache = reuse.run_and_keep(model, params, rows, state.response, options)
    state = _take_step(model, params, rows, state, hidden, jnp.zeros_like(rows.block), options, eot_id, in_block=False)
    cache = reuse.split_by_head(cache, mesh)
    return *_hand_out(rows, state, options, model, eot_id, mesh, in_block=True), cache


@functools.partial(jax.jit, static_argnames=("model", "options", "eot_id", "mesh", "window"))
def take_steps(
    model: MaskPredictor,
    params: Params,
    rows: DecodeRows,
    state: DecodeState,
    cache: reuse.Cache | None,
    limit: Int[Array, ""],
    *,
    options: Sampler,
    eot_id: int | None,
    mesh: jax.sharding.Mesh | None,
    window: int | None,
) -> tuple[DecodeState, Bool[Array, ""]]:
    """At most `limit` steps of a round, over whole rows or, with a cache, over `window` columns of the response."""
    p, in_block, last = rows.prompt.shape[1], window is not None, state.step + limit

    def unfinished(state: DecodeState):
        return (state.step < last) & _candidates(rows, state, options, model, eot_id, in_block=in_block).any()

    def take_step(state: DecodeState):
        start: AnyArray
        if window is None or cache is None:
            whole = whole_rows(rows, state.response, options, model.config.mask_id)
            states: list[Any] = [model.apply({"params": params}, *row) for row in whole]
            hidden, start = [of_row[:, p:] for of_row in states], jnp.zeros_like(rows.block)
        else:
            hidden, start = reuse.run_windows(model, params, rows, state.response, cache, window, options)
        return _take_step(model, params, rows, state, hidden, start, options, eot_id, in_block=in_block)

    state = jax.lax.while_loop(unfinished, take_step, state)
    return _hand_out(rows, state, options, model, eot_id, mesh, in_block=in_block)


def _hand_out(
    rows: DecodeRows,
    state: DecodeState,
    options: Sampler,
    model: MaskPredictor,
    eot_id: int | None,
    mesh: jax.sharding.Mesh | None,
    *,
    in_block: bool,
) -> tuple[DecodeState, Bool[Array, ""]]:
    """The state and whether the round goes on, as every process reads them."""
    out = state, _candidates(rows, state, options, model, eot_id, in_block=in_block).any()
    return out if mesh is None else jax.lax.with_sharding_constraint(out, rules.replicated(mesh))


def _candidates(
    rows: DecodeRows, state: DecodeState, options: Sampler, model: MaskPredictor, eot_id: int | None, *, in_block: bool
) -> Bool[Array, "b g"]:
    """The masked positions up to the end of each row's block, or in it alone, while the row has steps to take."""
    column, first = jnp.arange(options.gen_length), (rows.block * options.block_length)[:, None]
    reached = (column >= (first if in_block else 0)) & (column < first + options.block_length)
    goes_on = _quota(rows.num_masked, state.step, options) > 0
    if options.early_stop:
        stop_ids = stop_tokens(model.config.eos_id, eot_id)
        goes_on &= ~has_ended(state.response, model.config.mask_id, stop_ids)
    return (state.response == model.config.mask_id) & reached & goes_on[:, None]


def _quota(num_masked: Int[AnyArray, " b"], step: Int[AnyArray, ""], options: Sampler) -> Int[AnyArray, " b"]:
    """How many positions each row writes in this step of a block that had `num_masked` masked ones.

    They are spread evenly over the steps, the first `remainder` steps take one more. With a threshold a step writes at
    least one position, and as many steps follow as the block needs, whatever `steps` says.
    """
    steps = options.block_length if options.threshold else options.steps * options.block_length // options.gen_length
    if options.threshold:
        return (step < num_masked).astype(jnp.int32)
    return jnp.where(step < steps, num_masked // steps + (step < num_masked % steps), 0)


def _take_step(
    model: MaskPredictor,
    params: Params,
    rows: DecodeRows,
    state: DecodeState,
    hidden: list[Float[Array, "b w d"]],
    start: Int[AnyArray, " b"],
    options: Sampler,
    eot_id: int | None,
    *,
    in_block: bool,
) -> DecodeState:
    """The state after the step whose hidden states are those of the response's columns from `start` on."""
    candidate = _candidates(rows, state, options, model, eot_id, in_block=in_block)
    keys = jax.random.wrap_key_data(cast(Array, rows.key_words), impl="threefry2x32")
    step_keys = jax.vmap(jax.random.fold_in)(keys, state.steps)
    end = (rows.block + 1) * options.block_length
    guess = guess_tokens(model, params, hidden, start, end, candidate, step_keys, options, eot_id)
    write = choose(guess, candidate, _quota(rows.num_masked, state.step, options), options.threshold)
    return DecodeState(
        response=jnp.where(write, guess.token, state.response),
        written_at=jnp.where(write, state.steps[:, None], state.written_at),
        confidence=jnp.where(write, jnp.exp(guess.log_confidence), state.confidence),
        steps=state.steps + candidate.any(axis=1),
        step=state.step + 1,
    )
