"""Which examples a step uses, as a pure function of seed and step.

Without weights an epoch has each example once, in an order of its own. With weights it has as many examples as there
are, but the data sets in the proportions of the weights: each set is gone through in an order of its own until it is
used up, and then again in another, from epoch to epoch. The sets take turns: at every point of an epoch, each has had
its share so far, to within one example (of more than three sets, to within half as many as there are sets).

What is counted here are groups of examples that belong together; a pair is a group of two.
"""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int64


class Groups(NamedTuple):
    """The groups of a step, and how often each has been used before it."""

    chosen: Int64[np.ndarray, " n"]
    passes: Int64[np.ndarray, " n"]


def order_of(sizes: Sequence[int], weights: Sequence[float], batch: int, seed: int) -> "Shuffled | Mixed":
    """The order of groups in steps of `batch`; there are `sizes` groups of each data set, one set after the other."""
    return Mixed(sizes, weights, batch, seed) if weights else Shuffled(sum(sizes), batch, seed)


class Shuffled:
    """Every epoch has each group once.

    Attributes:
      steps_per_epoch: the last one may be smaller.
    """

    def __init__(self, count: int, batch: int, seed: int):
        epoch = grain.MapDataset.range(count).seed(seed % 2**32).shuffle().batch(batch)
        self.steps_per_epoch = len(epoch)
        self._steps = epoch.repeat()

    def step(self, step: int) -> Groups:
        index = np.asarray(self._steps[step], np.int64)
        return Groups(index, np.full(len(index), step // self.steps_per_epoch))


class Mixed:
    """Every epoch has the data sets in the proportions of their weights.

    Attributes:
      steps_per_epoch: the last one may be smaller.
      counts: groups of each set in an epoch.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], batch: int, seed: int):
        self.counts = shares(sum(sizes), weights)
        self.steps_per_epoch = -(-sum(sizes) // batch)
        self._batch, self._sizes = batch, sizes
        self._first = np.cumsum([0, *sizes[:-1]])
        # The j-th of c turns is due at (j + 1/2) / c of the epoch.
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts if count])
        turns = np.argsort(due, kind="stable")
        self._set = np.repeat(np.arange(len(sizes), dtype=np.int32), self.counts)[turns]
        self._turn = np.concatenate([np.arange(count) for count in self.counts])[turns]
        seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(len(sizes))]
        self._orders = [
            grain.MapDataset.range(size).seed(one).shuffle().repeat() for size, one in zip(sizes, seeds, strict=True)
        ]

    def step(self, step: int) -> Groups:
        epoch, within = divmod(step, self.steps_per_epoch)
        here = slice(within * self._batch, (within + 1) * self._batch)
        sets = self._set[here].tolist()
        turns = [epoch * self.counts[i] + turn for i, turn in zip(sets, self._turn[here].tolist(), strict=True)]
        index = [self._first[i] + self._orders[i][turn] for i, turn in zip(sets, turns, strict=True)]
        passes = [turn // self._sizes[i] for i, turn in zip(sets, turns, strict=True)]
        return Groups(np.array(index, np.int64), np.array(passes, np.int64))


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` parted in the proportions of `weights`: each part is less than one away from its share."""
    exact = np.array(weights, np.float64) / np.sum(weights) * total
    parts = np.floor(exact).astype(np.int64)
    missing = total - int(parts.sum())
    parts[np.argsort(parts - exact, kind="stable")[:missing]] += 1
    return parts.tolist()
