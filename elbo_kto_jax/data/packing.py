"""Rows for the mask predictor: scored sequences, packed several to a row or padded one to a row (docs/method.md 5).

A `Segment` is one draw of one example: its tokens, and which of its completion tokens are hidden. `pack` lays segments
into rows, and rows into micro-batches of a static number of rows; how long the rows of each are, says data/fitting.py.
Packed rows show no segment to
another (block-diagonal attention) and restart positions at each segment; the authors' padding gives every segment a row
of its own, whose end-of-text padding attention does see.

Where each segment goes is a pure function of the list of lengths, so the reference pass and training, which see the
same list, run on bit-identical rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from elbo_kto_jax.data.fitting import Fitted, fit, slots_of
from elbo_kto_jax.runtime.arrays import AnyArray


class Segment(NamedTuple):
    """One draw of one example."""

    tokens: Int32[np.ndarray, " n"]  # prompt and completion, nothing hidden yet
    start: int  # where the completion starts
    mask: Bool[np.ndarray, " l"]  # over the completion's tokens; True = hidden and scored
    weight: float  # of the sum of log-probabilities, docs/method.md 1
    index: int  # type: ignore[assignment]  # not tuple's; where this draw's estimate goes in the flat array


class Rows(NamedTuple):
    """A micro-batch of m rows of s tokens; leaves are numpy on the host and sharded along m on devices."""

    tokens: Int32[AnyArray, "m s"]  # hidden tokens already replaced by the mask token
    positions: Int32[AnyArray, "m s"]  # restart at each segment
    segment_ids: Int32[AnyArray, "m s"]  # 1, 2, ... ; 0 is padding that no segment sees
    target_position: Int32[AnyArray, "m s"]  # where the hidden tokens are, first `num_targets` entries of a row
    target_token: Int32[AnyArray, "m s"]  # what stood there
    target_slot: Int32[AnyArray, "m s"]  # which of the row's segments it belongs to
    target_weight: Float32[AnyArray, "m s"]
    num_targets: Int32[AnyArray, " m"]
    slot_index: Int32[AnyArray, "m g"]  # Segment.index of each slot, NO_SEGMENT where there is none


NO_SEGMENT = np.iinfo(np.int32).max  # an index that is out of range everywhere, so that writes to it are dropped


class Layout(NamedTuple):
    """The static shapes of micro-batches and what fills the gaps."""

    rows: int  # m
    length: int  # s, tokens; a packed micro-batch may have shorter rows
    mask_token: int
    pad_token: int
    packed: bool  # False: the authors' padding
    shorter: tuple[tuple[int, ...], ...] = ()  # sets of such lengths, by data/fitting.py; (): every row has `length`

    def fit(self, lengths: Sequence[int]) -> list[Fitted]:
        """The micro-batches of segments of so many tokens."""
        if self.packed:
            return fit(lengths, self.rows, self.length, self.shorter)
        alone = [[i] for i in range(len(lengths))]
        return [Fitted(self.length, alone[at : at + self.rows]) for at in range(0, len(alone), self.rows)]


def pack(segments: Sequence[Segment], layout: Layout) -> list[Rows]:
    """The micro-batches that hold `segments`; rows that fill them up are empty.

    Raises:
      ValueError: a segment is longer than a row.
    """
    return pack_own(
        [len(segment.tokens) for segment in segments], segments.__getitem__, layout, np.ones(layout.rows, bool)
    )


def pack_own(
    lengths: Sequence[int], segment_of: Callable[[int], Segment], layout: Layout, own: Bool[np.ndarray, " m"]
) -> list[Rows]:
    """`pack` for a process that holds the rows `own` of each micro-batch: the others are left empty.

    Args:
      lengths: tokens of every segment.
      segment_of: makes a segment; called for those of own rows.

    Raises:
      ValueError: a segment is longer than a row.
    """
    longest = max(lengths, default=0)
    if longest > layout.length:
        raise ValueError(f"segments: expected at most {layout.length} tokens, got {longest}")

    def own_of(rows: list[list[int]]) -> list[list[Segment]]:
        return [list(map(segment_of, row)) if own[r] else [] for r, row in enumerate(rows)]

    return [_micro_batch(own_of(rows), layout, length) for length, rows in layout.fit(lengths)]


def _micro_batch(rows: list[list[Segment]], layout: Layout, length: int) -> Rows:
    m, s, slots = layout.rows, length, slots_of(length) if layout.packed else 1

    def empty(fill: int = 0, dtype: type = np.int32) -> np.ndarray:
        return np.full((m, s), fill, dtype)

    tokens, positions, segment_ids = empty(layout.pad_token), empty(), empty()
    position, token, slot, weight = empty(), empty(), empty(), empty(0, np.float32)
    num_targets = np.zeros(m, np.int32)
    slot_index = np.full((m, slots), NO_SEGMENT, np.int32)
    if not layout.packed:
        positions[:] = np.arange(s)
        segment_ids[: len(rows)] = 1
    for r, row in enumerate(rows):
        at = targets = 0
        for g, segment in enumerate(row):
            end = at + len(segment.tokens)
            hidden = at + segment.start + np.flatnonzero(segment.mask)
            new = slice(targets, targets + len(hidden))
            token[r, new] = segment.tokens[hidden - at]
            position[r, new] = hidden
            slot[r, new] = g
            weight[r, new] = segment.weight
            tokens[r, at:end] = segment.tokens
            tokens[r, hidden] = layout.mask_token
            if layout.packed:
                positions[r, at:end] = np.arange(end - at)
                segment_ids[r, at:end] = g + 1
            slot_index[r, g] = segment.index
            at, targets = end, new.stop
        num_targets[r] = targets
    return Rows(tokens, positions, segment_ids, position, token, slot, weight, num_targets, slot_index)
