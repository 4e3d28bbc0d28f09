"""Examples with their masks, packed into micro-batches: what scoring and training read (docs/method.md 2, 5)."""

import functools

import numpy as np
from jaxtyping import Bool, Int

from elbo_kto_jax.data.examples import Examples
from elbo_kto_jax.data.packing import Layout, Rows, Segment, pack_own
from elbo_kto_jax.diffusion.masks import Draws, draw_masks
from elbo_kto_jax.runtime import config


def segment_of(examples: Examples, i: int, mask: Bool[np.ndarray, " l"], weight: float, index: int) -> Segment:
    """One draw of example i, whose result goes to `index`."""
    tokens = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]
    return Segment(tokens, int(examples.prompt_length[i]), mask, weight, index)


class DrawnExamples:
    """Examples, and K masks of each as a function of seed, example and epoch alone."""

    def __init__(
        self,
        examples: Examples,
        layout: Layout,
        *,
        estimator: config.Estimator,
        seed: int,
        own: Bool[np.ndarray, " m"] | None = None,
    ):
        """See the class.

        Args:
          own: the rows of a micro-batch that this process holds, the others are left empty; None: all.
        """
        self.own = np.ones(layout.rows, bool) if own is None else own
        self.examples = examples
        self.layout = layout
        self.estimator = estimator
        self.seed = seed

    def masks(self, i: int, epoch: int = 0) -> Draws:
        """The masks of every draw of example i."""
        return draw_masks(
            self.estimator.scheme,
            seed=self.seed,
            id_words=self.examples.id_words[i],
            epoch=epoch,
            draws=self.estimator.draws,
            length=int(self.examples.completion_length[i]),
        )

    def micro_batches(self, indices: Int[np.ndarray, " n"], epoch: int | Int[np.ndarray, " n"] = 0) -> list[Rows]:
        """The draws of the examples `indices`; draw k of the i-th of them has the index i * K + k.

        `epoch`: of the masks, of all examples or of each.
        """
        examples, draws = self.examples, self.estimator.draws
        epochs = np.broadcast_to(epoch, len(indices))
        masks_of = functools.cache(self.masks)

        def segment(index: int) -> Segment:
            at, k = divmod(index, draws)
            i = int(indices[at])
            masks = masks_of(i, int(epochs[at]))
            return segment_of(examples, i, masks.mask[k], float(masks.weight[k]), index)

        return pack_own(self.lengths(indices).tolist(), segment, self.layout, self.own)

    def count_micro_batches(self, indices: Int[np.ndarray, " n"]) -> int:
        """How many micro-batches the draws of the examples `indices` make."""
        rows_of_one_length = self.layout._replace(shorter=())  # shorter ones make as many, and take longer to find
        return len(rows_of_one_length.fit(self.lengths(indices).tolist()))

    def lengths(self, indices: Int[np.ndarray, " n"]) -> Int[np.ndarray, " nk"]:
        """Tokens of every draw of the examples."""
        return np.repeat(self.examples.offsets[indices + 1] - self.examples.offsets[indices], self.estimator.draws)
