"""The report of a diagnosis of the estimator: what its draws vary by, what bias that makes, and which scheme to use."""

import math
import os
from collections.abc import Mapping, Sequence

from elbo_kto_jax.reports import page
from elbo_kto_jax.reports.markup import DASH, Html, format_number, number, tag
from elbo_kto_jax.reports.svg import SERIES_STYLES, Bar, Series, bar_chart, line_chart
from elbo_kto_jax.runtime.files import atomic_write

_SHOWN_DRAWS = 4  # K of the charts that compare the schemes


def write_diagnosis_report(path: str | os.PathLike, *, title: str, result: Mapping) -> None:
    """Write the page to `path`, atomically; an earlier report there is replaced.

    Args:
        title: heading of the page.
        result: what `diagnose` writes as diagnosis.json. Figures are {"value", "low", "high"}, and None where they do
            not exist.
    """
    rows = result["rows"]
    chosen = next((row for row in rows if (row["scheme"], row["draws"]) == _recommended(result)), None)
    parts = [page.tiles(_key_figures(result, chosen)), *_notices(result)]
    parts += [_gradient(rows), _rewards(rows), _loss(rows), _where(result, chosen or rows[-1]), _tables(result)]
    parts.append(page.section("Details", page.settings_table(result["config"])))
    atomic_write(path, page.render_page(title=title, summary=result["recommendation"]["text"], parts=parts))


def _recommended(result: Mapping) -> tuple:
    return result["recommendation"]["scheme"], result["recommendation"]["draws"]


def _value(figure: Mapping | None, key: str = "value") -> float:
    return number(figure[key]) if figure else math.nan


def _text(figure: Mapping | None) -> str:
    """A figure and its interval."""
    if figure is None or math.isnan(_value(figure)):
        return DASH
    return f"{format_number(_value(figure))} [{format_number(figure['low'])}, {format_number(figure['high'])}]"


def _bar(label: str, figure: Mapping | None, reference: float | None = None) -> Bar:
    return Bar(label, _value(figure), _value(figure, "low"), _value(figure, "high"), reference)


def _of(rows: Sequence[Mapping], scheme: str) -> list[Mapping]:
    return [row for row in rows if row["scheme"] == scheme]


def _schemes(rows: Sequence[Mapping]) -> list[str]:
    return list(dict.fromkeys(row["scheme"] for row in rows))


def _line(name: str, rows: Sequence[Mapping], key: str, factor: str | None = None) -> Series:
    """A figure over the number of draws, times the row's own number `factor`."""
    times = [row[factor] if factor else 1 for row in rows]
    ends = {end: [_value(row[key], end) * t for row, t in zip(rows, times, strict=True)] for end in ("low", "high")}
    values = [_value(row[key]) * t for row, t in zip(rows, times, strict=True)]
    return Series(name, [row["draws"] for row in rows], values, low=ends["low"], high=ends["high"])


def _key_figures(result: Mapping, chosen: Mapping | None) -> list[tuple[str, str, str]]:
    scheme, draws = _recommended(result)
    items = [
        ("Scheme", scheme or DASH, "estimator.scheme"),
        ("Draws", format_number(draws), "estimator.draws"),
    ]
    if chosen:
        items += [
            (
                "Mask noise / signal",
                format_number(_value(result["recommendation"]["noise_over_signal"])),
                "variance of an example's gradient over its squared length",
            ),
            (
                "Gradient variance",
                f"× {format_number(_value(chosen['over_uniform']))}",
                f"that of uniform with {draws} draws",
            ),
            (
                "Sharing masks",
                f"÷ {format_number(_value(chosen['independent_over_shared']))}",
                "variance of the reward, against independent masks",
            ),
            ("Bias of the loss", format_number(_value(chosen["loss_bias"])), _text(chosen["loss_bias"])),
        ]
    items.append(("Records", format_number(result["records"]), f"{format_number(result['masks'])} distinct masks"))
    return items


def _notices(result: Mapping) -> list[Html]:
    if all(_value(row["reward_variance_shared"]) == 0 for row in result["rows"]):
        text = (
            "Every reward is exactly 0, since policy and reference are the same model: the gradient has noise, the "
            "loss and the reference point have none."
        )
        return [page.notice("At the start of training.", text)]
    return []


