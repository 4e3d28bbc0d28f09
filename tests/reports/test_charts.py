"""reports/charts.py: what is drawn stands where the values say."""

import math
import re

import numpy as np
import pytest

from elbo_kto_jax.reports.axes import round_step
from elbo_kto_jax.reports.charts import WIDTH, Bar, Series, bar_chart, histogram, line_chart


def _points(chart, style):
    """The points (x, y) of each shape of a style, y upwards."""
    paths = [shape.path for shape in chart.shapes if shape.style == style]
    return [
        np.array([point.split() for point in re.split("[ML]", path.rstrip("Z"))[1:]], float) * (1, -1) for path in paths
    ]


def _sides(points):
    """Width and height of a box."""
    return np.ptp(points, axis=0)


def test_gaps_split_the_line_and_lonely_points_are_dots():
    y = [1.0, 2.0, None, 3.0, math.nan, 4.0, 5.0, math.inf]
    chart = line_chart([Series("a", range(8), y)], x_label="step", y_label="nats")
    assert [len(run) for run in _points(chart, "line s0")] == [2, 2]
    assert len(_points(chart, "dot s0")) == 1


def test_outliers_are_drawn_at_the_edge_and_said():
    """One value of 1e6 among values of 0 to 1: without it the picture is the same but for that point."""
    usual = np.linspace(0.0, 1.0, 200)
    spike = np.where(np.arange(200) == 100, 1e6, usual)
    plain, chart = (line_chart([Series("a", range(200), y)], x_label="step", y_label="nats") for y in (usual, spike))
    (expected,), (found,) = _points(plain, "line s0"), _points(chart, "line s0")
    np.testing.assert_allclose(np.delete(found, 100, axis=0), np.delete(expected, 100, axis=0), atol=0.15)
    assert found[100, 1] == found[:, 1].max()
    assert plain.note == ""
    assert chart.note == "One value lies outside the picture and is drawn at its edge: 1,000,000."
    assert "highest 1,000,000" in chart.words  # nothing is kept from who cannot see it
    two = line_chart([Series("a", range(200), np.where(np.arange(200) < 2, -1e6, usual))], x_label="x", y_label="y")
    assert two.note == "2 values lie outside the picture and are drawn at its edge; the farthest is −1,000,000."


def test_every_outlier_of_a_long_series_is_counted():
    """Ten in a row stand where the drawing has room for a few points; the note is about the values, not the points."""
    values = np.linspace(0.0, 1.0, 4000)
    values[1000:1010] = 1e6
    chart = line_chart([Series("a", range(4000), values)], x_label="x", y_label="y")
    assert chart.note.startswith("10 values lie outside")


@pytest.mark.parametrize("values", [[*[1.0] * 20, 1e6], np.exp(-np.arange(200) / 40), np.linspace(-5, 5, 200)])
def test_few_values_and_smooth_curves_have_no_outliers(values):
    assert line_chart([Series("a", range(len(values)), values)], x_label="x", y_label="y").note == ""


def test_line_follows_the_values():
    values = np.array([0.0, 1.0, 3.0, 2.5])
    (run,) = _points(line_chart([Series("a", [0, 1, 2, 5], values)], x_label="x", y_label="y"), "line s0")
    scale = (run[-1] - run[0]) / (5, 2.5)
    np.testing.assert_allclose(run, run[0] + np.stack([[0, 1, 2, 5], values], axis=1) * scale, atol=0.15)
    assert np.all(scale > 0)


@pytest.mark.parametrize("y", [[], [math.nan], [None, None]])
def test_nothing_to_draw_says_so(y):
    charts = [
        line_chart([Series("a", range(len(y)), y)], x_label="x", y_label="y"),
        line_chart([], x_label="x", y_label="y"),
        histogram(y, x_label="x", y_label="y"),
        bar_chart([Bar("a", value) for value in y], x_label="x"),
    ]
    for chart in charts:
        assert [text.text for text in chart.texts] == ["no finite value"]
        assert (chart.words, len(chart.shapes)) == ("No finite value.", 0)


