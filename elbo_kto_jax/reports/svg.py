"""Charts as inline SVG, drawn with numpy alone: line chart, horizontal bars with intervals, histogram.

Every function returns markup that takes its colours from `style.py`, so that one drawing serves the light and the dark
scheme. Series differ by dash and by colour; every drawing carries its numbers in words for screen readers. Values that
are not finite are gaps. The drawing is laid out in units of a viewBox `WIDTH` wide that scales with the page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elbo_kto_jax.reports.markup import Html, format_number, join, number, tag

WIDTH = 400.0
HEIGHT = 230.0
MAX_POINTS = 400  # drawn per series, before the extremes of each bucket are added: more than a screen has to show
SERIES_STYLES = 4  # colours and dashes that the style sheet defines

# Room is kept for the text size of narrow screens (style sheet: 14.5 units there, less on wide screens).
_CHARACTER = 9.3  # widest usual digits (DejaVu Sans): 0.64 em
_TOP, _BOTTOM, _RIGHT = 26.0, 42.0, 12.0
_ROW = 52.0  # height of one bar with its label above it
_BINS = 24  # at most, in a histogram
_LARGEST = 1e300  # beyond it the arithmetic of an axis overflows

Number = float | int | None  # None, like NaN and infinities: no value
Numbers = Sequence | np.ndarray  # of `Number`


@dataclass(frozen=True)
class Series:
    """A line `y` over `x`; behind it, optionally, the values `raw` it was smoothed from and a band `low` to `high`."""

    name: str
    x: Numbers
    y: Numbers
    raw: Numbers | None = None
    low: Numbers | None = None
    high: Numbers | None = None


@dataclass(frozen=True)
class Bar:
    """A horizontal bar from zero to `value`, optionally with an interval `low` to `high` and a mark at `reference`."""

    label: str
    value: Number
    low: Number = None
    high: Number = None
    reference: Number = None


@dataclass(frozen=True)
class _Axis:
    """A linear map from [low, high] to drawing units [start, stop]."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def line_chart(title: str, series: Sequence[Series], *, x_label: str, y_label: str, y_from_zero: bool = False) -> Html:
    """Lines over a common axis, with a legend if there are several.

    Args:
        title: for screen readers (the page shows its own heading).
        series: at most `SERIES_STYLES`; the lengths within one agree.
        x_label, y_label: name and unit of the axes.
        y_from_zero: whether the vertical axis starts at zero (fractions, counts).

    Raises:
        ValueError: too many series, or lengths that differ.
    """
    if len(series) > SERIES_STYLES:
        raise ValueError(f"line_chart: expected at most {SERIES_STYLES} series, got {len(series)}; split the chart")
    drawn = [_clean(one) for one in series]
    x_values = np.concatenate([one.x for one in drawn]) if drawn else np.empty(0)
    y_values = (
        np.concatenate([v for one in drawn for v in (one.y, one.raw, one.low, one.high)]) if drawn else np.empty(0)
    )
    if not np.isfinite(y_values).any():
        return _svg(HEIGHT, title, "No finite value.", _nothing_to_draw())

    y_low, y_high = _padded_range(y_values, from_zero=y_from_zero)
    y_ticks = ticks(y_low, y_high, 6)
    left = 10.0 + _CHARACTER * max(len(label) for label in format_ticks(y_ticks))
    x_low, x_high = _range(x_values)
    whole = bool(np.all(x_values == np.round(x_values)))
    x_axis = _Axis(x_low, x_high, left + 6, WIDTH - _RIGHT)
    y_axis = _Axis(y_low, y_high, HEIGHT - _BOTTOM, _TOP)

    marks = [_grid(x_axis, y_axis, ticks(x_low, x_high, 5, whole=whole), y_ticks, left, x_label, y_label)]
    marks += [_band(one, index, x_axis, y_axis) for index, one in enumerate(drawn)]
    marks += [_line(one.x, one.raw, f"raw s{index}", x_axis, y_axis) for index, one in enumerate(drawn)]
    marks += [_line(one.x, one.y, f"s{index}", x_axis, y_axis) for index, one in enumerate(drawn)]
    chart = _svg(HEIGHT, title, " ".join(_in_words(one, x_label, y_label) for one in drawn), *marks)
    return join(_legend([one.name for one in drawn]), chart) if len(drawn) > 1 else chart


