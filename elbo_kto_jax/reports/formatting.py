"""Numbers as people read them; what is missing or not finite is a dash."""

import math
import numbers

DASH = "–"  # stands for a number that is missing or not finite


def number(value: object) -> float:
    """A JSON value as a float; NaN for anything that is not a finite number (null, text, booleans, infinities)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        value = float(value)
    except OverflowError:  # an int beyond the range of float64
        return math.nan
    return value if math.isfinite(value) else math.nan


def format_number(value: object) -> str:
    """A number for people: 3,200 or 0.412 or 1.50e-06 (three significant digits; integers in full)."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return f"{int(value):,}".replace("-", "−")
    value = number(value)
    if math.isnan(value):
        return DASH
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e15:
        return f"{value:.2e}".replace("-", "−", 1) if value < 0 else f"{value:.2e}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")
