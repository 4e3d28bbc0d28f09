"""The report of a diagnosis of the estimator: what its draws vary by, what bias that makes, and which scheme to use."""

import math
import os
from collections.abc import Mapping, Sequence

from elbo_kto_jax.reports.charts import SERIES_STYLES, Bar, Chart, Series, bar_chart, line_chart
from elbo_kto_jax.reports.formatting import DASH, format_number, number
from elbo_kto_jax.reports.page import KeyNumber, Notice, Table, flattened, write_page

_SHOWN_DRAWS = 4  # K of the charts that compare the schemes, where it was measured


def write_diagnosis_report(path: str | os.PathLike, *, title: str, result: Mapping) -> None:
    """Write the page to `path`, atomically; an earlier report there is replaced.

    Args:
        title: heading of the page.
        result: what `diagnose` writes as diagnosis.json. Figures are {"value", "low", "high"}, and None where they do
            not exist.
    """
    rows = result["rows"]
    chosen = next((row for row in rows if (row["scheme"], row["draws"]) == _recommended(result)), None)
    where = chosen or rows[-1]
    draws = _shown_draws(rows)
    write_page(
        path,
        "diagnosis.html.j2",
        title=title,
        summary=result["recommendation"]["text"],
        key_numbers=_key_numbers(result, chosen),
        notices=_notices(result),
        draws=draws,
        charts={**_gradient(rows, draws), **_rewards(rows, draws), **_loss(rows), **_where(result, where)},
        setting=f"{where['scheme']}, {where['draws']} draws",
        everything=_everything(result),
        by_group=_by_group(rows),
        by_label=_by_label(result["breakdown"]),
        by_count=_by_count(result["by_count"]),
        settings=flattened(result["config"]),
    )


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


def _line(name: str, rows: Sequence[Mapping], key: str, factor: str | None = None) -> Series:
    """A figure over the number of draws, times the row's own number `factor`."""
    times = [row[factor] if factor else 1 for row in rows]
    ends = {end: [_value(row[key], end) * t for row, t in zip(rows, times, strict=True)] for end in ("low", "high")}
    values = [_value(row[key]) * t for row, t in zip(rows, times, strict=True)]
    return Series(name, [row["draws"] for row in rows], values, low=ends["low"], high=ends["high"])


def _shown_draws(rows: Sequence[Mapping]) -> int:
    """K of the charts that compare the schemes."""
    return _SHOWN_DRAWS if any(row["draws"] == _SHOWN_DRAWS for row in rows) else rows[-1]["draws"]


def _key_numbers(result: Mapping, chosen: Mapping | None) -> list[KeyNumber]:
    scheme, draws = _recommended(result)
    records = KeyNumber("Records", format_number(result["records"]), f"{format_number(result['masks'])} distinct masks")
    items = [
        KeyNumber("Scheme", scheme or DASH, "estimator.scheme"),
        KeyNumber("Draws", format_number(draws), "estimator.draws"),
    ]
    if not chosen:
        return [*items, records]
    noise = format_number(_value(result["recommendation"]["noise_over_signal"]))
    variance = f"× {format_number(_value(chosen['over_uniform']))}"
    sharing = f"÷ {format_number(_value(chosen['independent_over_shared']))}"
    return [
        *items,
        KeyNumber("Mask noise / signal", noise, "variance of an example's gradient over its squared length"),
        KeyNumber("Gradient variance", variance, f"that of uniform with {draws} draws"),
        KeyNumber("Sharing masks", sharing, "variance of the reward, against independent masks"),
        KeyNumber("Bias of the loss", format_number(_value(chosen["loss_bias"])), _text(chosen["loss_bias"])),
        records,
    ]


def _notices(result: Mapping) -> list[Notice]:
    if all(_value(row["reward_variance_shared"]) == 0 for row in result["rows"]):
        text = (
            "Every reward is exactly 0, since policy and reference are the same model: the gradient has noise, the "
            "loss and the reference point have none."
        )
        return [Notice("At the start of training.", text)]
    return []


def _gradient(rows: Sequence[Mapping], draws: int) -> dict[str, Chart]:
    at = [row for row in rows if row["draws"] == draws]
    twice = [row for row in _of(rows, "uniform") if row["draws"] == 2 * draws]
    mark = _value(twice[0]["gradient_variance"]) if twice else None
    bars = [_bar(row["scheme"], row["gradient_variance"], mark) for row in at]
    # Bernoulli's variance is infinite in expectation, and the other schemes are compared with uniform.
    ranked = sorted(at, key=lambda row: _value(row["gradient_variance"]))
    names = ["uniform", *[row["scheme"] for row in ranked if row["scheme"] != "uniform" and row["finite_variance"]]]
    lines = [_line(name, _of(rows, name), "gradient_variance", "draws") for name in names[:SERIES_STYLES]]
    return {
        "gradient": bar_chart(bars, x_label="variance of a batch's gradient"),
        "times_draws": line_chart(lines, x_label="draws (K)", y_label="variance × K", y_from_zero=True),
    }