def bar_chart(title: str, bars: Sequence[Bar], *, x_label: str, x_max: Number = None) -> Html:
    """Horizontal bars from zero, labels above them, with whiskers for intervals.

    Args:
        title: for screen readers.
        bars: drawn from top to bottom; a value that is not finite leaves its row empty.
        x_label: name and unit of the axis.
        x_max: end of the axis (default: the largest number drawn).
    """
    bars = [Bar(bar.label, *_numbers((bar.value, bar.low, bar.high, bar.reference))) for bar in bars]
    ends = [end for bar in bars for end in (bar.value, bar.low, bar.high, bar.reference)]
    if not any(math.isfinite(bar.value) for bar in bars):
        return _svg(HEIGHT, title, "No finite value.", _nothing_to_draw())
    low, high = _range(_numbers([*ends, x_max, 0.0]))
    height = 8.0 + _ROW * len(bars) + _BOTTOM
    x_axis = _Axis(low, high, 8.0, WIDTH - 16.0)
    foot = height - _BOTTOM

    x_ticks = ticks(low, high, 5)
    marks, texts = [], []  # texts last: no line may strike through them
    for value, label in zip(x_ticks, format_ticks(x_ticks), strict=True):
        x = x_axis(value)
        marks.append(tag("line", x1=x, x2=x, y1=4.0, y2=foot, class_="grid"))
        texts.append(tag("text", label, x=x, y=foot + 17, text_anchor="middle"))
    texts.append(tag("text", x_label, x=(x_axis.start + x_axis.stop) / 2, y=height - 6, text_anchor="middle"))
    words = []
    for index, bar in enumerate(bars):
        top = 8.0 + _ROW * index
        shown = f"{format_number(bar.value)}{_interval(bar)}"
        words.append(f"{bar.label}: {shown}.")
        room = int((WIDTH - 24) / _CHARACTER) - len(shown) - 2
        label = bar.label if len(bar.label) <= room else bar.label[: room - 1] + "…"
        texts.append(tag("text", label, x=x_axis.start, y=top + 15, class_="strong"))
        texts.append(tag("text", shown, x=x_axis.stop, y=top + 15, text_anchor="end"))
        if math.isfinite(bar.value):
            x0, x1 = sorted((x_axis(0.0), x_axis(bar.value)))
            marks.append(tag("rect", x=x0, y=top + 22, width=x1 - x0, height=20.0, class_="bar s0"))
        if math.isfinite(bar.low) and math.isfinite(bar.high):
            a, b, y = x_axis(bar.low), x_axis(bar.high), top + 32
            whisker = f"M{a:.1f} {y - 6:.1f}v12M{a:.1f} {y:.1f}H{b:.1f}M{b:.1f} {y - 6:.1f}v12"
            marks.append(tag("path", d=whisker, class_="whisker-halo"))
            marks.append(tag("path", d=whisker, class_="whisker"))
        if math.isfinite(bar.reference):
            x = x_axis(bar.reference)
            marks.append(tag("line", x1=x, x2=x, y1=top + 18, y2=top + 46, class_="whisker-halo"))
            marks.append(tag("line", x1=x, x2=x, y1=top + 18, y2=top + 46, class_="reference"))
    return _svg(height, title, " ".join(words), *marks, *texts)