def _gradient(rows: Sequence[Mapping]) -> Html:
    draws = _SHOWN_DRAWS if any(row["draws"] == _SHOWN_DRAWS for row in rows) else rows[-1]["draws"]
    at = [row for row in rows if row["draws"] == draws]
    twice = [row for row in _of(rows, "uniform") if row["draws"] == 2 * draws]
    mark = _value(twice[0]["gradient_variance"]) if twice else None
    bars = [_bar(row["scheme"], row["gradient_variance"], mark) for row in at]
    # Bernoulli's variance is infinite in expectation, and the other schemes are compared with uniform.
    ranked = sorted(at, key=lambda row: _value(row["gradient_variance"]))
    names = ["uniform", *[row["scheme"] for row in ranked if row["scheme"] != "uniform" and row["finite_variance"]]]
    lines = [_line(name, _of(rows, name), "gradient_variance", "draws") for name in names[:SERIES_STYLES]]
    items = [
        (
            f"Variance of the gradient, {draws} draws",
            bar_chart("Variance of the gradient", bars, x_label="variance of a batch's gradient"),
            f"Sum over all parameters, from the masks alone. Dashed: uniform with {2 * draws} draws, twice the cost.",
        ),
        (
            "Variance times draws",
            line_chart("Variance times draws", lines, x_label="draws (K)", y_label="variance × K", y_from_zero=True),
            "Level where draws are independent; falling where they help each other. Bands: 95%.",
        ),
    ]
    return page.section(
        "Gradient",
        page.figures(items),
        intro="What the choice of masks adds to the gradient of a batch, at equal cost.",
    )


def _rewards(rows: Sequence[Mapping]) -> Html:
    uniform = _of(rows, "uniform")
    lines = [
        _line("shared masks", uniform, "reward_variance_shared"),
        _line("independent masks", uniform, "reward_variance_independent"),
    ]
    draws = _SHOWN_DRAWS if any(row["draws"] == _SHOWN_DRAWS for row in rows) else rows[-1]["draws"]
    bars = [_bar(row["scheme"], row["reward_variance_shared"]) for row in rows if row["draws"] == draws]
    items = [
        (
            "Shared and independent masks",
            line_chart(
                "Variance of the reward", lines, x_label="draws (K)", y_label="variance (nats²)", y_from_zero=True
            ),
            "Uniform draws. Policy and reference see the same masks in training; with masks of its own for each, a "
            "reward would have the upper variance.",
        ),
        (
            f"Variance of the reward, {draws} draws",
            bar_chart("Variance of the reward", bars, x_label="variance (nats²), shared masks"),
            "By scheme, mean over the records.",
        ),
    ]
    return page.section("Rewards", page.figures(items))


def _loss(rows: Sequence[Mapping]) -> Html:
    uniform = _of(rows, "uniform")
    best = min(
        (row for row in rows if row["draws"] == rows[-1]["draws"] and row["finite_variance"]),
        key=lambda row: _value(row["gradient_variance"]),
    )["scheme"]
    lines = [
        _line("uniform, measured", uniform, "loss_bias"),
        _line("uniform, second order", uniform, "loss_bias_predicted"),
    ]
    if best != "uniform":
        lines.append(_line(f"{best}, measured", _of(rows, best), "loss_bias"))
    noise = [_line(name, _of(rows, name), "loss_variance") for name in dict.fromkeys(("uniform", best))]
    items = [
        (
            "Bias of the loss",
            line_chart("Bias of the loss", lines, x_label="draws (K)", y_label="loss per example"),
            "The loss with K draws minus the loss with all draws of all schemes, and what half the curvature of the "
            "value function times the variance of s predicts.",
        ),
        (
            "Variance of the loss",
            line_chart(
                "Variance of the loss", noise, x_label="draws (K)", y_label="variance of a batch", y_from_zero=True
            ),
            "From the masks alone, for a batch of the config's size.",
        ),
    ]
    return page.section("Loss", page.figures(items))