@pytest.mark.parametrize(
    "values",
    [[5.0], [0.0], [0.0, 0.0], [1e-320, 0.0], [1e308, -1e308], [7e15, 7e15 + 1], [-3.0, -3.0, -2.999999999999]],
)
def test_extreme_ranges_stay_inside_the_drawing(values):
    for chart in (
        line_chart([Series("a", values, values, raw=values, low=values, high=values)], x_label="x", y_label="y"),
        line_chart([Series("a", range(len(values)), values)], x_label="x", y_label="y", y_from_zero=True),
        histogram(values, x_label="x", y_label="y"),
        bar_chart([Bar("a", value, value, value, reference=0) for value in values], x_label="x"),
    ):
        points = np.concatenate([p for shape in chart.shapes for p in _points(chart, shape.style)])
        texts = np.array([(text.x, -text.y) for text in chart.texts])
        for x, y in (points.T, texts.T):
            assert np.all((x >= -1) & (x <= WIDTH + 1) & (y <= 1) & (y >= -chart.height - 1))


def test_legend_only_for_several_series():
    lines = [Series(name, [0, 1], [0, 1]) for name in ("a", "b")]
    assert line_chart(lines[:1], x_label="x", y_label="y").legend == ()
    assert line_chart(lines, x_label="x", y_label="y").legend == ["a", "b"]


def test_band_and_raw_are_drawn_behind():
    series = Series("a", [0, 1, 2], [1, 2, 3], raw=[1, 1, 4], low=[0, 1, None], high=[2, 3, 4])
    chart = line_chart([series], x_label="x", y_label="y")
    styles = [shape.style for shape in chart.shapes]
    assert styles[-3:] == ["band s0", "line raw s0", "line s0"]
    (band,), (line,) = _points(chart, "band s0"), _points(chart, "line s0")
    assert len(band) == 4  # corners: two points have both ends
    np.testing.assert_allclose((band[:2] + band[:1:-1]) / 2, line[:2], atol=0.15)


def test_a_long_series_stays_small():
    y = np.random.default_rng(0).normal(size=50_000)
    chart = line_chart([Series("a", np.arange(len(y)), y)], x_label="x", y_label="y")
    assert sum(len(shape.path) for shape in chart.shapes) < 50_000


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"'a'.*one length.*2.*3"):
        line_chart([Series("a", [0, 1], [0, 1, 2])], x_label="x", y_label="y")
    with pytest.raises(ValueError, match="at most 4 series, got 5"):
        line_chart([Series(str(i), [0], [0]) for i in range(5)], x_label="x", y_label="y")


def test_lines_are_described_by_their_ends_and_extremes():
    chart = line_chart([Series("a", [1, 2, 3, 4], [None, 5, -7, 6])], x_label="step", y_label="nats")
    assert chart.words == "a (nats): 5.00 at step 2, 6.00 at step 4; lowest −7.00, highest 6.00."


def test_histogram_counts_every_value_once():
    values = [*np.random.default_rng(1).normal(size=500), None, math.nan]
    heights = np.array([_sides(bar)[1] for bar in _points(histogram(values, x_label="x", y_label="y"), "bar s0")])
    finite = np.array(values[:500])
    step = round_step(finite.min(), finite.max(), 24, whole=False)
    edges = np.arange(math.floor(finite.min() / step), math.floor(finite.max() / step) + 2) * step
    counts, _ = np.histogram(finite, edges)
    np.testing.assert_allclose(heights / heights.max(), counts / counts.max(), atol=0.01)


def test_bars_are_proportional_and_intervals_ordered():
    chart = bar_chart([Bar("a", 50, 40, 60, reference=25), Bar("b", 25)], x_label="x", x_max=100)
    a, b = _points(chart, "bar s0")
    zero, per_unit = a[:, 0].min(), _sides(a)[0] / 50
    assert _sides(b)[0] == pytest.approx(25 * per_unit, abs=0.2)
    (whisker,), (reference,) = _points(chart, "whisker"), _points(chart, "reference")
    np.testing.assert_allclose(
        [whisker[:, 0].min(), whisker[:, 0].max()], zero + np.array([40, 60]) * per_unit, atol=0.2
    )
    np.testing.assert_allclose(reference[:, 0], zero + 25 * per_unit, atol=0.2)
    assert chart.words == "a: 50.0 (40.0 to 60.0). b: 25.0."


def test_long_bar_labels_are_cut_and_described_whole():
    label = "a very long name of a checkpoint folder that does not fit above a bar"
    chart = bar_chart([Bar(label, 1)], x_label="x")
    assert label in chart.words
    assert next(text.text for text in chart.texts if text.strong).endswith("…")
