import math

import numpy as np
import pytest

from elbo_kto_jax.reports.formatting import DASH, format_number, number


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, -math.inf, 10**400, [1]])
def test_number_refuses_what_is_not_one(value):
    assert math.isnan(number(value))


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.float64(2), np.int64(2)])
def test_number_accepts_every_kind_of_number(value):
    assert number(value) == 2.0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3200, "3,200"),
        (-5, "−5"),
        (0.4123, "0.412"),
        (4.312, "4.31"),
        (12345.6, "12,346"),
        (-0.05, "−0.0500"),
        (1.5e-6, "1.50e-06"),
        (-1.5e-6, "−1.50e-06"),
        (2.5e20, "2.50e+20"),
        (0.0, "0"),
        (-0.0, "0"),
        (math.nan, DASH),
        (None, DASH),
        (True, DASH),
    ],
)
def test_format_number(value, shown):
    assert format_number(value) == shown
