"""Charts as shapes and texts, for `figure` of templates/parts.html.j2 to draw as inline SVG.

A chart takes its colours from the style sheet, so that one drawing serves the light and the dark scheme. Series differ
by dash and by colour; every chart says its numbers in words for screen readers. Values that are not finite are gaps.
Everything is laid out in units of a viewBox `WIDTH` wide that scales with the page. docs/reports.md says why these are
not a plotting library's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from elbo_kto_jax.reports.axes import (
    Axis,
    downsample,
    format_ticks,
    padded_range,
    round_step,
    ticks,
    value_range,
    without_outliers,
)
from elbo_kto_jax.reports.formatting import format_number, number

WIDTH = 400.0
HEIGHT = 230.0
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


class _Drawn(NamedTuple):
    """A `Series` of numbers alone, NaN for gaps."""

    name: str
    x: np.ndarray
    y: np.ndarray
    raw: np.ndarray
    low: np.ndarray
    high: np.ndarray


class _DrawnBar(NamedTuple):
    """A `Bar` of numbers alone, NaN for those that are not given."""

    label: str
    value: float
    low: float
    high: float
    reference: float


@dataclass(frozen=True)
class Shape:
    """A polyline: data of an SVG path (absolute M, L and Z only) and classes of the style sheet."""

    path: str
    style: str


@dataclass(frozen=True)
class Text:
    """A line of text whose baseline starts, centres or ends (`anchor`: start, middle, end) at (x, y)."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    strong: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing: its numbers in words, shapes from back to front, texts on top; the legend names series in order."""

    words: str
    shapes: Sequence[Shape]
    texts: Sequence[Text]
    height: float = HEIGHT
    legend: Sequence[str] = ()
    width: float = WIDTH
    note: str = ""  # what the drawing leaves out


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, y_from_zero: bool = False) -> Chart:
    """Lines over a common axis, with a legend if there are several.

    Args:
        series: at most `SERIES_STYLES`; the lengths within one agree.
        x_label, y_label: name and unit of the axes.
        y_from_zero: whether the vertical axis starts at zero (fractions, counts).

    Raises:
        ValueError: too many series, or lengths that differ.
    """
    if len(series) > SERIES_STYLES:
        raise ValueError(f"line_chart: expected at most {SERIES_STYLES} series, got {len(series)}; split the chart")
    whole_series = [_clean(one) for one in series]
    x_values = np.concatenate([[], *(one.x for one in whole_series)])
    y_values = np.concatenate([[], *(v for one in whole_series for v in one[2:])])
    if not np.isfinite(y_values).any():
        return _nothing_to_draw()

    clipped, note = _without_outliers(whole_series)
    drawn = [_thinned(one) for one in clipped]
    y_range = padded_range(np.concatenate([v for one in drawn for v in one[2:]]), from_zero=y_from_zero)
    whole = bool(np.all(x_values == np.round(x_values)))
    x_axis, y_axis, shapes, texts = _frame(value_range(x_values), y_range, x_label, y_label, whole=whole, inset=6.0)
    for index, one in enumerate(drawn):
        for run in _runs(np.isfinite(one.low) & np.isfinite(one.high)):
            upper = [(x_axis(one.x[i]), y_axis(one.high[i])) for i in run]
            lower = [(x_axis(one.x[i]), y_axis(one.low[i])) for i in reversed(run)]
            shapes.append(_area(upper + lower, f"band s{index}"))
    for style, name in (("raw s", "raw"), ("s", "y")):  # all faint lines behind all others
        for index, one in enumerate(drawn):
            shapes += _lines(one.x, getattr(one, name), f"{style}{index}", x_axis, y_axis)
    words = " ".join(_in_words(one, x_label, y_label) for one in whole_series)
    return Chart(words, shapes, texts, legend=[one.name for one in drawn] if len(drawn) > 1 else (), note=note)


