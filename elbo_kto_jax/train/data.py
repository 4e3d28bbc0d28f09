"""Global batches as a pure function of (data, config, step): order, masks and packing (METHOD 2, 5).

Step t of a run is always the same batch, so resuming needs no more than the number of the step, every process can make
the batch without asking another, and the reference pass meets the rows that training will meet.
"""

from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int

from elbo_kto_jax import config
from elbo_kto_jax.diffusion.masks import draw_masks
from elbo_kto_jax.packing import Layout, Segment, pack
from elbo_kto_jax.text.examples import Examples
from elbo_kto_jax.train.step import Batch, Feedback

_PREFETCH = 4  # batches made ahead of the step that needs them


class TrainingData:
    """The batches of a run. Every epoch has its own order and its own masks; its last batch may be smaller."""

    def __init__(self, examples: Examples, layout: Layout, *, estimator: config.Estimator, batch_size: int, seed: int):
        self.examples = examples
        self.layout = layout
        self.estimator = estimator
        self.seed = seed
        self.batch_size = batch_size
        epoch = grain.MapDataset.range(len(examples)).seed(seed % 2**32).shuffle().batch(batch_size)
        self.steps_per_epoch = len(epoch)
        self._order = epoch.repeat()

    def indices(self, step: int) -> Int[np.ndarray, " n"]:
        """Which examples step `step` (from 0) uses."""
        return np.asarray(self._order[step])

    def batch(self, step: int) -> Batch:
        """The global batch of step `step`, counted from 0."""
        return self._make(step, self._order[step])

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The global batches of the steps from `start` to `stop` - 1, made ahead in the background."""
        steps = self._order[start:stop].map_with_index(lambda i, indices: self._make(start + i, indices))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)))

    def _make(self, step: int, indices) -> Batch:
        return global_batch(
            self.examples,
            np.asarray(indices),
            self.layout,
            estimator=self.estimator,
            size=self.batch_size,
            seed=self.seed,
            epoch=step // self.steps_per_epoch,
        )


def global_batch(
    examples: Examples,
    indices: Int[np.ndarray, " n"],
    layout: Layout,
    *,
    estimator: config.Estimator,
    size: int,
    seed: int,
    epoch: int,
) -> Batch:
    """The draws of the examples `indices`, at most `size` of them, packed into micro-batches."""
    feedback = Feedback(np.zeros(size, bool), np.arange(size) < len(indices), np.zeros(size, np.int32))
    feedback.is_desirable[: len(indices)] = examples.is_desirable[indices]
    feedback.completion_length[: len(indices)] = examples.completion_length[indices]
    segments = []
    for b, i in enumerate(indices):
        draws = draw_masks(
            estimator.scheme,
            seed=seed,
            id_words=examples.id_words[i],
            epoch=epoch,
            draws=estimator.draws,
            length=int(examples.completion_length[i]),
        )
        tokens = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]
        for k in range(estimator.draws):
            index = b * estimator.draws + k
            segments.append(
                Segment(tokens, int(examples.prompt_length[i]), draws.mask[k], float(draws.weight[k]), index)
            )
    return Batch(feedback, pack(segments, layout), sum(len(segment.tokens) for segment in segments))
