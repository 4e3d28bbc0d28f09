"""What the figures of a run say about its health, in lines that name what to change, and whether it has diverged."""

import collections
import math
import statistics

import numpy as np
from jaxtyping import Float

from elbo_kto_jax.objectives.rewards import SATURATED

_WINDOW = 50  # steps that a loss is compared with, and that pass between two warnings of one kind
_ENOUGH = 20  # steps before there is anything to compare with
_SPREADS = 10.0  # a spike stands that many robust standard deviations above the median: Gaussian noise never does
_LEAST_SPREAD = 0.02  # of the median; early losses of ELBO-KTO are all but equal
_MOSTLY_SATURATED = 0.5  # mean fraction of the batch over the last `_ENOUGH` steps
_LARGEST_RMS = 100.0  # of the weights; those of language models are about 0.02, and their norms' scales about 1
_LOST_GUESSES = 5.0  # per token, in the nats that a guess costs, log(vocabulary): a model that learns is far above


def divergence(per_token: Float[np.ndarray, " n"], weights_rms: float, vocab_size: int) -> str:
    """What says that training has plainly diverged, all numbers being finite; "" if nothing does.

    A bounded loss does not tell: it is as good as guessing where weights are so large that norms overflow to zeros.

    Args:
      per_token: ELBO or reward of each completion to learn, in nats per token. Either is at least the policy's ELBO.
      weights_rms: root mean square of the weights that are trained.
    """
    if not weights_rms < _LARGEST_RMS:
        return f"the weights have grown to a root mean square of {weights_rms:.3g}"
    guess, typical = math.log(vocab_size), float(np.median(per_token)) if len(per_token) else 0.0
    if typical < -_LOST_GUESSES * guess:
        of_batch = f"{typical:.3g} nats per token (the batch's median)"
        return f"good completions have come down to {of_batch}, where guessing gets {-guess:.3g}"
    return ""


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