def bar_chart(bars: Sequence[Bar], *, x_label: str, x_max: Number = None) -> Chart:
    """Horizontal bars from zero, labels above them, with whiskers for intervals.

    Args:
        bars: drawn from top to bottom; a value that is not finite leaves its row empty.
        x_label: name and unit of the axis.
        x_max: end of the axis (default: the largest number drawn).
    """
    drawn = [_DrawnBar(bar.label, *_numbers((bar.value, bar.low, bar.high, bar.reference))) for bar in bars]
    ends = [end for bar in drawn for end in (bar.value, bar.low, bar.high, bar.reference)]
    if not any(math.isfinite(bar.value) for bar in drawn):
        return _nothing_to_draw()
    low, high = value_range(_numbers([*ends, x_max, 0.0]))
    height = 8.0 + _ROW * len(drawn) + _BOTTOM
    foot = height - _BOTTOM
    axis = Axis(low, high, 8.0, WIDTH - 16.0)

    shapes, texts = [], [Text((axis.start + axis.stop) / 2, height - 6, x_label, "middle")]
    x_ticks = ticks(low, high, 5)
    for value, label in zip(x_ticks, format_ticks(x_ticks), strict=True):
        shapes.append(_line([(axis(value), 4.0), (axis(value), foot)], "grid"))
        texts.append(Text(axis(value), foot + 17, label, "middle"))
    for index, bar in enumerate(drawn):
        top = 8.0 + _ROW * index
        shown = _bar_in_words(bar)
        room = int((WIDTH - 24) / _CHARACTER) - len(shown) - 2
        label = bar.label if len(bar.label) <= room else bar.label[: room - 1] + "…"
        texts += [Text(axis.start, top + 15, label, strong=True), Text(axis.stop, top + 15, shown, "end")]
        shapes += _bar(bar, top, axis)
    return Chart(" ".join(f"{bar.label}: {_bar_in_words(bar)}." for bar in drawn), shapes, texts, height)


def histogram(values: Numbers, *, x_label: str, y_label: str) -> Chart:
    """Counts of `values` in bins with round edges; values that are not finite are left out."""
    finite = _numbers(values)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return _nothing_to_draw()
    low, high = value_range(finite)
    whole = bool(np.all(finite == np.round(finite)))
    step = round_step(low, high, _BINS, whole=whole)
    first = math.floor(low / step)
    bins = max(1, math.floor(high / step) + 1 - first)
    counts = np.bincount(np.clip((np.floor(finite / step) - first).astype(int), 0, bins - 1), minlength=bins)

    x_range, y_range = (first * step, (first + bins) * step), (0.0, counts.max() * 1.05)
    x_axis, y_axis, shapes, texts = _frame(x_range, y_range, x_label, y_label, whole=whole, count=True)
    for index, count in enumerate(counts):
        x0, x1 = x_axis((first + index) * step) + 0.5, x_axis((first + index + 1) * step) - 0.5
        shapes.append(_box(x0, x1, y_axis(float(count)), y_axis.start))
    words = (
        f"{finite.size} values of {x_label}, from {format_number(finite.min())} to {format_number(finite.max())}; "
        f"median {format_number(float(np.median(finite)))}."
    )
    return Chart(words, shapes, texts)


def _numbers(values: Numbers) -> np.ndarray:
    finite = np.array([number(value) for value in values], dtype=np.float64)
    return np.clip(finite, -_LARGEST, _LARGEST)


def _clean(series: Series) -> _Drawn:
    """The series as float64 arrays (NaN for gaps), points without a finite x dropped."""
    x, y = _numbers(series.x), _numbers(series.y)
    others = (series.raw, series.low, series.high)
    columns = [y, *(np.full(len(y), np.nan) if values is None else _numbers(values) for values in others)]
    if any(len(values) != len(x) for values in columns):
        lengths = [len(x), *map(len, columns)]
        raise ValueError(f"series {series.name!r}: expected x, y, raw, low and high of one length, got {lengths}")
    located = np.isfinite(x)
    return _Drawn(series.name, x[located], *(values[located] for values in columns))


def _thinned(series: _Drawn) -> _Drawn:
    """The series with no more points than a screen can show."""
    kept = np.unique(np.concatenate([downsample(values) for values in series[2:]]))
    return _Drawn(series.name, series.x[kept], *(values[kept] for values in series[2:]))


def _without_outliers(drawn: list[_Drawn]) -> tuple[list[_Drawn], str]:
    """The series with outliers moved to the edge of the others, and words for them; "" without any.

    The series must be whole: of a thinned one, which keeps few points but every extreme, the counts would be wrong.
    """
    values = np.concatenate([one.raw if np.isfinite(one.raw).any() else one.y for one in drawn])
    if not np.isfinite(values).any():
        return drawn, ""
    low, high = without_outliers(values)
    outside = values[(values < low) | (values > high)]
    if not outside.size:
        return drawn, ""
    farthest = format_number(float(outside[np.argmax(np.abs(outside))]))
    note = f"{outside.size} values lie outside the picture and are drawn at its edge; the farthest is {farthest}."
    if outside.size == 1:
        note = f"One value lies outside the picture and is drawn at its edge: {farthest}."
    return [_Drawn(one.name, one.x, *(np.clip(column, low, high) for column in one[2:])) for one in drawn], note


