"""Block-wise unmasking: from prompts to responses with a mask predictor (docs/method.md 6).

A response starts as `gen_length` mask tokens. Its blocks of `block_length` are filled from left to right, each in
`steps / num_blocks` steps; a step predicts every masked position and writes the best of them: its share of the block's
masked positions, and with a threshold every one whose confidence exceeds it. A response may also start as a template
with known tokens (infilling): what is masked in it is filled, block by block in the same way.

Rows. A row is [padding, prompt, response]: prompts end at the same column, so that the response stands at static
columns. Padding is a segment of its own that no prompt sees, and positions count from the first prompt token, so what
a prompt gets depends neither on the padding nor on the other rows. The width of a row is rounded up to a multiple of
`BUCKET`, and beyond 8 of those to one of four widths per octave (640, 768, 896, 1024, 1280, ...): one set of programs
serves all prompts of such a bucket, and rows of up to 4096 tokens have 20 of them.

Rounds. In a round every row of the batch fills its next block, and the host neither waits for a step nor sees one
(unless it watches). Between rounds, finished rows make room for prompts that wait: a row that needs fewer blocks, or
that `early_stop` ends, costs no more.

Key/value reuse (Fast-dLLM, arXiv 2505.22618). A round's first step runs the whole row and keeps all keys and values;
the later ones run a window of it alone, attend to the kept ones outside the window, and write in the round's block.
The window is the block (`dual`), or the block and what follows it (`prefix`). What is kept is out of date as soon as a
token is written, since attention is bidirectional: that is an approximation, unless a round has a single step. A
prefix window is as wide as the longest of the batch, rounded up to a power of two of blocks: log2(num_blocks) programs.

Masked means "holds the mask token", as in the published sampler: a position that was written, but whose most probable
token was the mask token itself, stays a candidate and may be written again in later steps and blocks (with key/value
reuse: in the first step of later blocks). A mask token in a prompt is left alone.

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
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, Shaped, UInt32
from transformers import PreTrainedTokenizerBase

from elbo_kto_jax.models.layers import CACHE, matmul_precision
from elbo_kto_jax.models.network import MaskPredictor, Params, head_kernel, head_part
from elbo_kto_jax.runtime.config import Sampler
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sharding import rules

BUCKET = 64  # tokens; short rows are as wide as the next multiple, at the price of one compilation per width
_MAX_CHUNK = 64  # response positions whose logits exist at once; they take 4 * _MAX_CHUNK * vocabulary bytes a row
_NEVER = -1
_LEAST = float(jnp.finfo(jnp.float32).min)  # log-probability 0 of a position that may still be written


class Responses(NamedTuple):
    """What `generate` made of n prompts, in their order; `written_at` and `confidence` trace how it came about.

    Attributes:
      tokens: the responses; end-of-text where nothing was to be written.
      written_at: the prompt's own step, from 0, in which the token was written last; -1 where none ever was.
      confidence: probability of that token in that step, among what the options let it choose from.
      forward_passes: runs of the network over a batch; a guided step takes two.
      forward_tokens: positions that went through its layers in them, padding and rows that only fill a batch included.
    """

    tokens: Int32[np.ndarray, "n g"]
    written_at: Int32[np.ndarray, "n g"]
    confidence: Float32[np.ndarray, "n g"]
    forward_passes: int
    forward_tokens: int


def generate(
    model: MaskPredictor,
    params: Params,
    prompts: Sequence[Int32[np.ndarray, "_"]],
    options: Sampler,
    *,
    seed: int,
    prompt_ids: Sequence[str],
    templates: Sequence[Int32[np.ndarray, "_"]] | None = None,
    eot_id: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int], Any] = lambda prompts_done: None,
    watch: Callable[[int, Int32[np.ndarray, " g"]], Any] | None = None,
) -> Responses:
    """Samples one response to each prompt (docs/method.md 6).

    Args:
      model: the mask predictor.
      params: its parameters; on the devices of `mesh` where there is one.
      prompts: token ids of each prompt, not padded; they may differ in length.
      options: the sampler's settings.
      seed: of every random draw.
      prompt_ids: one name per prompt; a prompt's random draws depend on the seed and its name alone.
      templates: what each response starts as, at most `gen_length` tokens: mask tokens are filled, the others stay, and
        none is added. None: `gen_length` mask tokens each.
      eot_id: the end-of-turn token, which `confidence_eos_eot_inf` needs; with `early_stop` it ends a response too.
      mesh: the prompts of a batch are split over its devices (sharding/rules.py); None runs on one device.
      progress: called with the number of prompts whenever some are done.
      watch: called after every step with the index of each prompt in the batch and its response so far.

    Raises:
      UserError: options that exclude each other or are not available.
      ValueError: the arguments do not fit together.
    """
    check_options(options)
    if options.confidence_eos_eot_inf and eot_id is None:
        raise ValueError("eot_id: confidence_eos_eot_inf needs the id of the end-of-turn token")
    if len(prompts) != len(prompt_ids):
        raise ValueError(f"prompt_ids: expected one per prompt, {len(prompts)}, got {len(prompt_ids)}")
    g, mask_id = options.gen_length, model.config.mask_token_id
    if templates is None:
        templates = [np.full(g, mask_id, np.int32)] * len(prompts)
    if len(templates) != len(prompts) or max(map(len, templates), default=0) > g:
        raise ValueError(f"templates: expected one per prompt, {len(prompts)}, of at most {g} tokens")
    shards = 1 if mesh is None else rules.row_shards(mesh)
    size = -(-min(options.batch_size, len(prompts)) // shards) * shards

    n = len(prompts)
    result = Responses(np.zeros((n, g), np.int32), np.zeros((n, g), np.int32), np.zeros((n, g), np.float32), 0, 0)
    forward_passes = forward_tokens = 0
    for width, waiting in _buckets([len(prompt) for prompt in prompts], g):
        batch = _Batch(model.clone(mesh=mesh), params, size, width, options, eot_id, mesh)
        while waiting or batch.members:
            for row in batch.free_rows()[: len(waiting)]:
                i = waiting.pop(0)
                batch.put(row, i, prompts[i], templates[i], _key_words(seed, prompt_ids[i]))
            batch.fill_next_blocks(watch)
            finished = batch.take_finished()
            for i, row in finished.items():
                result.tokens[i], result.written_at[i], result.confidence[i] = row
            progress(len(finished))
        forward_passes += batch.forward_passes
        forward_tokens += batch.forward_tokens
    return result._replace(forward_passes=forward_passes, forward_tokens=forward_tokens)


def check_options(options: Sampler) -> None:
    """Refuses settings that `generate` cannot follow.

    Raises:
      UserError: settings that exclude each other or are not available.
      ValueError: lengths that do not divide (a config file with such is refused where it is read).
    """
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


# The host's part: which prompts share a batch, and which block each of them fills next.


def _buckets(prompt_lengths: Sequence[int], gen_length: int) -> list[tuple[int, list[int]]]:
    """(width of a row, indices of its prompts) per bucket; the widest first, so that memory runs out at once."""
    buckets: dict[int, list[int]] = {}
    for i, length in enumerate(prompt_lengths):
        buckets.setdefault(_width(length + gen_length), []).append(i)
    return sorted(buckets.items(), reverse=True)


def _width(tokens: int) -> int:
    """The width of the row that holds so many tokens."""
    step = max(BUCKET, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // step) * step


def _key_words(seed: int, prompt_id: str) -> np.ndarray:
    digest = hashlib.blake2b(f"sampling:{seed}:{prompt_id}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


class Rows(NamedTuple):
    """The b rows of a batch; a row without a prompt has a response of no tokens."""

    prompt: Int[Array, "b p"]  # padded on the left
    prompt_length: Int[Array, " b"]
    key_words: UInt32[Array, "b 2"]
    response_length: Int[Array, " b"]
    block: Int[Array, " b"]  # that each row fills in this round
    num_masked: Int[Array, " b"]  # positions of that block, at the round's start


class State(NamedTuple):
    """Where the denoising of b responses stands."""

    response: Int[Array, "b g"]
    written_at: Int[Array, "b g"]
    confidence: Float32[Array, "b g"]
    steps: Int[Array, " b"]  # steps that each row has taken
    step: Int[Array, ""]  # of this round


class _Batch:
    """A batch of `size` rows of `width` tokens: prompts come and go, the shapes and so the programs stay."""

    def __init__(self, model, params, size: int, width: int, options: Sampler, eot_id: int | None, mesh):
        self.members: dict[int, int] = {}  # row -> prompt
        self.forward_passes = self.forward_tokens = 0
        self._options, self._size, self._width, self._lead = options, size, width, _lead(model)
        self._mask_id, self._eos_id = model.config.mask_token_id, model.config.eos_token_id
        self._stop_ids = _stop_ids(self._eos_id, eot_id)
        static = {"options": options, "eot_id": eot_id, "mesh": mesh}
        self._refresh = functools.partial(_refresh, model, params, **static)
        self._steps = functools.partial(take_steps, model, params, **static)
        self._place = functools.partial(_place, sharding=None if mesh is None else rules.row_sharding(mesh))
        self._replicate = functools.partial(_place, sharding=None if mesh is None else rules.replicated(mesh))
        g, zeros = options.gen_length, lambda *shape: np.zeros((size, *shape), np.int32)
        self._rows = Rows(zeros(width - g), zeros(), zeros(2).astype(np.uint32), zeros(), zeros(), zeros())
        self._state = State(
            np.full((size, g), self._eos_id, np.int32), zeros(g), np.zeros((size, g), np.float32), zeros(), np.int32(0)
        )

    def free_rows(self) -> list[int]:
        return [row for row in range(self._size) if row not in self.members]

    def put(self, row: int, member: int, prompt: np.ndarray, template: np.ndarray, key_words: np.ndarray) -> None:
        """Starts a response in a free row."""
        self.members[row] = member
        rows, state = self._rows, self._state
        rows.prompt[row] = 0
        rows.prompt[row, rows.prompt.shape[1] - len(prompt) :] = prompt
        rows.prompt_length[row], rows.response_length[row], rows.key_words[row] = len(prompt), len(template), key_words
        state.response[row, : len(template)], state.response[row, len(template) :] = template, self._eos_id
        state.written_at[row], state.confidence[row], state.steps[row] = _NEVER, 0.0, 0
        self._start_block(row, self._next_block(row, 0))

    def fill_next_blocks(self, watch: Callable[[int, np.ndarray], Any] | None) -> None:
        """One round: every row fills its block."""
        rows, cache, window = self._place(self._rows), None, None
        state = self._place(self._state._replace(step=None))._replace(step=self._replicate(np.int32(0)))
        unfinished = bool(self._rows.num_masked.any())
        if self._options.cache != "none" and unfinished:
            state, unfinished, cache = self._refresh(rows, state)
            window = self._window()
            self._count(1, self._width)
            self._show(state, watch)
        while unfinished:
            before = int(state.step)
            state, unfinished = self._steps(
                rows, state, cache, np.int32(1 if watch else self._options.block_length), window=window
            )
            self._count(int(state.step) - before, self._width if window is None else window + self._lead)
            self._show(state, watch)
        self._state = State(*(np.array(leaf) for leaf in state))

    def take_finished(self) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens, written_at, confidence) of the prompts that are done, whose rows are free now; the other rows go on
        to their next block with a masked position."""
        finished = {}
        for row, member in list(self.members.items()):
            done = int(self._rows.block[row]) + 1
            tokens, written_at, confidence = (leaf[row].copy() for leaf in self._state[:3])
            next_block = self._next_block(row, done)
            stops = self._options.early_stop and bool(_has_ended(tokens, self._mask_id, self._stop_ids))
            if stops:
                left = tokens == self._mask_id
                tokens[left], written_at[left], confidence[left] = self._eos_id, _NEVER, 0.0
            if stops or next_block is None:
                finished[member] = tokens, written_at, confidence
                del self.members[row]
                self._rows.response_length[row], next_block = 0, None
                self._state.response[row] = self._eos_id
            self._start_block(row, next_block)
        return finished

    def _next_block(self, row: int, first: int) -> int | None:
        """The first block from `first` on that has a masked position."""
        blocks = self._state.response[row].reshape(-1, self._options.block_length)
        (masked,) = np.nonzero((blocks[first:] == self._mask_id).any(axis=1))
        return first + int(masked[0]) if len(masked) else None

    def _start_block(self, row: int, block: int | None) -> None:
        blocks = self._state.response[row].reshape(-1, self._options.block_length)
        self._rows.block[row] = len(blocks) - 1 if block is None else block
        self._rows.num_masked[row] = 0 if block is None else np.sum(blocks[block] == self._mask_id)

    def _window(self) -> int:
        """Columns of the response that the later steps of this round run."""
        length = self._options.block_length
        if self._options.cache == "dual":
            return length
        longest = self._options.gen_length // length - int(self._rows.block[self._rows.num_masked > 0].min())
        return min(length << (longest - 1).bit_length(), self._options.gen_length)

    def _count(self, steps: int, columns: int) -> None:
        passes = steps * (2 if self._options.cfg_scale else 1)
        self.forward_passes += passes
        self.forward_tokens += passes * self._size * columns

    def _show(self, state: State, watch: Callable[[int, np.ndarray], Any] | None) -> None:
        if watch:
            responses = np.asarray(state.response)
            for row, member in self.members.items():
                watch(member, responses[row])


