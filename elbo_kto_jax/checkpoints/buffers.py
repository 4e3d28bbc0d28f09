"""Memory that is used again and again, since new memory costs more than copying into it.

The kernel clears every page of a new array when it is first touched, and takes it back with the array. A conversion
that asked for new arrays would spend more time on that than on everything else it does.
"""

import math

import numpy as np
from jax.typing import DTypeLike

_ALIGNMENT = 64  # bytes; XLA reads a host's array where it is if it is aligned so, and a copy of it otherwise


class Buffers:
    """Arrays in a few blocks of memory by turns, which grow to the largest array."""

    def __init__(self, count: int):
        """`count`: how many of the latest arrays are valid at a time; see `Source.buffers`."""
        self._blocks = [np.empty(0, np.uint8)] * max(1, count)
        self._turn = 0

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """An array of undefined content, valid until this has been called `count` more times."""
        self._turn = (self._turn + 1) % len(self._blocks)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size + _ALIGNMENT > self._blocks[self._turn].size:
            self._blocks[self._turn] = np.empty(size + _ALIGNMENT, np.uint8)
        block = self._blocks[self._turn]
        start = -block.ctypes.data % _ALIGNMENT
        return block[start : start + size].view(dtype).reshape(shape)