def histogram(title: str, values: Numbers, *, x_label: str, y_label: str) -> Html:
    """Counts of `values` in bins with round edges; values that are not finite are left out."""
    finite = _numbers(values)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return _svg(HEIGHT, title, "No finite value.", _nothing_to_draw())
    low, high = _range(finite)
    whole = bool(np.all(finite == np.round(finite)))
    step = _round_step(low, high, _BINS, whole=whole)
    first = math.floor(low / step)
    bins = max(1, math.floor(high / step) + 1 - first)
    counts = np.bincount(np.clip((np.floor(finite / step) - first).astype(int), 0, bins - 1), minlength=bins)

    y_ticks = ticks(0.0, counts.max() * 1.05, 5, whole=True)
    left = 10.0 + _CHARACTER * max(len(label) for label in format_ticks(y_ticks))
    x_axis = _Axis(first * step, (first + bins) * step, left, WIDTH - _RIGHT)
    y_axis = _Axis(0.0, counts.max() * 1.05, HEIGHT - _BOTTOM, _TOP)
    marks = [_grid(x_axis, y_axis, ticks(x_axis.low, x_axis.high, 5, whole=whole), y_ticks, left, x_label, y_label)]
    for index, count in enumerate(counts):
        x0, x1 = x_axis((first + index) * step), x_axis((first + index + 1) * step)
        y = y_axis(float(count))
        marks.append(tag("rect", x=x0 + 0.5, y=y, width=x1 - x0 - 1, height=y_axis.start - y, class_="bar s0"))
    words = (
        f"{finite.size} values of {x_label}, from {format_number(finite.min())} to {format_number(finite.max())}; "
        f"median {format_number(float(np.median(finite)))}."
    )
    return _svg(HEIGHT, title, words, *marks)


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


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """At most `most + 1` multiples of 1, 2 or 5 times a power of ten within [low, high]; integers if `whole`."""
    step = _round_step(low, high, most, whole=whole)
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


def _round_step(low: float, high: float, most: int, *, whole: bool) -> float:
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * (1 - 1e-9))
    return max(step, 1.0) if whole else step


def _range(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest finite value, moved apart where they are (nearly) equal."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or high == low:
        margin = 0.5 if size == 0 else max(0.1 * size, 1e-300)
        return low - margin, high + margin
    return low, high


def _padded_range(values: np.ndarray, *, from_zero: bool) -> tuple[float, float]:
    low, high = _range(np.append(values, 0.0) if from_zero else values)
    margin = 0.06 * (high - low)
    # Padding must not suggest negative values of a quantity that has none.
    padded_low = 0.0 if low >= 0 and (from_zero or low < margin) else low - margin
    if from_zero and not np.any(values < 0):
        padded_low = 0.0
    return padded_low, high + margin


def _numbers(values: Numbers) -> np.ndarray:
    finite = np.array([number(value) for value in values], dtype=np.float64)
    return np.clip(finite, -_LARGEST, _LARGEST)


def _clean(series: Series) -> Series:
    """The series as float64 arrays (NaN for gaps), points without a finite x dropped, long ones downsampled."""
    x, y = _numbers(series.x), _numbers(series.y)
    others = (series.raw, series.low, series.high)
    columns = [y, *(np.full(len(y), np.nan) if values is None else _numbers(values) for values in others)]
    if any(len(values) != len(x) for values in columns):
        lengths = [len(x), *map(len, columns)]
        raise ValueError(f"series {series.name!r}: expected x, y, raw, low and high of one length, got {lengths}")
    located = np.isfinite(x)
    columns = [values[located] for values in columns]
    kept = np.unique(np.concatenate([downsample(values) for values in columns]))
    return Series(series.name, x[located][kept], *(values[kept] for values in columns))


def _runs(finite: np.ndarray) -> list[np.ndarray]:
    """The index ranges without a gap."""
    indices = np.flatnonzero(finite)
    if not len(indices):
        return []
    return np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)


