"""Which segments share a row, and how long the rows of each micro-batch are (docs/method.md 5).

Every micro-batch of a run has the same number of rows, and a step takes as few micro-batches as it needs with rows of
the layout's length. What it takes may have shorter rows: where full rows leave more than a twentieth of the positions
empty, all micro-batches but the last get one length and the last another, the shortest in which the segments fit. Each
length that a run meets is one more shape for which its programs are compiled, so there are few of them, and the fewer
are tried first.

All of it is a pure function of the list of lengths and of the layout.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_ENOUGH = 0.95  # of the positions hold text: no more lengths are tried
# Of the longest row: in less than a quarter, the devices would wait for the weights.
_SIXTEENTHS = ((4, 8, 12), (4, 6, 8, 10, 12, 14, 15))
_UNIT = 128  # positions, of which attention on a TPU has tiles
_SHORT = 384  # positions of a row that is worth no other length
_TOKENS_PER_SLOT = 16  # a packed row of s tokens holds at most s / 16 segments


class Fitted(NamedTuple):
    """A micro-batch: how long its rows are, and which segments stand in each; rows at the end may be missing."""

    length: int
    rows: list[list[int]]


@functools.cache
def shorter_lengths(longest: int) -> tuple[tuple[int, ...], ...]:
    """Lengths that packed rows may have instead of `longest`: a few, then others in smaller steps."""
    if longest <= _SHORT:
        return ()
    sets = ([-(-longest * part // (16 * _UNIT)) * _UNIT for part in parts] for parts in _SIXTEENTHS)
    return tuple(tuple(n for n in lengths if n < longest) for lengths in sets)


def slots_of(length: int) -> int:
    """The largest number of segments in a packed row of so many tokens."""
    return max(1, length // _TOKENS_PER_SLOT)


def fit(lengths: Sequence[int], rows: int, longest: int, shorter: Sequence[Sequence[int]] = ()) -> list[Fitted]:
    """The micro-batches, of `rows` packed rows each, for segments of so many tokens.

    Args:
      lengths: tokens of every segment, at most `longest`.
      rows: of every micro-batch.
      longest: tokens of a row.
      shorter: sets of lengths that rows may have instead; the first that leaves few positions empty is taken.
    """
    bins = best_fit(lengths, [longest] * len(lengths), [slots_of(longest)] * len(lengths))
    bins = [row for row in bins or [] if row]
    best = [Fitted(longest, bins[at : at + rows]) for at in range(0, len(bins), rows)]
    for chosen in shorter:
        if text_fraction(lengths, best, rows) >= _ENOUGH:
            break
        best = _shortened(lengths, rows, best, [*chosen, longest])
    return best


def text_fraction(lengths: Sequence[int], micro_batches: Sequence[Fitted], rows: int) -> float:
    """The part of the positions of micro-batches of `rows` rows that holds the segments; 1 without any."""
    positions = rows * _row_positions(micro_batches)
    return sum(lengths) / positions if positions else 1.0


def _row_positions(micro_batches: Sequence[Fitted]) -> int:
    return sum(micro_batch.length for micro_batch in micro_batches)


def _shortened(lengths: Sequence[int], rows: int, given: list[Fitted], choice: Sequence[int]) -> list[Fitted]:
    """As many micro-batches of fewer positions, the last of one length and the others of another; else those given."""
    for found in _candidates(lengths, len(given), choice):
        if sum(lengths) <= rows * sum(found) and sum(found) < _row_positions(given):
            capacities = np.repeat(found, rows).tolist()
            bins = best_fit(lengths, capacities, list(map(slots_of, capacities)))
            if bins is not None:
                return [Fitted(n, bins[i * rows : (i + 1) * rows]) for i, n in enumerate(found)]
    return given


def _candidates(lengths: Sequence[int], count: int, choice: Sequence[int]) -> list[list[int]]:
    """Row lengths of the micro-batches: the fewest positions first, then the most even."""
    found = [
        [first] * (count - 1) + [last]
        for first in choice
        for last in choice
        if first >= max(lengths) and (last <= first if count > 1 else last == first)
    ]
    return sorted(found, key=lambda candidate: (sum(candidate), candidate[0]))


def best_fit(lengths: Sequence[int], capacities: Sequence[int], slots: Sequence[int]) -> list[list[int]] | None:
    """Best-fit decreasing: indices into `lengths` for each bin, or None where one does not fit.

    A bin holds at most its capacity in total and its slots in number. The longest segment comes first, of equal ones
    that which was given first; each goes where it leaves the least room, among equals to the first bin.
    """
    room = np.asarray(capacities, np.int64).copy()
    free = np.asarray(slots, np.int64).copy()
    bins: list[list[int]] = [[] for _ in capacities]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = np.where(free > 0, room - lengths[i], -1)
        left[left < 0] = np.iinfo(np.int64).max
        target = int(np.argmin(left))
        if left[target] == np.iinfo(np.int64).max:
            return None
        bins[target].append(i)
        room[target] -= lengths[i]
        free[target] -= 1
    return bins
