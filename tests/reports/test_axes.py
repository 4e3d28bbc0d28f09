import math

import numpy as np
import pytest

from elbo_kto_jax.reports.axes import downsample, format_ticks, ticks


@pytest.mark.parametrize(
    ("low", "high", "most"),
    [(0.0, 1.0, 5), (-3.7, 12.2, 5), (0.0, 1e-6, 6), (1e6, 1e6 + 3, 5), (-1e300, 1e300, 5), (2.0, 437.0, 5)],
)
def test_ticks_are_few_round_and_inside(low, high, most):
    found = ticks(low, high, most)
    step = found[1] - found[0]
    assert 2 <= len(found) <= most + 1
    assert all(low - 1e-6 * step <= value <= high + 1e-6 * step for value in found)
    mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-6)
    assert round(mantissa, 3) in (1, 2, 5)


def test_whole_ticks():
    assert ticks(0.5, 3.5, 5, whole=True) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 0.05, 0.1], ["0", "0.05", "0.10"]),
        ([0.0, 10000.0, 20000.0], ["0", "10k", "20k"]),
        ([11500.0, 12000.0], ["11.5k", "12.0k"]),
        ([0.0, 5e5, 1e6, 1.5e6], ["0", "0.5M", "1.0M", "1.5M"]),
        ([0.0, 5e-7, 1e-6], ["0", "5e-07", "1.0e-06"]),
        ([1e-6], ["1e-06"]),
        ([-2.0, 0.0, 2.0], ["−2", "0", "2"]),
        ([0.1 * 3], ["0.3"]),
        ([], []),
    ],
)
def test_format_ticks(values, labels):
    assert format_ticks(values) == labels


def test_tick_labels_tell_neighbours_apart():
    for low, high in [(1e6, 1e6 + 3), (0.99, 1.0), (1e-6, 1.1e-6), (-5e9, 5e9)]:
        labels = format_ticks(ticks(low, high, 5))
        assert len(set(labels)) == len(labels)


def test_downsample_keeps_extremes_ends_and_gaps():
    values = np.sin(np.arange(100_000) / 50)
    values[[12_345, 54_321]] = 40, -40
    values[77_777] = np.nan
    kept = downsample(values, 100)
    assert len(kept) <= 500
    assert {0, 12_345, 54_321, 77_777, 99_999} <= set(kept.tolist())
    assert np.all(np.diff(kept) > 0)


def test_downsample_leaves_short_series_alone():
    assert downsample(np.full(7, np.nan), 7).tolist() == list(range(7))
