"""What a run has to get through on a mesh: its steps, its rows and its micro-batches."""

import dataclasses
import math

from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.scoring.scorer import Kept

PACKED = 0.95  # of the positions of packed rows hold text; measured on kto-mix, at least so many


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a run has to get through; rows are those of the whole mesh."""

    steps: int
    rows: int  # of a step
    micro_batches: int  # of a step
    rows_at_once: int
    tokens: float  # of text in a step
    residuals: Kept  # of a step's micro-batches, until their backward pass

    @property
    def one_pass(self) -> bool:
        """Whether a step takes one pass over its micro-batches; else it takes two."""
        return self.residuals != "recompute"

    @property
    def waiting(self) -> int:
        """The micro-batches whose residuals wait on the devices at once."""
        return self.micro_batches if self.residuals == "device" else 0

    def row_fill(self, length: int) -> float:
        """The part of a step's positions that holds text."""
        return self.tokens / (self.micro_batches * self.rows_at_once * length)


def workload(config: Config, shards: int, examples: int, mean_tokens: float) -> Workload:
    """The steps of a run over so many examples of that length, for a mesh that splits rows into `shards`.

    A config that leaves it open where residuals are kept is taken for one that computes them again.
    """
    length, batch = config.data.max_length, config.train.global_batch_size
    segments = batch * config.estimator.draws
    tokens = segments * min(mean_tokens, length)
    rows = max(1, math.ceil(tokens / (length * PACKED))) if config.data.packing else segments
    at_once = max(1, config.train.microbatch_tokens // length) * shards
    steps = config.train.steps or config.train.epochs * math.ceil(examples / batch)
    micro_batches = math.ceil(rows / at_once)
    residuals = "recompute" if config.train.residuals == "auto" else config.train.residuals
    return Workload(steps, rows, micro_batches, at_once, tokens, residuals)


def mesh_sizes(config: Config, devices: int) -> dict[str, int]:
    """The sizes that a config's mesh takes on so many devices."""
    sizes = dataclasses.asdict(config.mesh)
    given = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: devices // given if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise UserError(f"config.mesh: {sizes} does not use exactly the {devices} devices of the slice")
    return sizes