def _place(tree, sharding):
    return jax.tree.map(jnp.asarray if sharding is None else functools.partial(rules.place, sharding=sharding), tree)


# The device's part: two programs per batch shape (and one more per width of a prefix window).


class _Guess(NamedTuple):
    """What a step would write at each position of the response; meaningful at candidates only."""

    token: Int[Array, "b g"]
    log_confidence: Float32[Array, "b g"]  # nats
    priority: Float32[Array, "b g"]  # the highest are written


Cache = list[Params]  # keys and values of every layer (models/layers.py), of each pass of a step


@functools.partial(jax.jit, static_argnames=("model", "options", "eot_id", "mesh"))
def _refresh(
    model: MaskPredictor,
    params: Params,
    rows: Rows,
    state: State,
    *,
    options: Sampler,
    eot_id: int | None,
    mesh: jax.sharding.Mesh | None,
) -> tuple[State, Bool[Array, ""], Cache]:
    """A round's first step over the whole rows: (state, whether there is more to do, keys and values)."""
    hidden, cache = [], []
    for tokens, positions, segment_ids in _whole_rows(rows, state.response, options, model.config.mask_token_id):
        states, kept = model.apply({"params": params}, tokens, positions, segment_ids, mutable=[CACHE])
        hidden.append(states[:, rows.prompt.shape[1] :])
        cache.append(kept[CACHE])
    state = _take_step(model, params, rows, state, hidden, jnp.zeros_like(rows.block), options, eot_id, in_block=False)
    if mesh is not None:
        by_head = NamedSharding(mesh, rules.spec((None, "rows", None, "kv_heads"), mesh))
        cache = jax.lax.with_sharding_constraint(cache, by_head)
    return *_hand_out(rows, state, options, model, eot_id, mesh, in_block=True), cache


