"""What a run has to get through on a mesh: its steps, its rows and its micro-batches."""

import dataclasses
import math

import numpy as np

from elbo_kto_jax.models.attention_kernels import splash_block
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError

PACKED = 0.95  # of the positions of packed rows hold text; measured on kto-mix, at least so many


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a run has to get through; rows are those of the whole mesh."""

    steps: int
    rows: int  # of a step
    micro_batches: int  # of a step
    rows_at_once: int
    tokens: float  # of text in a step
    one_pass: bool  # a step keeps all its micro-batches for one pass over them; else it takes two

    @property
    def waiting(self) -> int:
        """The micro-batches that wait for their backward pass at once; 0 in two passes."""
        return self.micro_batches if self.one_pass else 0

    def row_fill(self, length: int) -> float:
        """The part of a step's positions that holds text."""
        return self.tokens / (self.micro_batches * self.rows_at_once * length)


def workload(config: Config, shards: int, examples: int, mean_tokens: float) -> Workload:
    """The steps of a run over so many examples of that length, for a mesh that splits rows into `shards`."""
    length, batch = config.data.max_length, config.train.global_batch_size
    segments = batch * config.estimator.draws
    tokens = segments * min(mean_tokens, length)
    rows = max(1, math.ceil(tokens / (length * PACKED))) if config.data.packing else segments
    at_once = max(1, config.train.microbatch_tokens // length) * shards
    steps = config.train.steps or config.train.epochs * math.ceil(examples / batch)
    micro_batches = math.ceil(rows / at_once)
    one_pass = micro_batches <= config.train.one_pass_microbatches
    return Workload(steps, rows, micro_batches, at_once, tokens, one_pass)


def visited_fraction(length: int, mean_tokens: float) -> float:
    """The part of a packed row's blocks that attention visits on a TPU where every record has so many tokens."""
    block = splash_block(length)
    segment = np.arange(-(-length // block) * block) // max(1.0, mean_tokens)
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
