"""Axes of charts: round ticks and their labels, ranges, and fewer points than a screen can show."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEW = 50  # values, of which one is a fiftieth of the picture and no outlier
MAX_POINTS = 400  # drawn per series, before the extremes of each bucket are added: more than a screen has to show


@dataclass(frozen=True)
class Axis:
    """A linear map from [low, high] to drawing units [start, stop]."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def downsample(values: np.ndarray, max_buckets: int = MAX_POINTS) -> np.ndarray:
    """Indices that keep the look of a long line: per bucket the first, lowest, highest and last value, and one gap.

    Args:
        values: float64[n], NaN for gaps.
        max_buckets: a series of at most this length is kept whole.

    Returns:
        int64[m], increasing, m <= 5 * max_buckets.
    """
    if len(values) <= max_buckets:
        return np.arange(len(values))
    kept: list[int] = []
    for bucket in np.array_split(np.arange(len(values)), max_buckets):
        inside = values[bucket]
        gaps = np.flatnonzero(~np.isfinite(inside))
        if len(gaps) < len(inside):
            picks = {0, int(np.nanargmin(inside)), int(np.nanargmax(inside)), len(inside) - 1, *gaps[:1].tolist()}
        else:
            picks = {0}
        kept += [int(bucket[pick]) for pick in sorted(picks)]
    return np.array(kept)


def without_outliers(values: np.ndarray) -> tuple[float, float]:
    """(lowest, highest) of the values but for outliers: those beyond the middle 98% by more than its whole width.

    Args:
        values: float64[n], NaN for gaps. At least one is finite; of fewer than `FEW` none is an outlier.
    """
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, [0.01, 0.99]) if len(finite) >= FEW else (finite.min(), finite.max())
    width = high - low
    usual = finite[(finite >= low - width) & (finite <= high + width)]
    return float(usual.min()), float(usual.max())


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """At most `most + 1` multiples of 1, 2 or 5 times a power of ten within [low, high]; integers if `whole`."""
    step = round_step(low, high, most, whole=whole)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def format_ticks(values: Sequence[float]) -> list[str]:
    """Tick labels with as many digits as tell neighbours apart: 0.05, 12k, 1.5M, 2e-06."""
    if not values:
        return []
    top = max(abs(value) for value in values)
    step = values[1] - values[0] if len(values) > 1 else top or 1.0
    if top == 0:
        return ["0" for _ in values]
    if not 1e-3 <= top < 1e15:
        labels = []
        for value in values:
            digits = _exponent(value) - _exponent(step) if value else 0
            labels.append(f"{value:.{max(0, digits)}e}" if value else "0")
        return [_minus(label) for label in labels]
    divisor, suffix = 1.0, ""
    if top >= 1e4:
        divisor, suffix = next((d, s) for d, s in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if top >= d)
    decimals = max(0, -_exponent(step / divisor))
    return [_minus(f"{value / divisor:.{decimals}f}{suffix}") if value else "0" for value in values]


def _minus(label: str) -> str:
    return "−" + label[1:] if label.startswith("-") else label


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)) + 1e-9)


def round_step(low: float, high: float, most: int, *, whole: bool) -> float:
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * (1 - 1e-9))
    return max(step, 1.0) if whole else step


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest finite value, moved apart where they are (nearly) equal."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or high == low:
        margin = 0.5 if size == 0 else max(0.1 * size, 1e-300)
        return low - margin, high + margin
    return low, high


def padded_range(values: np.ndarray, *, from_zero: bool) -> tuple[float, float]:
    low, high = value_range(np.append(values, 0.0) if from_zero else values)
    margin = 0.06 * (high - low)
    # Padding must not suggest negative values of a quantity that has none.
    padded_low = 0.0 if low >= 0 and (from_zero or low < margin) else low - margin
    if from_zero and not np.any(values < 0):
        padded_low = 0.0
    return padded_low, high + margin
