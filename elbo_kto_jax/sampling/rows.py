"""The rows of a batch of responses, and where their denoising stands.

A row is [padding, prompt, response]: prompts end at the same column, so that the response stands at static columns.
Padding is a segment of its own that no prompt sees, and positions count from the first prompt token, so what a prompt
gets depends neither on the padding nor on the other rows.
"""

from typing import Generic, NamedTuple, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, UInt32

from elbo_kto_jax.runtime.config import Sampler

Kind = TypeVar("Kind")  # of the arrays: numpy on the host, jax on the devices; or what only has their shapes


class DecodeRows(NamedTuple, Generic[Kind]):
    """The b rows of a batch; a row without a prompt has a response of no tokens."""

    prompt: Int[Kind, "b p"]  # padded on the left
    prompt_length: Int[Kind, " b"]
    key_words: UInt32[Kind, "b 2"]
    response_length: Int[Kind, " b"]
    block: Int[Kind, " b"]  # that each row fills in this round
    num_masked: Int[Kind, " b"]  # positions of that block, at the round's start


class DecodeState(NamedTuple, Generic[Kind]):
    """Where the denoising of b responses stands."""

    response: Int[Kind, "b g"]
    written_at: Int[Kind, "b g"]
    confidence: Float32[Kind, "b g"]
    steps: Int[Kind, " b"]  # steps that each row has taken
    step: Int[Kind, ""]  # of this round


def whole_rows(
    rows: DecodeRows, response: Int[Array, "b g"], options: Sampler, mask_id: int
) -> list[tuple[Array, ...]]:
    """(tokens, positions, segment ids) of the rows, and for guidance of the rows with a masked prompt."""
    p, g = rows.prompt.shape[1], response.shape[1]
    column = jnp.arange(p + g)
    first = p - rows.prompt_length[:, None]  # column of the first prompt token
    positions = jnp.maximum(column - first, 0)
    segment_ids = is_real(rows, column).astype(jnp.int32)
    prompts = prompts_of(rows, options, mask_id)
    return [(jnp.concatenate([prompt, response], axis=1), positions, segment_ids) for prompt in prompts]


def prompts_of(rows: DecodeRows, options: Sampler, mask_id: int) -> list[Int[Array, "b p"]]:
    """The prompt of each pass of a step: the rows' own, and for guidance a masked one."""
    return [rows.prompt, jnp.full_like(rows.prompt, mask_id)] if options.cfg_scale else [rows.prompt]


def is_real(rows: DecodeRows, column: Int[Array, "..."]) -> Bool[Array, "b s"]:
    """Whether a column of each row holds a token of its prompt or response."""
    p = rows.prompt.shape[1]
    return (column >= p - rows.prompt_length[:, None]) & (column < p + rows.response_length[:, None])