@functools.partial(jax.jit, static_argnames=("model", "options", "eot_id", "mesh", "window"))
def take_steps(
    model: MaskPredictor,
    params: Params,
    rows: Rows,
    state: State,
    cache: Cache | None,
    limit: Int[Array, ""],
    *,
    options: Sampler,
    eot_id: int | None,
    mesh: jax.sharding.Mesh | None,
    window: int | None,
) -> tuple[State, Bool[Array, ""]]:
    """At most `limit` steps of a round, over whole rows or, with a cache, over `window` columns of the response."""
    p, in_block, last = rows.prompt.shape[1], window is not None, state.step + limit

    def unfinished(state: State):
        return (state.step < last) & _candidates(rows, state, options, model, eot_id, in_block=in_block).any()

    def take_step(state: State):
        if not in_block:
            whole = _whole_rows(rows, state.response, options, model.config.mask_token_id)
            hidden, start = [model.apply({"params": params}, *row)[:, p:] for row in whole], jnp.zeros_like(rows.block)
        else:
            first = rows.block * options.block_length
            start = first if options.cache == "dual" else jnp.full_like(first, options.gen_length - window)
            lead = _lead(model)
            hidden = []
            for prompt, kept in zip(_prompts(rows, options, model.config.mask_token_id), cache, strict=True):
                inputs = _windows(rows, prompt, state.response, start - lead, first, lead + window)
                hidden.append(model.apply({"params": params, CACHE: kept}, *inputs)[:, lead:])
        return _take_step(model, params, rows, state, hidden, start, options, eot_id, in_block=in_block)

    state = jax.lax.while_loop(unfinished, take_step, state)
    return _hand_out(rows, state, options, model, eot_id, mesh, in_block=in_block)