def _runs(finite: np.ndarray) -> list[np.ndarray]:
    """The index ranges without a gap."""
    indices = np.flatnonzero(finite)
    if not len(indices):
        return []
    return np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)


def _line(points: Sequence[tuple[float, float]], style: str) -> Shape:
    return Shape("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), style)


def _area(points: Sequence[tuple[float, float]], style: str) -> Shape:
    return Shape(f"{_line(points, style).path}Z", style)


def _box(x0: float, x1: float, y0: float, y1: float) -> Shape:
    return _area([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], "bar s0")


def _lines(x: np.ndarray, y: np.ndarray, style: str, x_axis: Axis, y_axis: Axis) -> list[Shape]:
    """A line per run without a gap; a run of one point is a dot: a line without length whose ends are round."""
    shapes = []
    for run in _runs(np.isfinite(y)):
        points = [(x_axis(x[i]), y_axis(y[i])) for i in run]
        shapes.append(_line(points, f"line {style}") if len(run) > 1 else _line(points * 2, f"dot {style}"))
    return shapes


def _bar(bar: _DrawnBar, top: float, axis: Axis) -> list[Shape]:
    """The bar, its whisker and its reference, the last two with a halo that sets them off from the bar."""
    shapes = []
    if math.isfinite(bar.value):
        left, right = sorted((axis(0.0), axis(bar.value)))
        shapes.append(_box(left, right, top + 22, top + 42))
    if math.isfinite(bar.low) and math.isfinite(bar.high):
        a, b, y = axis(bar.low), axis(bar.high), top + 32
        ends = [_line([(x, y - 6), (x, y + 6)], "").path for x in (a, b)]
        whisker = "".join([*ends, _line([(a, y), (b, y)], "").path])
        shapes += [Shape(whisker, "whisker-halo"), Shape(whisker, "whisker")]
    if math.isfinite(bar.reference):
        x = axis(bar.reference)
        shapes += [_line([(x, top + 18), (x, top + 46)], style) for style in ("whisker-halo", "reference")]
    return shapes


def _frame(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_label: str,
    y_label: str,
    *,
    whole: bool,
    count: bool = False,
    inset: float = 0.0,
) -> tuple[Axis, Axis, list[Shape], list[Text]]:
    """The axes, the lines behind a chart and the labels. `whole`: only integers are labelled on x; `count`: on y."""
    y_ticks = ticks(*y_range, 5 if count else 6, whole=count)
    x_ticks = ticks(*x_range, 5, whole=whole)
    y_names = format_ticks(y_ticks)
    left = 10.0 + _CHARACTER * max(map(len, y_names))  # the labels fit beside it
    x_axis, y_axis = Axis(*x_range, left + inset, WIDTH - _RIGHT), Axis(*y_range, HEIGHT - _BOTTOM, _TOP)
    foot = y_axis.start
    texts = [Text(2, 13, y_label), Text((x_axis.start + x_axis.stop) / 2, HEIGHT - 6, x_label, "middle")]
    shapes = []
    for value, label in zip(y_ticks, y_names, strict=True):
        y = y_axis(value)
        shapes.append(_line([(left, y), (x_axis.stop, y)], "zero" if value == 0 else "grid"))
        texts.append(Text(left - 6, y + 4.5, label, "end"))
    for value, label in zip(x_ticks, format_ticks(x_ticks), strict=True):
        x = x_axis(value)
        shapes.append(_line([(x, foot), (x, foot + 4)], "grid"))
        # The last label would stick out of the drawing if it were centred on the edge.
        at_edge = x + _CHARACTER * len(label) / 2 > WIDTH
        texts.append(Text(x + (_RIGHT - 2 if at_edge else 0), foot + 18, label, "end" if at_edge else "middle"))
    shapes.append(_line([(left, foot), (x_axis.stop, foot)], "axis"))
    return x_axis, y_axis, shapes, texts


def _in_words(series: _Drawn, x_label: str, y_label: str) -> str:
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


def _bar_in_words(bar: _DrawnBar) -> str:
    if math.isfinite(bar.low) and math.isfinite(bar.high):
        return f"{format_number(bar.value)} ({format_number(bar.low)} to {format_number(bar.high)})"
    return format_number(bar.value)


def _nothing_to_draw() -> Chart:
    return Chart("No finite value.", (), [Text(WIDTH / 2, HEIGHT / 2, "no finite value", "middle")])
