"""Conditional likelihood for evaluation: the schedule of mask sizes (METHOD 7)."""

import numpy as np
from jaxtyping import Int32


def stratified_counts(first: int, length: int, batch: int) -> Int32[np.ndarray, " batch"]:
    """How many of an answer's tokens each of `batch` masks hides, spread evenly over 1..length from `first` on.

    l_j = ((round(first + j * length / batch) - 1) mod length) + 1; the sum is rounded, half to even. With `first`
    uniform on 1..length, so is every l_j whose j * length / batch is not half a token off a whole number; those that
    are fall on even numbers, a small bias that the published numbers have.

    Args:
      first: the mask size of the first, 1..length.
      length: tokens of the answer.
      batch: number of masks.

    Raises:
      ValueError: an argument is out of range.
    """
    if batch < 1 or not 1 <= first <= length:
        raise ValueError(
            f"first, length, batch: expected 1 <= first <= length and batch >= 1, got {first}, {length}, {batch}"
        )
    sums = np.round(first + np.arange(batch) * length / batch)  # np.round rounds half to even
    return ((sums.astype(np.int64) - 1) % length + 1).astype(np.int32)
