"""The rows of a batch of responses, and where their denoising stands.

A row is [padding, prompt, response]: prompts end at the same column, so that the response stands at static columns.
Padding is a segment of its own that no prompt sees, and positions count from the first prompt token, so what a prompt
gets depends neither on the padding nor on the other rows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int, UInt32

from elbo_kto_jax.runtime.arrays import AnyArray
from elbo_kto_jax.runtime.config import Sampler


class DecodeRows(NamedTuple):
    """The b rows of a batch; a row without a prompt has a response of no tokens."""

    prompt: Int[AnyArray, "b p"]  # padded on the left
    prompt_length: Int[AnyArray, " b"]
    key_words: UInt32[AnyArray, "b 2"]
    response_length: Int[AnyArray, " b"]
    block: Int[AnyArray, " b"]  # that each row fills in this round
    num_masked: Int[AnyArray, " b"]  # positions of that block, at the round's start


class DecodeState(NamedTuple):
    """Where the denoising of b responses stands."""

    response: Int[AnyArray, "b g"]
    written_at: Int[AnyArray, "b g"]
    confidence: Float32[AnyArray, "b g"]
    steps: Int[AnyArray, " b"]  # steps that each row has taken
    step: Int[AnyArray, ""]  # of this round


def whole_rows(
    rows: DecodeRows, response: Int[AnyArray, "b g"], options: Sampler, mask_id: int
) -> list[tuple[AnyArray, ...]]:
    """(tokens, positions, segment ids) of the rows, and for guidance of the rows with a masked prompt."""
    p, g = rows.prompt.shape[1], response.shape[1]
    column = jnp.arange(p + g)
    first = p - rows.prompt_length[:, None]  # column of the first prompt token
    positions = jnp.maximum(column - first, 0)
    segment_ids = is_real(rows, column).astype(jnp.int32)
    prompts = prompts_of(rows, options, mask_id)
    return [(jnp.concatenate([prompt, response], axis=1), positions, segment_ids) for prompt in prompts]


def prompts_of(rows: DecodeRows, options: Sampler, mask_id: int) -> list[Int[AnyArray, "b p"]]:
    """The prompt of each pass of a step: the rows' own, and for guidance a masked one."""
    return [rows.prompt, jnp.full_like(rows.prompt, mask_id)] if options.cfg_scale else [rows.prompt]


def is_real(rows: DecodeRows, column: Int[AnyArray, "..."]) -> Bool[AnyArray, "b s"]:
    """Whether a column of each row holds a token of its prompt or response."""
    p = rows.prompt.shape[1]
    return (column >= p - rows.prompt_length[:, None]) & (column < p + rows.response_length[:, None])