def _where(result: Mapping, row: Mapping) -> Html:
    parts = [b for b in result["breakdown"] if (b["scheme"], b["draws"]) == (row["scheme"], row["draws"])]
    by_count = result["by_count"]
    items = [
        (
            "One draw, by hidden share of the answer",
            bar_chart(
                "Gradient by hidden share",
                [_bar(f"{b['hidden']} hidden", b["gradient_square"]) for b in by_count],
                x_label="squared length of the gradient of a draw",
            ),
            "Where it is large, draws are worth most: importance sampling of l follows its square root.",
        ),
        (
            "Variance of a draw, by hidden share",
            bar_chart(
                "ELBO by hidden share",
                [_bar(f"{b['hidden']} hidden", b["elbo_variance"]) for b in by_count],
                x_label="variance of (L / l) Σ log p at that share (nats²)",
            ),
            "Weights L / l make few hidden tokens noisy; stratified draws do not remove this part.",
        ),
        (
            "Gradient, by label and length",
            bar_chart(
                "Gradient by label and length",
                [_bar(f"{b['bin']} ({b['records']} records)", b["gradient_variance"]) for b in parts],
                x_label="variance of the gradient",
            ),
            f"{row['scheme']}, {row['draws']} draws.",
        ),
        (
            "Reward, by label and length",
            bar_chart(
                "Reward by label and length",
                [_bar(f"{b['bin']} ({b['records']} records)", b["reward_variance_shared"]) for b in parts],
                x_label="variance of the reward (nats²)",
            ),
            f"{row['scheme']}, {row['draws']} draws.",
        ),
    ]
    return page.section("Where the noise is", page.figures(items))


_COLUMNS = {
    "gradient_variance": "gradient variance",
    "over_uniform": "÷ uniform, same draws",
    "over_uniform_twice": "÷ uniform, twice the draws",
    "elbo_variance": "ELBO variance (nats²)",
    "elbo_bias": "ELBO bias (nats)",
    "reward_variance_shared": "reward variance, shared (nats²)",
    "reward_variance_independent": "independent (nats²)",
    "independent_over_shared": "independent ÷ shared",
    "loss_variance": "loss variance",
    "loss_bias": "loss bias",
    "loss_bias_predicted": "predicted",
    "reference_point_bias": "reference point bias (nats)",
    "reference_point_variance": "its variance (nats²)",
    "flops": "FLOPs per example",
    "seconds": "seconds per example",
    "gradient_variance_times_flops": "gradient variance × FLOPs",
    "gradient_variance_times_seconds": "× seconds",
}


def _tables(result: Mapping) -> Html:
    rows = result["rows"]
    cells = [[f"{row['scheme']}, {row['draws']}", *[_text(row[key]) for key in _COLUMNS]] for row in rows]
    caption = (
        f"{result['records']} records, {result['repeats']} sets of masks each; value [95% interval]. Gradient and loss "
        f"are those of a batch of {result['batch_size']} examples; FLOPs and seconds are those of the forward and the "
        "backward pass over an example's draws."
    )
    everything = page.table(("scheme, draws", *_COLUMNS.values()), cells, caption=caption, numeric=True)
    groups = list(rows[0]["gradient_variance_by_group"])
    by_group = page.table(
        ("scheme, draws", *groups),
        [
            [f"{row['scheme']}, {row['draws']}", *[_text(row["gradient_variance_by_group"][group]) for group in groups]]
            for row in rows
        ],
        caption="Variance of the gradient by group of parameters, over all layers.",
        numeric=True,
    )
    breakdown = page.table(
        ("scheme, draws, records", "gradient variance", "reward variance (nats²)", "ELBO variance (nats²)"),
        [
            [
                f"{b['scheme']}, {b['draws']}, {b['bin']}",
                _text(b["gradient_variance"]),
                _text(b["reward_variance_shared"]),
                _text(b["elbo_variance"]),
            ]
            for b in result["breakdown"]
        ],
        caption="By label and by length of the response.",
        numeric=True,
    )
    counts = page.table(
        (
            "hidden share l / L",
            "draws",
            "mean (nats)",
            "variance (nats²)",
            "of the reward (nats²)",
            "gradient, squared",
        ),
        [
            [
                b["hidden"],
                format_number(b["draws"]),
                *[_text(b[key]) for key in ("elbo_mean", "elbo_variance", "reward_variance", "gradient_square")],
            ]
            for b in result["by_count"]
        ],
        caption="Single draws (L / l) Σ log p, by how much of the response is hidden.",
        numeric=True,
    )
    return page.section(
        "Numbers",
        page.folded("Every scheme and number of draws", everything),
        page.folded("Gradient by group of parameters", by_group),
        page.folded("By label and length", breakdown),
        page.folded("By hidden share", counts),
        tag("p", "The same numbers are in table.csv and diagnosis.json.", class_="note"),
    )
