"""Global batches as a pure function of (data, config, step): order, masks and packing (docs/method.md 2, 5).

Step t of a run is always the same batch, so resuming needs no more than the number of the step, every process can make
its rows of the batch without asking another, and the reference pass meets the rows that training will meet.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int

from elbo_kto_jax.data.draws import DrawnExamples
from elbo_kto_jax.data.examples import Examples
from elbo_kto_jax.data.packing import Layout
from elbo_kto_jax.objectives.protocol import Feedback
from elbo_kto_jax.runtime import config
from elbo_kto_jax.training.order import order_of
from elbo_kto_jax.training.step import Batch

_REPRESENTATIVE = 50  # steps
_PREFETCH = 4  # batches made ahead of the step that needs them


class Size(NamedTuple):
    """What a step has to get through."""

    examples: int
    tokens: int  # of text, every draw counted
    positions: int  # of the micro-batches, empty ones included
    micro_batches: int


class TrainingData(DrawnExamples):
    """The batches of a run. Every pass over the examples has its own order and its own masks.

    The last batch of an epoch may be smaller.

    Neighbouring examples may belong together in groups (a pair is a group of two): a group is shuffled as one, and its
    examples are neighbours in the batch, which is all that an objective on pairs asks for.
    """

    def __init__(
        self,
        examples: Examples,
        layout: Layout,
        *,
        estimator: config.Estimator,
        batch_size: int,
        seed: int,
        own: Bool[np.ndarray, " m"] | None = None,
        group: int = 1,
        weights: Sequence[float] = (),
    ):
        """See the class.

        Args:
          batch_size: examples of a batch, a multiple of `group`.
          own: see `DrawnExamples`.
          group: examples of a group; divides their number.
          weights: of the data sets of which `examples` are a mixture, see training/order.py; (): none.
        """
        super().__init__(examples, layout, estimator=estimator, seed=seed, own=own)
        self.batch_size = batch_size
        self.group = group
        sizes = [size // group for size in examples.sizes or (len(examples),)]
        self.is_weighted = bool(weights)
        self._order = order_of(sizes, weights, batch_size // group, seed)
        self.steps_per_epoch = self._order.steps_per_epoch

    @property
    def most_examples(self) -> int:
        """Examples of a full step: a small data set does not fill a batch, and the rest of it is padding."""
        return min(self.batch_size, len(self.examples))

    def most_micro_batches(self) -> int:
        """Of a step; the steps of a long run are represented by its first ones."""
        steps = range(min(self.steps_per_epoch, _REPRESENTATIVE))
        return max((self.count_micro_batches(self.indices(step)) for step in steps), default=1)

    def indices(self, step: int) -> Int[np.ndarray, " n"]:
        """Which examples step `step` (from 0) uses."""
        return (self.group * self._order.step(step).chosen[:, None] + np.arange(self.group)).ravel()

    def batch(self, step: int) -> Batch:
        """The global batch of step `step`, counted from 0."""
        return self.batch_of(self.indices(step), np.repeat(self._order.step(step).passes, self.group))

    def size(self, step: int) -> Size:
        """That of `batch(step)`, without making it."""
        indices = self.indices(step)
        lengths = self.lengths(indices)
        fitted = self.layout.fit(lengths.tolist())
        positions = self.layout.rows * sum(micro_batch.length for micro_batch in fitted)
        return Size(len(indices), int(lengths.sum()), positions, len(fitted))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The global batches of the steps from `start` to `stop` - 1, made ahead in the background."""
        steps = grain.MapDataset.range(start, stop).map(self.batch)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)))

    def batch_of(self, indices: Int[np.ndarray, " n"], epoch: int | Int[np.ndarray, " n"] = 0) -> Batch:
        """The draws of the examples `indices`, at most `batch_size` of them, packed into micro-batches."""
        examples, missing = self.examples, self.batch_size - len(indices)
        feedback = Feedback(
            np.pad(examples.is_desirable[indices], (0, missing)),
            np.arange(self.batch_size) < len(indices),
            np.pad(examples.completion_length[indices], (0, missing)),
        )
        return Batch(feedback, self.micro_batches(indices, epoch), int(self.lengths(indices).sum()))
