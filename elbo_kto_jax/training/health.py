"""What the figures of a run say about its health, in lines for the log that name what to change."""

import collections
import math
import statistics

from elbo_kto_jax.objectives.rewards import SATURATED

_WINDOW = 50  # steps that a loss is compared with, and that pass between two warnings of one kind
_ENOUGH = 20  # steps before there is anything to compare with
_SPREADS = 10.0  # a spike stands that many robust standard deviations above the median: Gaussian noise never does
_LEAST_SPREAD = 0.02  # of the median; early losses of ELBO-KTO are all but equal
_MOSTLY_SATURATED = 0.5  # mean fraction of the batch over the last `_ENOUGH` steps


class Health:
    """Watches the steps of a run, one after the other."""

    def __init__(self) -> None:
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._saturated: collections.deque[float] = collections.deque(maxlen=_ENOUGH)
        self._silent_until = {"spike": 0, "saturation": 0}

    def warnings(self, step: int, values: dict[str, float]) -> list[str]:
        """What to tell the user after `step`, whose metrics are `values`; losses that are not finite are not judged."""
        found: list[str] = []
        loss = values["loss"]
        if not math.isfinite(loss):
            return found
        if len(self._losses) >= _ENOUGH:
            median = statistics.median(self._losses)
            deviation = 1.4826 * statistics.median(abs(x - median) for x in self._losses)
            if loss - median > _SPREADS * max(deviation, _LEAST_SPREAD * abs(median)) and self._due("spike", step):
                found.append(
                    f"step {step}: the loss jumped to {loss:.4g} from a median of {median:.4g}; if it does not come "
                    "back, lower --config.optimizer.learning_rate or --config.optimizer.clip_norm"
                )
        self._losses.append(loss)
        self._saturated.append(values.get("saturated_fraction", 0.0))
        share = statistics.fmean(self._saturated)
        if len(self._saturated) == _ENOUGH and share > _MOSTLY_SATURATED and self._due("saturation", step):
            found.append(
                f"step {step}: {share:.0%} of the examples are saturated (|beta (r - z0)| above {SATURATED:g}) and "
                "hardly move the model; lower --config.objective.beta or --config.optimizer.learning_rate"
            )
        return found

    def _due(self, kind: str, step: int) -> bool:
        due = step >= self._silent_until[kind]
        if due:
            self._silent_until[kind] = step + _WINDOW
        return due
