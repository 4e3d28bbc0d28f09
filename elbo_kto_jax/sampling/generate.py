"""Block-wise unmasking: from prompts to responses with a mask predictor (docs/method.md 6).

A response starts as `gen_length` mask tokens. Its blocks of `block_length` are filled from left to right, each in
`steps / num_blocks` steps. A response may also start as a template with known tokens (infilling): what is masked in it
is filled, block by block in the same way.

schedule.py says which prompts share a batch (host), denoise.py what a step does (device), choice.py which tokens it
writes, and reuse.py what is kept from step to step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32

from elbo_kto_jax.models.network import MaskPredictor, Params
from elbo_kto_jax.runtime.config import Sampler
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling.schedule import DecodeBatch, buckets, key_words
from elbo_kto_jax.sharding import rules


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
    progress: Callable[[int], Any] | None = None,
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
    n, g = len(prompts), options.gen_length
    if templates is None:
        templates = [np.full(g, model.config.mask_id, np.int32)] * n
    _check_inputs(n, prompt_ids, templates, options, eot_id)
    shards = 1 if mesh is None else rules.row_shards(mesh)
    size = -(-min(options.batch_size, n) // shards) * shards

    tokens, written_at, confidence = (np.zeros((n, g), dtype) for dtype in (np.int32, np.int32, np.float32))
    forward_passes = forward_tokens = 0
    for width, waiting in buckets([len(prompt) for prompt in prompts], g):
        batch = DecodeBatch(model.clone(mesh=mesh), params, size, width, options, eot_id, mesh)
        while waiting or batch.members:
            for row in batch.free_rows()[: len(waiting)]:
                i = waiting.pop(0)
                batch.put(row, i, prompts[i], templates[i], key_words(seed, prompt_ids[i]))
            batch.fill_next_blocks(watch)
            finished = batch.take_finished()
            for i, response in finished.items():
                tokens[i], written_at[i], confidence[i] = response
            if progress is not None:
                progress(len(finished))
        forward_passes += batch.forward_passes
        forward_tokens += batch.forward_tokens
    return Responses(tokens, written_at, confidence, forward_passes, forward_tokens)


def _check_inputs(
    num_prompts: int,
    prompt_ids: Sequence[str],
    templates: Sequence[Int32[np.ndarray, "_"]],
    options: Sampler,
    eot_id: int | None,
) -> None:
    """Raises ValueError where the arguments of `generate` do not fit together."""
    if options.confidence_eos_eot_inf and eot_id is None:
        raise ValueError("eot_id: confidence_eos_eot_inf needs the id of the end-of-turn token")
    if num_prompts != len(prompt_ids):
        raise ValueError(f"prompt_ids: expected one per prompt, {num_prompts}, got {len(prompt_ids)}")
    if len(templates) != num_prompts or max(map(len, templates), default=0) > options.gen_length:
        raise ValueError(f"templates: expected one per prompt, {num_prompts}, of at most {options.gen_length} tokens")


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
