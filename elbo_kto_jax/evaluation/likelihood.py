"""Conditional likelihood for evaluation (METHOD 7): the ELBO of answers, with mask sizes that follow a schedule.

Many answers and many masks of each are packed into rows together (packing.py) and scored by the program that training
uses. An answer of one token has one mask, whatever is asked for.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64, Int32

from elbo_kto_jax.config import Objective
from elbo_kto_jax.model.llada import LLaDA, Params
from elbo_kto_jax.packing import Layout, Segment, pack
from elbo_kto_jax.train.step import build_programs, score

_AT_ONCE = 1024  # masked answers that are packed into micro-batches together


def log_likelihoods(
    model: LLaDA,
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
    """The estimate, in nats, of log p(answer | prompt) for each pair: the mean over `draws` masks of METHOD 1's term.

    Args:
      model: the mask predictor.
      params: its parameters, on the devices of `mesh`.
      prompts: token ids; a prompt may be empty.
      answers: token ids; the log-likelihood of an empty answer is 0.
      draws: masks per answer (mc_num), a multiple of `batch`.
      batch: masks whose sizes are spread evenly together (`stratified_counts`).
      seed: the masks of a pair are a function of it and of the pair's tokens.
      layout: of the rows; its `rows` divides over the devices.
      mesh: the devices.
      progress: called with the number of answers whenever some are done.

    Raises:
      ValueError: `batch` does not divide `draws`, the lists differ in length, or a pair is longer than a row.
    """
    if batch < 1 or draws % batch:
        raise ValueError(f"batch: expected a divisor of the {draws} draws, got {batch}")
    objective = Objective("sft", 0.0, 1.0, 1.0, "zero")  # of a loss that is not computed
    programs = build_programs(model, mesh, num_examples=_AT_ONCE, draws=1, objective=objective)
    sums, counts, done = np.zeros(len(answers)), np.zeros(len(answers), int), 0
    masked = _masked_answers(prompts, answers, draws, batch, seed)
    for owners, segments in _chunks(masked, _AT_ONCE):
        micro_batches = [programs.place_rows(rows) for rows in pack(segments, layout)]
        estimates = np.asarray(score(programs, params, micro_batches), np.float64)
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
        name = f"likelihood:{seed}:{len(prompt)}:".encode() + tokens.tobytes()
        rng = np.random.default_rng(int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little"))
        for _ in range(0 if not length else 1 if length == 1 else draws // batch):
            first = int(rng.integers(1, length + 1))
            for count in stratified_counts(first, length, 1 if length == 1 else batch):
                mask = rng.permutation(length) < count
                yield i, Segment(tokens, len(prompt), mask, float(length / count), 0)


def _chunks(masked: Iterator[tuple[int, Segment]], size: int) -> Iterator[tuple[list[int], list[Segment]]]:
    owners, segments = [], []
    for owner, segment in masked:
        owners.append(owner)
        segments.append(segment._replace(index=len(segments)))
        if len(segments) == size:
            yield owners, segments
            owners, segments = [], []
    if segments:
        yield owners, segments


def stratified_counts(first: int, length: int, batch: int) -> Int32[np.ndarray, " batch"]:
    """How many of an answer's tokens each of `batch` masks hides, spread evenly over 1..length from `first` on.

    l_j = ((round(first + j * length / batch) - 1) mod length) + 1; the sum is rounded, half to even. With `first`
    uniform on 1..length, so is every l_j whose j * length / batch is not half a token off a whole number; those that
    are fall on even numbers, a small bias that the published numbers have.

    Args:
      first: the mask size of the first, 1..length.
      length: tokens of the answer.
      batch: number of masks.

    Raises:
      ValueError: an argument is out of range.
    """
    if batch < 1 or not 1 <= first <= length:
        raise ValueError(
            f"first, length, batch: expected 1 <= first <= length and batch >= 1, got {first}, {length}, {batch}"
        )
    sums = np.round(first + np.arange(batch) * length / batch)  # np.round rounds half to even
    return ((sums.astype(np.int64) - 1) % length + 1).astype(np.int32)
