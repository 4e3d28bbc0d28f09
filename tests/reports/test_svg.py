import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from elbo_kto_jax.reports import svg
from elbo_kto_jax.reports.svg import Bar, Series, bar_chart, downsample, format_ticks, histogram, line_chart, ticks


def _parse(markup):
    return ElementTree.fromstring(f"<div>{markup}</div>")


def _points(markup, style):
    """Coordinates of the lines of a style, one list per unbroken run."""
    paths = [path.get("d") for path in _parse(markup).iter("path") if path.get("class") == style]
    return [[tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]] for path in paths]


def _all_coordinates(markup):
    names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height")
    found = [float(e.get(name)) for e in _parse(markup).iter() for name in names if e.get(name) is not None]
    return found + [float(n) for e in _parse(markup).iter("path") for n in re.findall(r"-?[\d.]+|nan|inf", e.get("d"))]


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


def test_gaps_split_the_line_and_lonely_points_are_dots():
    y = [1.0, 2.0, None, 3.0, math.nan, 4.0, 5.0, math.inf]
    chart = line_chart("t", [Series("a", range(8), y)], x_label="step", y_label="nats")
    assert [len(run) for run in _points(chart, "line s0")] == [2, 2]
    assert len(list(_parse(chart).iter("circle"))) == 1


def test_line_follows_the_values():
    (run,) = _points(line_chart("t", [Series("a", [0, 1, 2], [0, 1, 3])], x_label="x", y_label="y"), "line s0")
    (x0, y0), (x1, y1), (x2, y2) = run
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert (y0 - y2) == pytest.approx(3 * (y0 - y1), abs=0.4)
    assert y2 < y1 < y0  # up is smaller in SVG


@pytest.mark.parametrize("y", [[], [math.nan], [None, None]])
def test_nothing_to_draw_says_so(y):
    chart = line_chart("t", [Series("a", range(len(y)), y)], x_label="x", y_label="y")
    assert "no finite value" in chart
    assert "no finite value" in histogram("t", y, x_label="x", y_label="y")
    assert "no finite value" in bar_chart("t", [Bar("a", value) for value in y], x_label="x")


def test_no_series():
    assert "no finite value" in line_chart("t", [], x_label="x", y_label="y")


@pytest.mark.parametrize(
    "values",
    [[5.0], [0.0], [0.0, 0.0], [1e-320, 0.0], [1e308, -1e308], [7e15, 7e15 + 1], [-3.0, -3.0, -2.999999999999]],
)
def test_extreme_ranges_stay_inside_the_drawing(values):
    for chart in (
        line_chart("t", [Series("a", values, values, raw=values, low=values, high=values)], x_label="x", y_label="y"),
        line_chart("t", [Series("a", range(len(values)), values)], x_label="x", y_label="y", y_from_zero=True),
        histogram("t", values, x_label="x", y_label="y"),
        bar_chart("t", [Bar("a", value, value, value, reference=0) for value in values], x_label="x"),
    ):
        coordinates = _all_coordinates(chart)
        assert coordinates
        assert all(-20 <= value <= 420 for value in coordinates)


def test_legend_and_dashes_only_for_several_series():
    one = line_chart("t", [Series("alone", [0, 1], [0, 1])], x_label="x", y_label="y")
    assert 'class="legend"' not in one
    two = line_chart("t", [Series("a<b", [0, 1], [0, 1]), Series("c", [0, 1], [1, 0])], x_label="x", y_label="y")
    assert [item.find("svg").tail for item in _parse(two).iter("li")] == ["a<b", "c"]
    assert len(_points(two, "line s1")) == 1


def test_band_and_raw_are_drawn_behind():
    series = Series("a", [0, 1, 2], [1, 2, 3], raw=[1, 1, 4], low=[0, 1, None], high=[2, 3, 4])
    chart = line_chart("t", [series], x_label="x", y_label="y")
    assert chart.index('class="band s0"') < chart.index('class="line raw s0"') < chart.index('class="line s0"')
    # Two points have both ends of the band: four corners.
    assert len(re.findall("[ML]", re.search(r'd="([^"]*)" class="band', chart)[1])) == 4


def test_a_long_series_stays_small():
    y = np.random.default_rng(0).normal(size=50_000)
    assert len(line_chart("t", [Series("a", np.arange(len(y)), y)], x_label="x", y_label="y")) < 60_000


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"'a'.*one length.*2.*3"):
        line_chart("t", [Series("a", [0, 1], [0, 1, 2])], x_label="x", y_label="y")
    with pytest.raises(ValueError, match="at most 4 series, got 5"):
        line_chart("t", [Series(str(i), [0], [0]) for i in range(5)], x_label="x", y_label="y")


def test_charts_are_described_in_words_and_escaped():
    charts = [
        line_chart("<i>t", [Series("<b>", [0, 1], [2, 7])], x_label="<x>", y_label="<y>"),
        bar_chart("<i>t", [Bar("<b>", 2, 1, 7)], x_label="<x>"),
        histogram("<i>t", [2, 7], x_label="<x>", y_label="<y>"),
    ]
    for chart in charts:
        drawing = next(_parse(chart).iter("svg"))
        assert drawing.get("role") == "img"
        assert drawing.find("title").text == "<i>t"
        assert "2" in drawing.find("desc").text
        assert "7" in drawing.find("desc").text
        assert {element.tag for element in drawing.iter()} <= {
            "svg", "title", "desc", "text", "line", "path", "rect", "circle"
        }  # fmt: skip


def test_lines_are_described_by_their_ends_and_extremes():
    chart = line_chart("t", [Series("a", [1, 2, 3, 4], [None, 5, -7, 6])], x_label="step", y_label="nats")
    assert (
        next(_parse(chart).iter("desc")).text == "a (nats): 5.00 at step 2, 6.00 at step 4; lowest −7.00, highest 6.00."
    )


def test_histogram_counts_every_value_once():
    values = [*np.random.default_rng(1).normal(size=500), None, math.nan]
    chart = _parse(histogram("t", values, x_label="x", y_label="y"))
    heights = [float(rect.get("height")) for rect in chart.iter("rect")]
    highest = max(heights)
    # Heights are proportional to counts, and the counts sum to the number of finite values.
    finite = np.array(values[:500])
    step = svg._round_step(finite.min(), finite.max(), svg._BINS, whole=False)
    edges = np.arange(math.floor(finite.min() / step), math.floor(finite.max() / step) + 2) * step
    counts, _ = np.histogram(finite, edges)
    np.testing.assert_allclose(np.array(heights) / highest, counts / counts.max(), atol=0.01)


def test_bars_are_proportional_and_intervals_ordered():
    chart = _parse(bar_chart("t", [Bar("a", 50, 40, 60), Bar("b", 25)], x_label="x", x_max=100))
    a, b = (float(rect.get("width")) for rect in chart.iter("rect"))
    assert a == pytest.approx(2 * b, abs=0.05)
    whiskers = [path.get("d") for path in chart.iter("path") if path.get("class") == "whisker"]
    assert len(whiskers) == 1
    low, high = re.search(r"M([\d.]+) .*H([\d.]+)M", whiskers[0]).groups()
    assert float(low) < 8 + a < float(high)


def test_long_bar_labels_are_cut_and_described_whole():
    label = "a very long name of a checkpoint folder that does not fit above a bar"
    chart = _parse(bar_chart("t", [Bar(label, 1)], x_label="x"))
    assert label in next(chart.iter("desc")).text
    assert any((text.text or "").endswith("…") for text in chart.iter("text"))
