"""How far a run has come."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

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
    best_step: int = 0
    best_value: float = 0.0

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

    def notice_best(self, metric: str, step: int, value: float) -> bool:
        """Keeps `step` as the best so far if it is, by a held-out metric; losses should be low, all others high."""
        sign = -1 if metric.endswith("loss") else 1
        known = self.best_metric == metric
        if not math.isfinite(value) or (known and sign * value <= sign * self.best_value):
            return False
        self.best_metric, self.best_step, self.best_value = metric, step, value
        return True

    def figures(self) -> dict[str, float]:
        """What metrics.jsonl has of them."""
        return {"examples": self.examples, "tokens": self.tokens, "seconds": self.seconds}