def _rewards(rows: Sequence[Mapping], draws: int) -> dict[str, Chart]:
    uniform = _of(rows, "uniform")
    lines = [
        _line("shared masks", uniform, "reward_variance_shared"),
        _line("independent masks", uniform, "reward_variance_independent"),
    ]
    bars = [_bar(row["scheme"], row["reward_variance_shared"]) for row in rows if row["draws"] == draws]
    return {
        "sharing": line_chart(lines, x_label="draws (K)", y_label="variance (nats²)", y_from_zero=True),
        "reward": bar_chart(bars, x_label="variance (nats²), shared masks"),
    }


def _loss(rows: Sequence[Mapping]) -> dict[str, Chart]:
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
    return {
        "bias": line_chart(lines, x_label="draws (K)", y_label="loss per example"),
        "loss": line_chart(noise, x_label="draws (K)", y_label="variance of a batch", y_from_zero=True),
    }


def _where(result: Mapping, row: Mapping) -> dict[str, Chart]:
    """By hidden share, and for the setting of `row` by label and length."""
    parts = [b for b in result["breakdown"] if (b["scheme"], b["draws"]) == (row["scheme"], row["draws"])]
    named = [(f"{b['bin']} ({b['records']} records)", b) for b in parts]
    hidden = [(f"{b['hidden']} hidden", b) for b in result["by_count"]]
    return {
        name: bar_chart([_bar(label, b[key]) for label, b in labelled], x_label=x_label)
        for name, labelled, key, x_label in (
            ("draw_gradient", hidden, "gradient_square", "squared length of the gradient of a draw"),
            ("draw_variance", hidden, "elbo_variance", "variance of (L / l) Σ log p at that share (nats²)"),
            ("label_gradient", named, "gradient_variance", "variance of the gradient"),
            ("label_reward", named, "reward_variance_shared", "variance of the reward (nats²)"),
        )
    }


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


_BY_LABEL = {
    "gradient_variance": "gradient variance",
    "reward_variance_shared": "reward variance (nats²)",
    "elbo_variance": "ELBO variance (nats²)",
}
_BY_COUNT = {
    "elbo_mean": "mean (nats)",
    "elbo_variance": "variance (nats²)",
    "reward_variance": "of the reward (nats²)",
    "gradient_square": "gradient, squared",
}


def _everything(result: Mapping) -> Table:
    caption = (
        f"{result['records']} records, {result['repeats']} sets of masks each; value [95% interval]. Gradient and loss "
        f"are those of a batch of {result['batch_size']} examples; FLOPs and seconds are those of the forward and the "
        "backward pass over an example's draws."
    )
    cells = [[f"{row['scheme']}, {row['draws']}", *[_text(row[key]) for key in _COLUMNS]] for row in result["rows"]]
    return Table(("scheme, draws", *_COLUMNS.values()), cells, caption, numeric=True)


def _by_group(rows: Sequence[Mapping]) -> Table:
    groups = list(rows[0]["gradient_variance_by_group"])
    cells = [
        [f"{row['scheme']}, {row['draws']}", *[_text(row["gradient_variance_by_group"][group]) for group in groups]]
        for row in rows
    ]
    caption = "Variance of the gradient by group of parameters, over all layers."
    return Table(("scheme, draws", *groups), cells, caption, numeric=True)


def _by_label(breakdown: Sequence[Mapping]) -> Table:
    cells = [[f"{b['scheme']}, {b['draws']}, {b['bin']}", *[_text(b[key]) for key in _BY_LABEL]] for b in breakdown]
    header = ("scheme, draws, records", *_BY_LABEL.values())
    return Table(header, cells, "By label and by length of the response.", numeric=True)


def _by_count(by_count: Sequence[Mapping]) -> Table:
    cells = [[b["hidden"], format_number(b["draws"]), *[_text(b[key]) for key in _BY_COUNT]] for b in by_count]
    caption = "Single draws (L / l) Σ log p, by how much of the response is hidden."
    return Table(("hidden share l / L", "draws", *_BY_COUNT.values()), cells, caption, numeric=True)
