"""Whether two implementations did the same work: differences, and what rounding allows.

A sum of n log-probabilities, S nats in all, is off by the float32 rounding of the sum, and by what the network's own
dtype does to each of its terms, which is independent from term to term:

    allowance = SUM_UNITS eps(float32) |S| + TERM_UNITS eps(dtype) |S| / sqrt(n)     nats

A loss of slope at most beta / 4 in each reward takes beta / 4 of the mean of these, and a gradient's norm is held to
GRADIENT_UNITS sqrt(eps(dtype)) of itself: it is a sum of terms that nearly cancel.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

SUM_UNITS, TERM_UNITS, GRADIENT_UNITS = 4, 2, 1


class Difference(NamedTuple):
    """The largest difference of one quantity, beside the two numbers and the allowance; all in the quantity's unit."""

    side: str  # whose number is compared with the peer's
    what: str
    ours: float
    peer: float
    allowance: float
    agrees: bool


def allowed_nats(elbo: list[float], hidden: np.ndarray, dtype: str) -> np.ndarray:
    """What rounding allows for each estimate; `hidden` is how many log-probabilities a draw of it sums up."""
    size = np.abs(np.asarray(elbo, np.float64))
    of_sum, of_term = float(jnp.finfo("float32").eps), float(jnp.finfo(dtype).eps)
    return size * (SUM_UNITS * of_sum + TERM_UNITS * of_term / np.sqrt(np.maximum(hidden, 1)))


def compare(side: str, ours: dict, peer: dict, hidden: np.ndarray, *, beta: float, dtype: str) -> list[Difference]:
    """The differences between a side's answers of a reference pass and a training step, and the peer's."""
    nats = allowed_nats(peer["elbo"], hidden, dtype)
    loss, norm = beta / 4 * float(nats.mean()), peer["grad_norm"]
    allowances = {
        "elbo": ("ELBO of the reference (nats)", nats),
        "rewards": ("reward (nats)", nats),
        "loss": ("loss", np.array([loss])),
        "grad_norm": ("gradient norm", np.array([GRADIENT_UNITS * math.sqrt(jnp.finfo(dtype).eps) * norm])),
    }
    found = []
    for key, (what, allowance) in allowances.items():
        a, b = np.atleast_1d(np.asarray(ours[key], np.float64)), np.atleast_1d(np.asarray(peer[key], np.float64))
        apart = np.abs(a - b)
        worst = int(np.argmax(np.where(np.isfinite(apart), apart / allowance, np.inf)))
        agrees = bool(apart[worst] <= allowance[worst])  # False where a number is none
        found.append(Difference(side, what, float(a[worst]), float(b[worst]), float(allowance[worst]), agrees))
    return found
