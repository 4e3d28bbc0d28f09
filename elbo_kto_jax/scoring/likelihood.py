"""Conditional likelihood for evaluation: the ELBO of answers, with the mask scheme "likelihood" (docs/method.md 7).

Many answers and many masks of each are packed into rows together and scored by the program that training uses. An
answer of one token has one mask, whatever is asked for.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64, Int32

from elbo_kto_jax.data.packing import Layout, Segment, pack
from elbo_kto_jax.diffusion.masks import draw_masks
from elbo_kto_jax.models.network import MaskPredictor, Params
from elbo_kto_jax.scoring.scorer import Scorer

_AT_ONCE = 1024  # masked answers that are packed into micro-batches together


def log_likelihoods(
    model: MaskPredictor,
    params: Params,
    prompts: Sequence[Int32[np.ndarray, "_"]],
    answers: Sequence[Int32[np.ndarray, "_"]],
    *,
    draws: int,
    batch: int,
    seed: int,
    layout: Layout,
    mesh: jax.sharding.Mesh,
    progress: Callable[[int], Any] = lambda answers_done: None,
) -> Float64[np.ndarray, " n"]:
    """The estimate, in nats, of log p(answer | prompt) for each pair: the mean over `draws` masks.

    Args:
      model: the mask predictor.
      params: its parameters, on the devices of `mesh`.
      prompts: token ids; a prompt may be empty.
      answers: token ids; the log-likelihood of an empty answer is 0.
      draws: masks per answer (mc_num), a multiple of `batch`.
      batch: masks whose sizes are spread evenly together.
      seed: the masks of a pair are a function of it and of the pair's tokens.
      layout: of the rows; its `rows` divides over the devices.
      mesh: the devices.
      progress: called with the number of answers whenever some are done.

    Raises:
      ValueError: `batch` does not divide `draws`, the lists differ in length, or a pair is longer than a row.
    """
    if batch < 1 or draws % batch:
        raise ValueError(f"batch: expected a divisor of the {draws} draws, got {batch}")
    scorer = Scorer(model, mesh, size=_AT_ONCE)
    sums, counts, done = np.zeros(len(answers)), np.zeros(len(answers), int), 0
    masked = _masked_answers(prompts, answers, draws, batch, seed)
    for owners, segments in _chunks(masked, _AT_ONCE):
        estimates = np.asarray(scorer(params, pack(segments, layout)), np.float64)
        np.add.at(sums, owners, estimates[: len(segments)])
        np.add.at(counts, owners, 1)
        progress(owners[-1] - done)  # the last one may go on in the next chunk
        done = owners[-1]
    progress(len(answers) - done)
    return sums / np.maximum(counts, 1)


def _masked_answers(prompts, answers, draws: int, batch: int, seed: int) -> Iterator[tuple[int, Segment]]:
    """(index of the pair, one of its masked answers), pair by pair; `Segment.index` is set later."""
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens, length = np.concatenate([prompt, answer]).astype(np.int32), len(answer)
        content = hashlib.blake2b(f"{len(prompt)}:".encode() + tokens.tobytes(), digest_size=8).digest()
        at_once, batches = (1, 1) if length == 1 else (batch, draws // batch)
        for number in range(batches if length else 0):
            drawn = draw_masks(
                "likelihood",
                seed=seed,
                id_words=np.frombuffer(content, "<u4").astype(np.uint32),
                epoch=number,
                draws=at_once,
                length=length,
            )
            for mask, weight in zip(drawn.mask, drawn.weight, strict=True):
                yield i, Segment(tokens, len(prompt), mask, float(weight), 0)


def _chunks(masked: Iterator[tuple[int, Segment]], size: int) -> Iterator[tuple[list[int], list[Segment]]]:
    owners: list[int] = []
    segments: list[Segment] = []
    for owner, segment in masked:
        owners.append(owner)
        segments.append(segment._replace(index=len(segments)))
        if len(segments) == size:
            yield owners, segments
            owners, segments = [], []
    if segments:
        yield owners, segments
