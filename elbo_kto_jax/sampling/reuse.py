"""Key/value reuse (Fast-dLLM, arXiv 2505.22618): later steps of a round run a window of the response alone (device).

A round's first step runs the whole row and keeps all keys and values; the later ones run a window of it alone, attend
to the kept ones outside the window, and write in the round's block. The window is the block (`dual`), or the block and
what follows it (`prefix`). What is kept is out of date as soon as a token is written, since attention is bidirectional:
that is an approximation, unless a round has a single step. A prefix window is as wide as the longest of the batch,
rounded up to a power of two of blocks: log2(num_blocks) programs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from elbo_kto_jax.models.layers import CACHE
from elbo_kto_jax.models.network import MaskPredictor, Params
from elbo_kto_jax.runtime.arrays import AnyArray
from elbo_kto_jax.runtime.config import Sampler
from elbo_kto_jax.sampling.rows import DecodeRows, is_real, prompts_of, whole_rows
from elbo_kto_jax.sharding import rules

_UNSEEN = -1  # the segment of a key that no query is in

Cache = list[Params]  # keys and values of every layer (models/layers.py), of each pass of a step


def lead(model: MaskPredictor) -> int:
    """Columns before a window that are run as well, since its first token is predicted from them."""
    return int(model.config.predicts_next)


def window_width(options: Sampler, first_block: int) -> int:
    """Columns of the response that the later steps of a round run, whose leftmost block is `first_block`."""
    length = options.block_length
    if options.cache == "dual":
        return length
    longest = options.gen_length // length - first_block
    return min(length << (longest - 1).bit_length(), options.gen_length)


def run_and_keep(
    model: MaskPredictor, params: Params, rows: DecodeRows, response: Int[AnyArray, "b g"], options: Sampler
) -> tuple[list[Float[Array, "b g d"]], Cache]:
    """Runs the whole rows: the hidden states of the response, and the keys and values, of each pass of a step."""
    hidden, cache = [], []
    for tokens, positions, segment_ids in whole_rows(rows, response, options, model.config.mask_id):
        states, kept = model.apply({"params": params}, tokens, positions, segment_ids, mutable=[CACHE])
        hidden.append(states[:, rows.prompt.shape[1] :])
        cache.append(kept[CACHE])
    return hidden, cache


def split_by_head(cache: Cache, mesh: jax.sharding.Mesh | None) -> Cache:
    """The keys and values over the devices of `mesh`, by row and by head."""
    if mesh is None:
        return cache
    by_head = NamedSharding(mesh, rules.spec((None, "rows", None, "kv_heads"), mesh))
    return jax.lax.with_sharding_constraint(cache, by_head)


def run_windows(
    model: MaskPredictor,
    params: Params,
    rows: DecodeRows,
    response: Int[AnyArray, "b g"],
    cache: Cache,
    window: int,
    options: Sampler,
) -> tuple[list[Float[Array, "b w d"]], Int[AnyArray, " b"]]:
    """Runs `window` columns of each response: their hidden states of each pass, and the column where they start."""
    first = rows.block * options.block_length
    start = first if options.cache == "dual" else jnp.full_like(first, options.gen_length - window)
    before = lead(model)
    hidden = []
    for prompt, kept in zip(prompts_of(rows, options, model.config.mask_id), cache, strict=True):
        inputs = window_inputs(rows, prompt, response, start - before, first, before + window)
        states: Any = model.apply({"params": params, CACHE: kept}, *inputs)
        hidden.append(states[:, before:])
    return hidden, start


def window_inputs(
    rows: DecodeRows,
    prompt: Int[AnyArray, "b p"],
    response: Int[AnyArray, "b g"],
    start: Int[AnyArray, " b"],
    first: Int[AnyArray, " b"],
    width: int,
) -> tuple[AnyArray, ...]:
    """(tokens, positions, segment ids, key segment ids) of `width` columns of each response, from `start` on.

    The first may be the column before the response, number -1: the last token of `prompt`, where there is one.
    Keys and values are the window's own from column `first` of the response on, and the kept ones elsewhere.
    """
    p, g = rows.prompt.shape[1], response.shape[1]
    at = start[:, None] + jnp.arange(width)  # columns of the response
    whole = jnp.concatenate([prompt, response], axis=1)
    tokens = jnp.take_along_axis(whole, jnp.maximum(p + at, 0), axis=1)
    segment_ids = is_real(rows, p + at).astype(jnp.int32)
    own = jnp.where(at >= first[:, None], segment_ids, _UNSEEN)
    column = jnp.arange(p + g)
    renewed = (column >= p + first[:, None]) & (column < p + start[:, None] + width)
    kept = jnp.where(is_real(rows, column) & ~renewed, 1, _UNSEEN)
    return tokens, jnp.maximum(rows.prompt_length[:, None] + at, 0), segment_ids, jnp.concatenate([kept, own], axis=1)