def _hand_out(
    rows: Rows, state: State, options: Sampler, model: MaskPredictor, eot_id: int | None, mesh, *, in_block: bool
) -> tuple[State, Bool[Array, ""]]:
    """The state and whether the round goes on, as every process reads them."""
    out = state, _candidates(rows, state, options, model, eot_id, in_block=in_block).any()
    return out if mesh is None else jax.lax.with_sharding_constraint(out, rules.replicated(mesh))


def _candidates(
    rows: Rows, state: State, options: Sampler, model: MaskPredictor, eot_id: int | None, *, in_block: bool
) -> Bool[Array, "b g"]:
    """The masked positions up to the end of each row's block, or in it alone, while the row has steps to take."""
    column, first = jnp.arange(options.gen_length), (rows.block * options.block_length)[:, None]
    reached = (column >= (first if in_block else 0)) & (column < first + options.block_length)
    goes_on = _quota(rows.num_masked, state.step, options) > 0
    if options.early_stop:
        stop_ids = _stop_ids(model.config.eos_token_id, eot_id)
        goes_on &= ~_has_ended(state.response, model.config.mask_token_id, stop_ids)
    return (state.response == model.config.mask_token_id) & reached & goes_on[:, None]


def _stop_ids(eos_id: int, eot_id: int | None) -> list[int]:
    return [eos_id] if eot_id is None else [eos_id, eot_id]


