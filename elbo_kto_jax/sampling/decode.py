"""Block-wise unmasking: from prompts to responses with a mask predictor (METHOD 6).

A response starts as `gen_length` mask tokens. Its blocks of `block_length` are filled from left to right, each in
`steps / num_blocks` steps; a step predicts every masked position and writes the `quota` best of them. The whole
response is denoised in one compiled program: the host neither waits for a step nor sees one.

Rows. A row is [padding, prompt, response]: prompts end at the same column, so that the response stands at static
columns. Padding is a segment of its own that no prompt sees, and positions count from the first prompt token, so what
a prompt gets depends neither on the padding nor on the other rows. The width of a row is rounded up to a multiple of
`BUCKET`: one program serves all prompts of such a bucket.

Masked means "holds the mask token", as in the published sampler: a position that was written, but whose most probable
token was the mask token itself, stays a candidate and may be written again in later steps and blocks. A mask token in
a prompt is left alone.

Randomness. A prompt's key is a hash of (seed, prompt id); every draw folds in the prompt's own step and the position
in the response. Neither batch nor devices can change it.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, UInt32
from transformers import PreTrainedTokenizerBase

from elbo_kto_jax.config import Sampler
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.model.llada import LLaDA, Params, matmul_precision
from elbo_kto_jax.sharding import rules

BUCKET = 64  # tokens; rows are as wide as the next multiple, at the price of one compilation per width
_MAX_CHUNK = 64  # response positions whose logits exist at once; they take 4 * _MAX_CHUNK * vocabulary bytes a row
_NEVER = -1
_LEAST = float(jnp.finfo(jnp.float32).min)  # log-probability 0 of a position that may still be written


class Responses(NamedTuple):
    """What `generate` made of n prompts, in their order; `written_at` and `confidence` trace how it came about.

    Attributes:
      tokens: the responses.
      written_at: the prompt's own step, from 0, in which the token was written last; -1 where none ever was.
      confidence: probability of that token in that step, among what the options let it choose from.
      forward_passes: runs of the network over a batch; a guided step takes two.
    """

    tokens: Int32[np.ndarray, "n g"]
    written_at: Int32[np.ndarray, "n g"]
    confidence: Float32[np.ndarray, "n g"]
    forward_passes: int


def generate(
    model: LLaDA,
    params: Params,
    prompts: Sequence[Int32[np.ndarray, "_"]],
    options: Sampler,
    *,
    seed: int,
    prompt_ids: Sequence[str],
    eot_id: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int], Any] = lambda prompts_done: None,
) -> Responses:
    """Samples one response to each prompt (METHOD 6).

    Args:
      model: the mask predictor.
      params: its parameters; on the devices of `mesh` where there is one.
      prompts: token ids of each prompt, not padded; they may differ in length.
      options: the sampler's settings.
      seed: of every random draw.
      prompt_ids: one name per prompt; a prompt's random draws depend on the seed and its name alone.
      eot_id: the end-of-turn token, which `confidence_eos_eot_inf` needs.
      mesh: the prompts of a batch are split over its devices (sharding/rules.py); None runs on one device.
      progress: called after every batch with the number of prompts in it.

    Raises:
      UserError: options that exclude each other or are not available.
      ValueError: the arguments do not fit together.
    """
    check_options(options)
    model = model.clone(mesh=mesh)
    if options.confidence_eos_eot_inf and eot_id is None:
        raise ValueError("eot_id: confidence_eos_eot_inf needs the id of the end-of-turn token")
    if len(prompts) != len(prompt_ids):
        raise ValueError(f"prompt_ids: expected one per prompt, {len(prompts)}, got {len(prompt_ids)}")
    shards = 1 if mesh is None else rules.row_shards(mesh)
    rows = -(-min(options.batch_size, len(prompts)) // shards) * shards
    place = jnp.asarray if mesh is None else functools.partial(rules.place, sharding=rules.row_sharding(mesh))

    n, g = len(prompts), options.gen_length
    result = Responses(np.empty((n, g), np.int32), np.empty((n, g), np.int32), np.empty((n, g), np.float32), 0)
    passes = 0
    for width, members in _batches([len(prompt) for prompt in prompts], g, rows):
        # The last batch is filled up with copies of its last prompt: a copy takes no step that the prompt does not.
        filled = members + members[-1:] * (rows - len(members))
        state = _denoise(
            model,
            params,
            place(_pad_left([prompts[i] for i in filled], width - g)),
            place(np.array([len(prompts[i]) for i in filled], np.int32)),
            place(np.stack([_key_words(seed, prompt_ids[i]) for i in filled])),
            options=options,
            eot_id=eot_id,
            mesh=mesh,
        )
        for out, value in zip(result[:3], (state.response, state.written_at, state.confidence), strict=True):
            out[members] = np.asarray(value)[: len(members)]
        passes += int(state.forward_passes)
        progress(len(members))
    return result._replace(forward_passes=passes)


def check_options(options: Sampler) -> None:
    """Refuses settings that `generate` cannot follow.

    Raises:
      UserError: settings that exclude each other or are not available.
      ValueError: lengths that do not divide (a config file with such is refused where it is read).
    """
    if options.cache != "none":
        raise UserError(f"config.sampler.cache: {options.cache!r} is not available yet; set it to 'none'")
    if options.threshold and options.remasking == "random":
        raise UserError("config.sampler.threshold: compares confidences, which remasking='random' ignores; set it to 0")
    if options.gen_length % options.block_length or options.steps % (options.gen_length // options.block_length):
        raise ValueError(
            "options: expected block_length to divide gen_length, and the number of blocks to divide steps, got "
            f"{options.block_length}, {options.gen_length}, {options.steps}"
        )


def cut_response(response: Int32[np.ndarray, " g"], stop_ids: Sequence[int]) -> Int32[np.ndarray, " m"]:
    """The response up to its first end-of-text or end-of-turn token, without it."""
    (stops,) = np.nonzero(np.isin(response, np.asarray(stop_ids, np.int32)))
    return response[: stops[0]] if len(stops) else response


def to_text(response: Int32[np.ndarray, " g"], tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> str:
    """The text of a response up to its first stop token; other special tokens are left out."""
    return tokenizer.decode(cut_response(response, stop_ids).tolist(), skip_special_tokens=True)


# The host's part: batches.


def _batches(prompt_lengths: Sequence[int], gen_length: int, rows: int) -> list[tuple[int, list[int]]]:
    """(width of a row, at most `rows` prompt indices) per batch; the widest first, so that memory runs out at once."""
    buckets: dict[int, list[int]] = {}
    for i, length in enumerate(prompt_lengths):
        buckets.setdefault(-(-(length + gen_length) // BUCKET) * BUCKET, []).append(i)
    return [
        (width, buckets[width][at : at + rows])
        for width in sorted(buckets, reverse=True)
        for at in range(0, len(buckets[width]), rows)
    ]


def _pad_left(prompts: Sequence[np.ndarray], width: int) -> Int32[np.ndarray, "b p"]:
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return padded


def _key_words(seed: int, prompt_id: str) -> np.ndarray:
    digest = hashlib.blake2b(f"sampling:{seed}:{prompt_id}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


# The device's part: one program per batch shape.


class _State(NamedTuple):
    """Where the denoising of b responses stands."""

    response: Int[Array, "b g"]
    written_at: Int[Array, "b g"]
    confidence: Float32[Array, "b g"]
    steps: Int[Array, " b"]  # steps that each row has taken
    forward_passes: Int[Array, ""]


class _Guess(NamedTuple):
    """What a step would write at each position of the response; meaningful at candidates only."""

    token: Int[Array, "b g"]
    log_confidence: Float32[Array, "b g"]  # nats
    priority: Float32[Array, "b g"]  # the highest are written


@functools.partial(jax.jit, static_argnames=("model", "options", "eot_id", "mesh"))
def _denoise(
    model: LLaDA,
    params: Params,
    prompts: Int[Array, "b p"],
    prompt_lengths: Int[Array, " b"],
    key_words: UInt32[Array, "b 2"],
    *,
    options: Sampler,
    eot_id: int | None,
    mesh: jax.sharding.Mesh | None,
) -> _State:
    """Denoises the responses to prompts that are padded on the left; block by block, so a cache can live in a block."""
    b, g = prompts.shape[0], options.gen_length
    mask_id = model.config.mask_token_id
    keys = jax.random.wrap_key_data(key_words, impl="threefry2x32")
    quota = jnp.asarray(_quota(options))

    def fill_block(block, state: _State) -> _State:
        reached = jnp.arange(g) < (block + 1) * options.block_length

        def candidates(state: _State):
            return (state.response == mask_id) & reached

        def unfinished(carry):
            step, state = carry
            return (step < len(quota)) & candidates(state).any()

        def take_step(carry):
            step, state = carry
            candidate = candidates(state)
            hidden = _response_states(model, params, prompts, prompt_lengths, state.response, options)
            step_keys = jax.vmap(jax.random.fold_in)(keys, state.steps)
            guess = _guess(model, params, hidden, candidate, step_keys, options, eot_id)
            write = _choose(guess, candidate, quota[step], options.threshold)
            return step + 1, _State(
                response=jnp.where(write, guess.token, state.response),
                written_at=jnp.where(write, state.steps[:, None], state.written_at),
                confidence=jnp.where(write, jnp.exp(guess.log_confidence), state.confidence),
                steps=state.steps + candidate.any(axis=1),
                forward_passes=state.forward_passes + len(hidden),
            )

        return jax.lax.while_loop(unfinished, take_step, (jnp.int32(0), state))[1]

    state = _State(
        response=jnp.full((b, g), mask_id, jnp.int32),
        written_at=jnp.full((b, g), _NEVER, jnp.int32),
        confidence=jnp.zeros((b, g), jnp.float32),
        steps=jnp.zeros(b, jnp.int32),
        forward_passes=jnp.int32(0),
    )
    if mesh is not None:
        rows = rules.row_sharding(mesh)
        state = jax.lax.with_sharding_constraint(state, _State(rows, rows, rows, rows, rules.replicated(mesh)))
    state = jax.lax.fori_loop(0, g // options.block_length, fill_block, state)
    if mesh is not None:  # every process reads every response
        state = jax.lax.with_sharding_constraint(state, rules.replicated(mesh))
    return state


def _quota(options: Sampler) -> Int32[np.ndarray, " steps"]:
    """How many positions each step of a block writes; steps that would write none are left out.

    The positions are spread evenly over the steps, the first `remainder` steps take one more. With a threshold a step
    writes at least one position, and as many steps follow as the block needs, whatever `steps` says.
    """
    length = options.block_length
    if options.threshold:
        return np.ones(length, np.int32)
    steps = options.steps // (options.gen_length // length)
    quota = length // steps + (np.arange(steps) < length % steps)
    return quota[quota > 0].astype(np.int32)


def _response_states(
    model: LLaDA,
    params: Params,
    prompts: Int[Array, "b p"],
    prompt_lengths: Int[Array, " b"],
    response: Int[Array, "b g"],
    options: Sampler,
) -> list[Float[Array, "b g d"]]:
    """Hidden states of the response: given the prompt and, for guidance, given a masked prompt."""
    p, g = prompts.shape[1], response.shape[1]
    column = jnp.arange(p + g)
    first = p - prompt_lengths[:, None]  # column of the first prompt token
    positions = jnp.maximum(column - first, 0)
    segment_ids = (column >= first).astype(jnp.int32)

    def states(prompts):
        tokens = jnp.concatenate([prompts, response], axis=1)
        return model.apply({"params": params}, tokens, positions, segment_ids)[:, p:]

    conditional = states(prompts)
    if not options.cfg_scale:
        return [conditional]
    return [conditional, states(jnp.full_like(prompts, model.config.mask_token_id))]


def _guess(
    model: LLaDA,
    params: Params,
    hidden: list[Float[Array, "b g d"]],
    candidate: Bool[Array, "b g"],
    keys: Key[Array, " b"],
    options: Sampler,
    eot_id: int | None,
) -> _Guess:
    """The token, its confidence and its priority at the candidates, a chunk of the response at a time.

    Chunks without a candidate are skipped, so logits are computed in the current block only (and where a mask token
    was written before).
    """
    b, g = candidate.shape
    chunk = max(size for size in range(1, _MAX_CHUNK + 1) if options.block_length % size == 0)
    position_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, jnp.arange(g))

    def guess_chunk(i, guess: _Guess) -> _Guess:
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * chunk, slice_size=chunk, axis=1)

        def compute(guess: _Guess) -> _Guess:
            logits = [_head_logits(params, take(states)) for states in hidden]
            new = _predict(logits, take(position_keys), model.config.eos_token_id, options, eot_id)
            return jax.tree.map(lambda old, part: jax.lax.dynamic_update_slice(old, part, (0, i * chunk)), guess, new)

        return jax.lax.cond(take(candidate).any(), compute, lambda guess: guess, guess)

    empty = _Guess(jnp.zeros((b, g), jnp.int32), jnp.zeros((b, g), jnp.float32), jnp.zeros((b, g), jnp.float32))
    return jax.lax.fori_loop(0, g // chunk, guess_chunk, empty)


def _head_logits(params: Params, hidden: Float[Array, "b c d"]) -> Float32[Array, "b c v"]:
    """Logits accumulated in float32: bfloat16 ones would tie, and ties decide what is written."""
    kernel = params["head"]["kernel"].astype(hidden.dtype)
    precision = matmul_precision(hidden.dtype)
    return jnp.einsum("bcd,dv->bcv", hidden, kernel, precision=precision, preferred_element_type=jnp.float32)


def _predict(
    logits: list[Float32[Array, "b c v"]],
    keys: Key[Array, "b c"],
    eos_id: int,
    options: Sampler,
    eot_id: int | None,
) -> _Guess:
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
        draw = lambda key: jax.random.uniform(jax.random.fold_in(key, _PRIORITY))  # noqa: E731
        priority = jax.vmap(jax.vmap(draw))(keys)
    else:
        priority = jnp.maximum(log_confidence, _LEAST)
    return _Guess(token, log_confidence, priority)


def _log_probability(scores: Float32[Array, "b c v"], token: Int[Array, "b c"]) -> Float32[Array, "b c"]:
    """log softmax(scores)[token], exact to float32's precision near 0 as well.

    A trained model is sure of many tokens at once; in float32 their log-softmax, or their probability, would round to
    the same number, and the order in which they are written would be lost.
    """
    chosen = jnp.take_along_axis(scores, token[..., None], axis=-1)
    is_other = jnp.arange(scores.shape[-1]) != token[..., None]
    odds_against = jnp.sum(jnp.where(is_other, jnp.exp(scores - chosen), 0.0), axis=-1)
    return jnp.where(jnp.isneginf(chosen[..., 0]), -jnp.inf, -jnp.log1p(odds_against))


_NOISE, _PRIORITY = 0, 1  # the two random draws at a position


def _add_noise(scores: Float32[Array, "b c v"], keys: Key[Array, "b c"], temperature: float) -> Float32[Array, "b c v"]:
    """Scores whose argmax is a sample of softmax(scores / temperature), by the Gumbel-max trick.

    The published sampler takes the argmax of exp(s) / (-log u)^T in float64, since exp overflows float32 and float32
    uniforms cut the noise off. The logarithm of that is s + T * gumbel, with the same argmax: it stays in float32's
    range, where its rounding (1e-7 relative) does not matter, and mode "high" draws the upper tail of the noise
    with 46 bits instead of 23. (With 23 the noise ends at 16, which makes rare tokens rarer still.)
    """
    if not temperature:
        return scores
    draw = lambda key: jax.random.gumbel(jax.random.fold_in(key, _NOISE), scores.shape[-1:], mode="high")  # noqa: E731
    return scores + temperature * jax.vmap(jax.vmap(draw))(keys)


def _choose(
    guess: _Guess, candidate: Bool[Array, "b g"], quota: Int[Array, ""], threshold: float
) -> Bool[Array, "b g"]:
    """The candidates that a step writes: the `quota` of highest priority, from the left where they tie, and, with a
    threshold, every one whose confidence exceeds it."""
    order = jnp.argsort(jnp.where(candidate, -guess.priority, jnp.inf), axis=1, stable=True)
    write = jnp.argsort(order, axis=1) < quota
    if threshold:
        write |= jnp.exp(guess.log_confidence) > threshold
    return write & candidate
