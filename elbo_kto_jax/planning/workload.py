"""What a run has to get through on a mesh: its steps, and the rows and micro-batches of a typical batch.

The lengths of the batch's examples are spread as those of kto-mix are, with the mean that is asked for, and the code
that packs them is that of training. A run meets other batches as well, and their rows may be longer.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from elbo_kto_jax.data.fitting import Fitted
from elbo_kto_jax.data.packing import Layout
from elbo_kto_jax.models.attention_kernels import splash_block
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.scoring.layout import layout_for
from elbo_kto_jax.scoring.scorer import Kept

# Lengths of kto-mix's examples over their mean, at the middle of each sixteenth; measured on 1,500 of its records.
_SPREAD = (0.09, 0.16, 0.22, 0.29, 0.37, 0.44, 0.53, 0.66, 0.79, 0.91, 1.06, 1.25, 1.52, 1.9, 2.35, 3.2)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a run has to get through; rows are those of the whole mesh."""

    steps: int
    rows: int  # of a step, with text in them
    row_lengths: tuple[int, ...]  # tokens of a row in each micro-batch of a step
    rows_at_once: int  # of each micro-batch
    lengths: tuple[int, ...]  # tokens of each sequence of a step, a draw of an example
    residuals: Kept  # of a step's micro-batches, until their backward pass
    visited: tuple[tuple[int, float], ...]  # of rows of a length: the part of their blocks that attention visits

    @property
    def one_pass(self) -> bool:
        """Whether a step takes one pass over its micro-batches; else it takes two."""
        return self.residuals != "recompute"

    @property
    def micro_batches(self) -> int:
        """Of a step."""
        return len(self.row_lengths)

    @property
    def tokens(self) -> int:
        """Of text in a step."""
        return sum(self.lengths)

    @property
    def waiting(self) -> int:
        """The micro-batches whose residuals wait on the devices at once."""
        return self.micro_batches if self.residuals == "device" else 0

    @property
    def row_fill(self) -> float:
        """The part of a step's positions that holds text."""
        return self.tokens / (self.rows_at_once * sum(self.row_lengths))

    @property
    def visited_blocks(self) -> float:
        """The part of a step's blocks of queries and keys that attention visits on a TPU."""
        visited = dict(self.visited)
        blocks = [(-(-length // splash_block(length))) ** 2 for length in self.row_lengths]
        found = [visited.get(length, 1.0) * n for length, n in zip(self.row_lengths, blocks, strict=True)]
        return sum(found) / sum(blocks)


def workload(config: Config, shards: int, examples: int, mean_tokens: float) -> Workload:
    """The steps of a run over so many examples of that length, for a mesh that splits rows into `shards`.

    A config that leaves it open where residuals are kept is taken for one that computes them again.
    """
    batch, layout = config.train.global_batch_size, layout_for(config, shards)
    lengths, packed = _typical_batch(layout, batch, config.estimator.draws, mean_tokens)
    return Workload(
        steps=config.train.steps or config.train.epochs * math.ceil(examples / batch),
        rows=sum(len(micro_batch.rows) for micro_batch in packed),
        row_lengths=tuple(micro_batch.length for micro_batch in packed),
        rows_at_once=layout.rows,
        lengths=lengths,
        visited=_visited(lengths, packed) if layout.packed else (),
        residuals="recompute" if config.train.residuals == "auto" else config.train.residuals,
    )


@functools.cache  # a search asks for the same ones over and over
def _typical_batch(layout: Layout, examples: int, draws: int, mean: float) -> tuple[tuple[int, ...], list[Fitted]]:
    """Tokens of every draw, and the micro-batches that hold them."""
    lengths = np.repeat(spread_lengths(examples, mean, layout.length), draws).tolist()
    return tuple(lengths), layout.fit(lengths)


def spread_lengths(examples: int, mean: float, longest: int) -> np.ndarray:
    """Tokens of so many examples of that mean, spread as those of kto-mix are, none above `longest`."""
    places, known = ((np.arange(n) + 0.5) / n for n in (examples, len(_SPREAD)))
    spread = np.interp(places, known, _SPREAD)
    low, high = 0.0, longest / spread.min()
    for _ in range(50):  # what is cut off makes the others longer
        scale = (low + high) / 2
        is_enough = np.minimum(scale * spread, longest).mean() >= min(mean, longest)
        low, high = (low, scale) if is_enough else (scale, high)
    return np.clip(np.rint(high * spread), 1, longest).astype(int)


def _visited(lengths: Sequence[int], packed: Sequence[Fitted]) -> tuple[tuple[int, float], ...]:
    """Length of rows -> the part of their blocks that attention visits, on average."""
    of_length: dict[int, list[float]] = {}
    for length, rows in packed:
        of_length.setdefault(length, []).extend(visited_fraction([lengths[i] for i in row], length) for row in rows)
    return tuple((length, float(np.mean(found))) for length, found in of_length.items())


def visited_fraction(row: Sequence[int], length: int) -> float:
    """The part of a row's blocks that attention visits on a TPU; `row`: tokens of its segments, of `length` in all."""
    block = splash_block(length)
    places = -(-length // block) * block
    segment = np.repeat(np.arange(len(row) + 1), [*row, places - sum(row)])  # the last one is what is empty
    first, last = segment[::block], segment[block - 1 :: block]
    return float(np.mean((first[:, None] <= last) & (first <= last[:, None])))


def mesh_sizes(config: Config, devices: int) -> dict[str, int]:
    """The sizes that a config's mesh takes on so many devices."""
    sizes = dataclasses.asdict(config.mesh)
    given = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: devices // given if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise UserError(f"config.mesh: {sizes} does not use exactly the {devices} devices of the slice")
    return sizes