def _has_ended(response, mask_id: int, stop_ids: list[int]):
    """Whether a stop token stands in each response [... g] with no masked position before it: what precedes it is the
    answer, and cannot change any more."""
    is_stop = (response[..., None] == np.asarray(stop_ids)).any(axis=-1)
    return (is_stop & ((response == mask_id).cumsum(axis=-1) == 0)).any(axis=-1)


def _quota(num_masked: Int[Array, " b"], step: Int[Array, ""], options: Sampler) -> Int[Array, " b"]:
    """How many positions each row writes in this step of a block that had `num_masked` masked ones.

    They are spread evenly over the steps, the first `remainder` steps take one more. With a threshold a step writes at
    least one position, and as many steps follow as the block needs, whatever `steps` says.
    """
    steps = options.block_length if options.threshold else options.steps * options.block_length // options.gen_length
    if options.threshold:
        return (step < num_masked).astype(jnp.int32)
    return jnp.where(step < steps, num_masked // steps + (step < num_masked % steps), 0)


def _whole_rows(rows: Rows, response: Int[Array, "b g"], options: Sampler, mask_id: int) -> list[tuple[Array, ...]]:
    """(tokens, positions, segment ids) of the rows, and for guidance of the rows with a masked prompt."""
    p, g = rows.prompt.shape[1], response.shape[1]
    column = jnp.arange(p + g)
    first = p - rows.prompt_length[:, None]  # column of the first prompt token
    positions = jnp.maximum(column - first, 0)
    segment_ids = _is_real(rows, column).astype(jnp.int32)
    prompts = _prompts(rows, options, mask_id)
    return [(jnp.concatenate([prompt, response], axis=1), positions, segment_ids) for prompt in prompts]


def _prompts(rows: Rows, options: Sampler, mask_id: int) -> list[Int[Array, "b p"]]:
    """The prompt of each pass of a step: the rows' own, and for guidance a masked one."""
    return [rows.prompt, jnp.full_like(rows.prompt, mask_id)] if options.cfg_scale else [rows.prompt]


def _lead(model: MaskPredictor) -> int:
    """Columns before a window that are run as well, since its first token is predicted from them."""
    return int(model.config.predicts_next)


def _windows(
    rows: Rows,
    prompt: Int[Array, "b p"],
    response: Int[Array, "b g"],
    start: Int[Array, " b"],
    first: Int[Array, " b"],
    width: int,
) -> tuple[Array, ...]:
    """(tokens, positions, segment ids, key segment ids) of `width` columns of each response, from `start` on.

    The first may be the column before the response, number -1: the last token of `prompt`, where there is one.
    Keys and values are the window's own from column `first` of the response on, and the kept ones elsewhere.
    """
    p, g = rows.prompt.shape[1], response.shape[1]
    at = start[:, None] + jnp.arange(width)  # columns of the response
    whole = jnp.concatenate([prompt, response], axis=1)
    tokens = jnp.take_along_axis(whole, jnp.maximum(p + at, 0), axis=1)
    segment_ids = _is_real(rows, p + at).astype(jnp.int32)
    own = jnp.where(at >= first[:, None], segment_ids, _UNSEEN)
    column = jnp.arange(p + g)
    renewed = (column >= p + first[:, None]) & (column < p + start[:, None] + width)
    kept = jnp.where(_is_real(rows, column) & ~renewed, 1, _UNSEEN)
    return tokens, jnp.maximum(rows.prompt_length[:, None] + at, 0), segment_ids, jnp.concatenate([kept, own], axis=1)


_UNSEEN = -1  # the segment of a key that no query is in


def _is_real(rows: Rows, column: Int[Array, "..."]) -> Bool[Array, "b s"]:
    """Whether a column of each row holds a token of its prompt or response."""
    p = rows.prompt.shape[1]
    return (column >= p - rows.prompt_length[:, None]) & (column < p + rows.response_length[:, None])


def _take(x: Shaped[Array, "b g *rest"], start: Int[Array, " b"], size: int) -> Shaped[Array, "b c *rest"]:
    """`size` columns of each row of x, from its own `start` on."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(x, start)


def _take_step(
    model: MaskPredictor,
    params: Params,
    rows: Rows,
    state: State,
    hidden: list[Float[Array, "b w d"]],
    start: Int[Array, " b"],
    options: Sampler,
    eot_id: int | None,
    *,
    in_block: bool,
) -> State:
    """The state after the step whose hidden states are those of the response's columns from `start` on."""
    candidate = _candidates(rows, state, options, model, eot_id, in_block=in_block)
    keys = jax.random.wrap_key_data(rows.key_words, impl="threefry2x32")
    step_keys = jax.vmap(jax.random.fold_in)(keys, state.steps)
    end = (rows.block + 1) * options.block_length
    guess = _guess(model, params, hidden, start, end, candidate, step_keys, options, eot_id)
    write = _choose(guess, candidate, _quota(rows.num_masked, state.step, options), options.threshold)
    return State(
        response=jnp.where(write, guess.token, state.response),
        written_at=jnp.where(write, state.steps[:, None], state.written_at),
        confidence=jnp.where(write, jnp.exp(guess.log_confidence), state.confidence),
        steps=state.steps + candidate.any(axis=1),
        step=state.step + 1,
    )


def _guess(
    model: MaskPredictor,
    params: Params,
    hidden: list[Float[Array, "b w d"]],
    start: Int[Array, " b"],
    end: Int[Array, " b"],
    candidate: Bool[Array, "b g"],
    keys: Key[Array, " b"],
    options: Sampler,
    eot_id: int | None,
) -> _Guess:
    """The token, its confidence and its priority at the candidates, a chunk of each response at a time.

    The chunks go from the `end` of each row's block to the left. Those without a candidate are skipped, so logits are
    computed in the current block only (and where a mask token was written before).
    """
    b, g = candidate.shape
    chunk = max(size for size in range(1, _MAX_CHUNK + 1) if options.block_length % size == 0)

    def guess_chunk(i, guess: _Guess) -> _Guess:
        at = end - (i + 1) * chunk
        exists, at = at >= 0, jnp.maximum(at, 0)
        new_here = _take(candidate, at, chunk) & exists[:, None]

        def compute(guess: _Guess) -> _Guess:
            logits = [_head_logits(params, _take(states, at - start, chunk)) for states in hidden]
            position = at[:, None] + jnp.arange(chunk)
            position_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, position)
            new = _predict(logits, position_keys, model.config.eos_token_id, options, eot_id)
            put = jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice_in_dim(row, part, at, axis=0))
            return jax.tree.map(
                lambda old, part: put(old, jnp.where(new_here, part, _take(old, at, chunk)), at), guess, new
            )

        return jax.lax.cond(new_here.any(), compute, lambda guess: guess, guess)

    empty = _Guess(jnp.zeros((b, g), jnp.int32), jnp.zeros((b, g), jnp.float32), jnp.zeros((b, g), jnp.float32))
    return jax.lax.fori_loop(0, g // chunk, guess_chunk, empty)


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
    guess: _Guess, candidate: Bool[Array, "b g"], quota: Int[Array, " b"], threshold: float
) -> Bool[Array, "b g"]:
    """The candidates that a step writes: the `quota` of highest priority, from the left where they tie, and, with a
    threshold, every one whose confidence exceeds it."""
    order = jnp.argsort(jnp.where(candidate, -guess.priority, jnp.inf), axis=1, stable=True)
    write = jnp.argsort(order, axis=1) < quota[:, None]
    if threshold:
        write |= jnp.exp(guess.log_confidence) > threshold
    return write & candidate
