"""The exact ELBO of a short completion, by enumerating every mask (docs/method.md 1)."""

import math

import numpy as np
from jaxtyping import Bool, Float64

MAX_LENGTH = 12  # tokens; the number of masks doubles with each


def all_masks(length: int) -> Bool[np.ndarray, "m l"]:
    """All 2^length - 1 masks that hide at least one of `length` tokens; row m hides token i where bit i of m + 1 is 1.

    Raises:
      ValueError: `length` is not in 1..MAX_LENGTH.
    """
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"length: expected 1..{MAX_LENGTH} tokens, got {length}")
    return (np.arange(1, 2**length)[:, None] >> np.arange(length)) & 1 == 1


def exact_weights(masks: Bool[np.ndarray, "m l"]) -> Float64[np.ndarray, " m"]:
    """Weights with which ELBO = sum over `all_masks` of weight * sum of log p at the hidden tokens.

    A mask of l of L tokens has probability 1 / (L * binom(L, l)) and its estimate the factor L / l, so the weight is
    1 / (l * binom(L, l)).

    Raises:
      ValueError: a mask hides nothing.
    """
    length = masks.shape[1]
    counts = masks.sum(axis=1)
    if not counts.all():
        raise ValueError("masks: expected at least one hidden token in each")
    by_count = np.array([1.0, *(1.0 / (n * math.comb(length, n)) for n in range(1, length + 1))])
    return by_count[counts]