def _line(x: np.ndarray, y: np.ndarray, style: str, x_axis: _Axis, y_axis: _Axis) -> Html:
    marks = []
    for run in _runs(np.isfinite(y)):
        points = [f"{x_axis(x[i]):.1f} {y_axis(y[i]):.1f}" for i in run]
        if len(points) == 1:
            left, top = points[0].split()
            marks.append(tag("circle", cx=left, cy=top, r="3", class_=f"dot {style}"))
        else:
            marks.append(tag("path", d="M" + "L".join(points), class_=f"line {style}"))
    return join(*marks)


def _band(series: Series, index: int, x_axis: _Axis, y_axis: _Axis) -> Html:
    marks = []
    for run in _runs(np.isfinite(series.low) & np.isfinite(series.high)):
        upper = [f"{x_axis(series.x[i]):.1f} {y_axis(series.high[i]):.1f}" for i in run]
        lower = [f"{x_axis(series.x[i]):.1f} {y_axis(series.low[i]):.1f}" for i in reversed(run)]
        marks.append(tag("path", d="M" + "L".join(upper + lower) + "Z", class_=f"band s{index}"))
    return join(*marks)


def _grid(
    x_axis: _Axis, y_axis: _Axis, x_ticks: list[float], y_ticks: list[float], left: float, x_label: str, y_label: str
) -> Html:
    foot = y_axis.start
    marks = [tag("text", y_label, x=2.0, y=13.0, class_="axis-name")]
    for value, label in zip(y_ticks, format_ticks(y_ticks), strict=True):
        y = y_axis(value)
        marks.append(tag("line", x1=left, x2=x_axis.stop, y1=y, y2=y, class_="zero" if value == 0 else "grid"))
        marks.append(tag("text", label, x=left - 6, y=y + 4.5, text_anchor="end"))
    for value, label in zip(x_ticks, format_ticks(x_ticks), strict=True):
        x = x_axis(value)
        # The last label would stick out of the drawing if it were centred on the edge.
        anchor = "end" if x + _CHARACTER * len(label) / 2 > WIDTH else "middle"
        marks.append(tag("line", x1=x, x2=x, y1=foot, y2=foot + 4, class_="grid"))
        marks.append(tag("text", label, x=x + (_RIGHT - 2 if anchor == "end" else 0), y=foot + 18, text_anchor=anchor))
    marks.append(tag("line", x1=left, x2=x_axis.stop, y1=foot, y2=foot, class_="axis"))
    middle = (x_axis.start + x_axis.stop) / 2
    marks.append(tag("text", x_label, x=middle, y=HEIGHT - 6, text_anchor="middle", class_="axis-name"))
    return join(*marks)


def _legend(names: Sequence[str]) -> Html:
    items = []
    for index, name in enumerate(names):
        line = tag("line", x1="0", x2="28", y1="6", y2="6", class_=f"line s{index}")
        items.append(
            tag("li", tag("svg", line, viewBox="0 0 28 12", width="28", height="12", aria_hidden="true"), name)
        )
    return tag("ul", *items, class_="legend")


def _in_words(series: Series, x_label: str, y_label: str) -> str:
    finite = np.flatnonzero(np.isfinite(series.y))
    if not len(finite):
        return f"{series.name}: no finite value."
    first, last = (
        f"{format_number(series.y[i])} at {x_label} {format_number(round(x) if x == round(x) else x)}"
        for i, x in ((end, float(series.x[end])) for end in (finite[0], finite[-1]))
    )
    return (
        f"{series.name} ({y_label}): {first}, {last}; "
        f"lowest {format_number(np.nanmin(series.y))}, highest {format_number(np.nanmax(series.y))}."
    )


def _interval(bar: Bar) -> str:
    if math.isfinite(bar.low) and math.isfinite(bar.high):
        return f" ({format_number(bar.low)} to {format_number(bar.high)})"
    return ""


def _nothing_to_draw() -> Html:
    return tag("text", "no finite value", x=WIDTH / 2, y=HEIGHT / 2, text_anchor="middle")


def _svg(height: float, title: str, description: str, *marks: Html) -> Html:
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *marks,
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
        aria_label=f"{title}. {description}",
        class_="chart",
    )
