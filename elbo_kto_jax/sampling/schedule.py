"""The scheduler: which prompts share a batch, and which block each of them fills next (host).

The width of a row is rounded up to a multiple of `BUCKET`, and beyond 8 of those to one of four widths per octave (640,
768, 896, 1024, 1280, ...): one set of programs serves all prompts of such a bucket, and rows of up to 4096 tokens have
20 of them.

Rounds. In a round every row of the batch fills its next block, and the host neither waits for a step nor sees one
(unless it watches). Between rounds, finished rows make room for prompts that wait: a row that needs fewer blocks, or
that `early_stop` ends, costs no more.

Randomness. A prompt's key is a hash of (seed, prompt id); every draw folds in the prompt's own step and the position
in the response. Neither batch nor devices can change it.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from elbo_kto_jax.models.network import MaskPredictor, Params
from elbo_kto_jax.runtime.config import Sampler
from elbo_kto_jax.sampling.denoise import refresh, take_steps
from elbo_kto_jax.sampling.reuse import lead, window_width
from elbo_kto_jax.sampling.rows import DecodeRows, DecodeState
from elbo_kto_jax.sampling.stops import has_ended, stop_tokens
from elbo_kto_jax.sharding import rules

BUCKET = 64  # tokens; short rows are as wide as the next multiple, at the price of one compilation per width
_NEVER = -1  # the step of a token that no step wrote


def buckets(prompt_lengths: Sequence[int], gen_length: int) -> list[tuple[int, list[int]]]:
    """(width of a row, indices of its prompts) per bucket; the widest first, so that memory runs out at once."""
    found: dict[int, list[int]] = {}
    for i, length in enumerate(prompt_lengths):
        found.setdefault(_width(length + gen_length), []).append(i)
    return sorted(found.items(), reverse=True)


def _width(tokens: int) -> int:
    """The width of the row that holds so many tokens."""
    step = max(BUCKET, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // step) * step


def key_words(seed: int, prompt_id: str) -> UInt32[np.ndarray, " 2"]:
    """The key of a prompt's random draws."""
    digest = hashlib.blake2b(f"sampling:{seed}:{prompt_id}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


class DecodeBatch:
    """A batch of `size` rows of `width` tokens: prompts come and go, the shapes and so the programs stay."""

    def __init__(
        self,
        model: MaskPredictor,
        params: Params,
        size: int,
        width: int,
        options: Sampler,
        eot_id: int | None,
        mesh: jax.sharding.Mesh | None,
    ):
        self.members: dict[int, int] = {}  # row -> prompt
        self.forward_passes = self.forward_tokens = 0
        self._options, self._size, self._width, self._lead = options, size, width, lead(model)
        self._mask_id, self._eos_id = model.config.mask_id, model.config.eos_id
        self._stop_ids = stop_tokens(self._eos_id, eot_id)
        static = {"options": options, "eot_id": eot_id, "mesh": mesh}
        self._refresh = functools.partial(refresh, model, params, **static)
        self._steps = functools.partial(take_steps, model, params, **static)
        self._place = functools.partial(_place, sharding=None if mesh is None else rules.row_sharding(mesh))
        self._replicate = functools.partial(_place, sharding=None if mesh is None else rules.replicated(mesh))
        g = options.gen_length

        def zeros(*shape: int) -> np.ndarray:
            return np.zeros((size, *shape), np.int32)

        self._rows = DecodeRows(zeros(width - g), zeros(), zeros(2).astype(np.uint32), zeros(), zeros(), zeros())
        self._state = DecodeState(
            np.full((size, g), self._eos_id, np.int32),
            zeros(g),
            np.zeros((size, g), np.float32),
            zeros(),
            np.array(0, np.int32),
        )

    def free_rows(self) -> list[int]:
        """The rows without a prompt."""
        return [row for row in range(self._size) if row not in self.members]

    def put(self, row: int, member: int, prompt: np.ndarray, template: np.ndarray, words: np.ndarray) -> None:
        """Starts a response in a free row; `words` are its key."""
        self.members[row] = member
        rows, state = self._rows, self._state
        rows.prompt[row] = 0
        rows.prompt[row, rows.prompt.shape[1] - len(prompt) :] = prompt
        rows.prompt_length[row], rows.response_length[row], rows.key_words[row] = len(prompt), len(template), words
        state.response[row, : len(template)], state.response[row, len(template) :] = template, self._eos_id
        state.written_at[row], state.confidence[row], state.steps[row] = _NEVER, 0.0, 0
        self._start_block(row, self._next_block(row, 0))

    def fill_next_blocks(self, watch: Callable[[int, np.ndarray], Any] | None) -> None:
        """One round: every row fills its block."""
        rows, cache, window = self._place(self._rows), None, None
        response, written_at, confidence, steps = map(self._place, self._state[:4])
        state = DecodeState(response, written_at, confidence, steps, self._replicate(np.int32(0)))
        unfinished = bool(self._rows.num_masked.any())
        if self._options.cache != "none" and unfinished:
            state, unfinished, cache = self._refresh(rows, state)
            leftmost = int(self._rows.block[self._rows.num_masked > 0].min())
            window = window_width(self._options, leftmost)
            self._count(1, self._width)
            self._show(state, watch)
        while unfinished:
            before = int(state.step)
            state, unfinished = self._steps(
                rows, state, cache, np.int32(1 if watch else self._options.block_length), window=window
            )
            self._count(int(state.step) - before, self._width if window is None else window + self._lead)
            self._show(state, watch)
        self._state = DecodeState(*(np.array(leaf) for leaf in state))

    def take_finished(self) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens, written_at, confidence) of the prompts that are done, whose rows are free now; the other rows go on
        to their next block with a masked position."""
        finished = {}
        for row, member in list(self.members.items()):
            done = int(self._rows.block[row]) + 1
            tokens, written_at, confidence = (np.array(leaf[row]) for leaf in self._state[:3])
            next_block = self._next_block(row, done)
            stops = self._options.early_stop and bool(has_ended(tokens, self._mask_id, self._stop_ids))
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
        """Gives a row the block that it fills in the next round; None: it has none to fill."""
        blocks = self._state.response[row].reshape(-1, self._options.block_length)
        self._rows.block[row] = len(blocks) - 1 if block is None else block
        self._rows.num_masked[row] = 0 if block is None else np.sum(blocks[block] == self._mask_id)

    def _count(self, steps: int, columns: int) -> None:
        """Adds so many steps over so many columns of each row to the counts."""
        passes = steps * (2 if self._options.cfg_scale else 1)
        self.forward_passes += passes
        self.forward_tokens += passes * self._size * columns

    def _show(self, state: DecodeState, watch: Callable[[int, np.ndarray], Any] | None) -> None:
        if watch:
            responses = np.asarray(state.response)
            for row, member in self.members.items():
                watch(member, responses[row])


def _place(tree: Any, sharding: jax.sharding.NamedSharding | None) -> Any:
    """The arrays of a tree on the devices of `sharding`, or on the default one."""
    return jax.tree.map(jnp.asarray if sharding is None else functools.partial(rules.place, sharding=sharding), tree)
