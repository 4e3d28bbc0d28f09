"""How far a run has come."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from elbo_kto_jax.runtime.metric_names import is_better
from elbo_kto_jax.training.step import Batch


@dataclasses.dataclass
class Progress:
    """The totals of a run, which its checkpoints keep."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # steps with bad numbers
    best_metric: str = ""  # of the held-out ones: that by which a step is the best so far; "": none was measured
    best_step: int = 0  # 0: none is known
    best_value: float = 0.0
    waited: int = 0  # evaluations since then, by the same metric
    planned: int = 0  # steps that the run was to take

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> "Progress":
        """That of a checkpoint; figures of other versions are left out."""
        return cls(**{field.name: saved[field.name] for field in dataclasses.fields(cls) if field.name in saved})

    def advance(self, batch: Batch, seconds: float) -> None:
        """Counts a step that took the run to so many seconds."""
        self.step += 1
        self.examples += int(batch.feedback.is_example.sum())
        self.tokens += batch.real_tokens
        self.seconds = seconds

    def plan(self, steps: int) -> None:
        """Says how many steps the run is to take; one that has become longer is waited for anew."""
        if steps > self.planned:
            self.waited = 0
        self.planned = steps

    def notice_best(self, metric: str, step: int, value: float) -> None:
        """Keeps `step` as the best so far if it is, by a held-out metric; a value that is not finite never is."""
        if self.best_metric != metric:
            self.best_metric, self.best_step, self.waited = metric, 0, 0
        if math.isfinite(value) and (not self.best_step or is_better(metric, value, self.best_value)):
            self.best_step, self.best_value, self.waited = step, value, 0
        else:
            self.waited += 1

    def is_out_of(self, patience: int) -> bool:
        """Whether so many evaluations in a row were not better; never for 0."""
        return 0 < patience <= self.waited

    def figures(self) -> dict[str, float]:
        """What metrics.jsonl has of them."""
        return {"examples": self.examples, "tokens": self.tokens, "seconds": self.seconds}
