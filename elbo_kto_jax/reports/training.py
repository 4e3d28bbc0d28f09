"""The report of a training run: curves, samples before and after, settings (workdir/report.html)."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from elbo_kto_jax.reports.axes import without_outliers
from elbo_kto_jax.reports.charts import Series, line_chart
from elbo_kto_jax.reports.formatting import DASH, format_number, number
from elbo_kto_jax.reports.page import Figure, KeyNumber, Notice, Sample, Table, conversation, flattened, write_page

_SMOOTH_ABOVE = 60  # logged steps; a shorter run is drawn as it is
_TABLE_ROWS = 40
_END = 0.1  # of a run: what one step says is mostly noise, so the numbers on top are means over the end of each curve


@dataclass(frozen=True)
class _Chart:
    """One figure: which metrics it draws under which names."""

    heading: str
    series: Mapping[str, str]  # metric -> name in the legend
    unit: str
    caption: str
    y_from_zero: bool = False
    smooth: bool = True


_CHARTS = (
    _Chart(
        "Rewards",
        {"reward_desirable": "desirable", "reward_undesirable": "undesirable", "reference_point": "reference point"},
        "nats",
        "How much likelier (as an ELBO, per response) the model finds the answers than the reference model does. "
        "The lines should separate, desirable above undesirable.",
    ),
    _Chart(
        "Reward margin",
        {"reward_margin": "training", "eval_reward_margin": "held out"},
        "nats",
        "Mean reward of desirable minus that of undesirable answers: zero at the start, higher is better.",
    ),
    _Chart(
        "Accuracy",
        {"accuracy": "training", "eval_accuracy": "held out"},
        "fraction of the pairs",
        "Pairs of which the model has come to prefer the chosen answer, compared with the reference model. A half is "
        "chance.",
        y_from_zero=True,
    ),
    _Chart(
        "Loss",
        {"loss": "training", "eval_loss": "held out"},
        "loss per example",
        "The objective that training minimises. Held out rising while training falls is overfitting.",
    ),
    _Chart(
        "Saturated examples",
        {"saturated_fraction": "saturated fraction"},
        "fraction of the batch",
        "Examples whose sigmoid is flat, so that they hardly move the model any more. Near 1, training has stalled.",
        y_from_zero=True,
    ),
    _Chart(
        "Gradient norm",
        {"grad_norm": "gradient norm"},
        "global norm before clipping",
        "Isolated peaks are clipped; a steady rise is a warning.",
        y_from_zero=True,
    ),
    _Chart(
        "Noise of the rewards",
        {"reward_variance": "variance from the masks"},
        "nats²",
        "How far a reward would move with other masks, from the spread of its draws as if they were independent: an "
        "upper bound for schemes that spread them on purpose.",
        y_from_zero=True,
    ),
    _Chart(
        "Draws needed",
        {"draws_needed": "draws needed"},
        "draws (K)",
        "At so many independent draws the masks would add a tenth of the variance of rewards between examples. "
        "`diagnose` measures what the scheme makes of it.",
        y_from_zero=True,
    ),
    _Chart(
        "Gradient noise scale",
        {"gradient_noise_scale": "noise scale"},
        "examples",
        "The batch size at which a gradient is half noise, from Adam's moments: masks and the choice of examples both "
        "count. Far above the batch size, larger batches or more draws pay; far below, they do not.",
        y_from_zero=True,
    ),
    _Chart(
        "Learning rate",
        {"learning_rate": "learning rate"},
        "learning rate",
        "The schedule as it was applied.",
        y_from_zero=True,
        smooth=False,
    ),
    _Chart(
        "Throughput",
        {"tokens_per_second": "throughput"},
        "tokens per second",
        "Between one logged step and the next, over all devices; compilation, checkpoints and evaluation show as dips.",
        y_from_zero=True,
    ),
    _Chart(
        "Useful tokens",
        {"real_token_fraction": "real tokens"},
        "fraction of all positions",
        "Positions that hold text, not padding.",
        y_from_zero=True,
    ),
)
_OBJECTIVE = ("loss", "reward_desirable", "reward_undesirable", "reward_margin", "reference_point", "grad_norm")


def write_training_report(
    path: str | os.PathLike,
    *,
    title: str,
    config: Mapping,
    metrics: Sequence[Mapping],
    samples: Sequence[Mapping],
    summary: Mapping,
) -> None:
    """Write the page to `path`, atomically; an earlier report there is replaced, since it shows the same run.

    Args:
        title: heading of the page.
        config: the resolved config, nested.
        metrics: the lines of metrics.jsonl in the order written. A step logged twice (training that went on from an
            earlier checkpoint) counts as logged last. A metric that no line has is left out (SFT has no rewards); null,
            NaN and infinities are gaps, and are reported. `tokens` and `seconds` are totals since the start of the run.
        samples: {"prompt", "before", "after"}, texts; the prompt may be messages.
        summary: the command's summary; every key is optional.
    """
    metrics = in_step_order(metrics)
    write_page(
        path,
        "training.html.j2",
        title=title,
        summary=_in_one_sentence(metrics, summary),
        key_numbers=_key_numbers(metrics, summary),
        notices=_notices(metrics, summary),
        checkpoint=summary.get("checkpoint"),
        best=summary.get("best_checkpoint"),
        window=_window(len(metrics)),
        figures=curves(metrics),
        samples=[_sample(one) for one in samples],
        changed=sum(str(one.get("before")) != str(one.get("after")) for one in samples),
        numbers=_numbers_table(metrics) if metrics else None,
        settings=flattened(config),
    )


def in_step_order(metrics: Sequence[Mapping]) -> list[dict]:
    """One line per step, in order, with the throughput since the line before."""
    by_step = {number(line.get("step")): line for line in metrics}
    lines = [dict(by_step[step]) for step in sorted(step for step in by_step if not math.isnan(step))]
    for before, line in itertools.pairwise(lines):
        tokens = number(line.get("tokens")) - number(before.get("tokens"))
        seconds = number(line.get("seconds")) - number(before.get("seconds"))
        # A counter that went back is a restart, not a speed.
        if tokens >= 0 and seconds > 0:
            line["tokens_per_second"] = tokens / seconds
    return lines


def _column(metrics: Sequence[Mapping], key: str) -> np.ndarray:
    return np.array([number(line.get(key)) for line in metrics])


def _last(metrics: Sequence[Mapping], summary: Mapping, key: str) -> float:
    """The summary's value, or else the last finite one logged."""
    value = number(summary.get(key))
    finite = [v for v in _column(metrics, key) if math.isfinite(v)]
    return value if math.isfinite(value) or not finite else finite[-1]


def mean_of_end(metrics: Sequence[Mapping], key: str) -> tuple[float, int]:
    """The mean of the last `_END` of the finite values logged, and of how many it is; (NaN, 0) without any."""
    finite = [v for v in _column(metrics, key) if math.isfinite(v)]
    last = finite[-math.ceil(_END * len(finite)) :] if finite else []
    return (math.fsum(v / len(last) for v in last), len(last)) if last else (math.nan, 0)


def _first(metrics: Sequence[Mapping], key: str) -> tuple[float, float]:
    """(value, step) of the first finite value logged."""
    for line in metrics:
        if math.isfinite(number(line.get(key))):
            return number(line[key]), number(line["step"])
    return math.nan, math.nan


def _in_one_sentence(metrics: Sequence[Mapping], summary: Mapping) -> str:
    if not metrics:
        return "No step has been logged yet."
    changes = []
    for key, name, unit in (("reward_margin", "the reward margin", " nats"), ("loss", "the loss", "")):
        first, last = _first(metrics, key)[0], mean_of_end(metrics, key)[0]
        if math.isfinite(last):
            start = f"went from {format_number(first)} to" if len(metrics) > 1 and math.isfinite(first) else "was"
            changes.append(f"{name} {start} {format_number(last)}{unit}")
    examples = _whole(_last(metrics, summary, "examples"))
    steps = _whole(_steps(metrics, summary))
    plural = "" if steps == "1" else "s"
    work = f"{steps} step{plural}" + (f" over {examples} examples" if examples != DASH else "")
    return f"In {work}, {' and '.join(changes)}." if changes else f"{work}; no finite loss was logged."


def _steps(metrics: Sequence[Mapping], summary: Mapping) -> float:
    steps = number(summary.get("steps"))
    return steps if math.isfinite(steps) or not metrics else number(metrics[-1]["step"])


def _whole(value: float) -> str:
    return DASH if math.isnan(value) else format_number(round(value))


def _key_numbers(metrics: Sequence[Mapping], summary: Mapping) -> list[KeyNumber]:
    items = []
    for key, label, unit in (("reward_margin", "Reward margin", "nats"), ("loss", "Loss", "")):
        last, count = mean_of_end(metrics, key)
        first, step = _first(metrics, key)
        if math.isfinite(last):
            mean = f"mean of the last {count} logged steps; " if count > 1 else ""
            note = f"{mean}{format_number(first)} at step {_whole(step)}" if len(metrics) > 1 else ""
            items.append(KeyNumber(label, f"{format_number(last)} {unit}".strip(), note))
    items.append(KeyNumber("Steps", _whole(_steps(metrics, summary))))
    tokens = _last(metrics, summary, "tokens")
    note = f"{_whole(tokens)} tokens" if math.isfinite(tokens) else ""
    items.append(KeyNumber("Examples", _whole(_last(metrics, summary, "examples")), note))
    if math.isfinite(number(summary.get("epochs"))):
        counts = summary.get("data") or {}
        note = f"over {_whole(number(counts['examples']))} examples" if "examples" in counts else ""
        items.append(KeyNumber("Epochs", format_number(summary["epochs"]), note))
    if summary.get("best_step"):
        note = f"{summary.get('best_metric')}, at step {_whole(number(summary['best_step']))}"
        items.append(KeyNumber("Best held out", format_number(summary.get("best_value")), note))
    for key, label in (("examples_per_second", "Examples / second"), ("tokens_per_second", "Tokens / second")):
        value = number(summary.get(key))
        if math.isfinite(value):
            items.append(KeyNumber(label, format_number(value)))
    return items


def _notices(metrics: Sequence[Mapping], summary: Mapping) -> list[Notice]:
    notices = []
    if summary.get("interrupted"):
        text = "The run was saved before its end; the same command goes on from there."
        notices.append(Notice("Interrupted.", text))
    if summary.get("stopped_early"):
        text = "Held-out data did not get better for so many evaluations as train.patience says; a larger one goes on."
        notices.append(Notice("Stopped early.", text))
    for key, name in (("data", "Training data"), ("eval_data", "Held-out data")):
        if lost := _lost(summary.get(key) or {}):
            notices.append(Notice(f"{name}: not all of it was used.", f"{lost}; the log says why."))
    for key in _OBJECTIVE:
        logged = [line for line in metrics if key in line]
        bad = [line for line in logged if not math.isfinite(number(line[key]))]
        # A batch may hold no example of one label: a missing reward is normal, a missing loss is not.
        if bad and (key in ("loss", "grad_norm") or len(bad) == len(logged)):
            where = f"at {len(bad)} of {len(logged)} logged steps, first at step {_whole(number(bad[0]['step']))}"
            notices.append(Notice("Not finite.", f"{key} is missing, NaN or infinite {where}."))
    return notices


def _lost(counts: Mapping) -> str:
    """What of a data set was lost without having been asked for, in words."""
    records, examples = (_whole(number(counts.get(key))) for key in ("records", "examples"))
    words = {
        "skipped": "{} bad records were skipped",
        "dropped": f"{{}} of {records} records were dropped",
        "cut": f"{{}} of {examples} examples were cut at data.max_length",
    }
    return ", ".join(text.format(_whole(number(counts[key]))) for key, text in words.items() if counts.get(key))


def curves(metrics: Sequence[Mapping]) -> list[Figure]:
    """A figure for each chart of which something was logged; `metrics` are `in_step_order`."""
    figures = []
    for chart in _CHARTS:
        series = []
        for key, name in chart.series.items():
            # A line without the key was not measured (evaluation, now and then), which is no gap; null and NaN are.
            logged = [line for line in metrics if key in line]
            if logged:
                window = _window(len(logged)) if chart.smooth else 1
                series.append(_smoothed(name, _column(logged, "step"), _column(logged, key), window))
        if series:
            drawn = line_chart(series, x_label="step", y_label=chart.unit, y_from_zero=chart.y_from_zero)
            figures.append(Figure(chart.heading, drawn, chart.caption))
    return figures


def _window(count: int) -> int:
    """Over how many of `count` logged values to smooth (odd); 1: not at all."""
    return max(3, 2 * (count // 60) + 1) if count > _SMOOTH_ABOVE else 1


def _smoothed(name: str, steps: np.ndarray, values: np.ndarray, window: int) -> Series:
    """Running mean over a window (odd, centred, shorter at the ends) before the values themselves; gaps stay gaps."""
    if window == 1:
        return Series(name, steps, values)
    # What the chart draws at its edge counts as much as the edge: else one outlier would be seen in a whole window.
    usual = np.clip(values, *without_outliers(values)) if np.isfinite(values).any() else values
    windows = sliding_window_view(np.pad(usual, window // 2, constant_values=np.nan), window)
    present = np.isfinite(windows)
    # Divided before the sum, so that values near the largest float do not overflow.
    mean = np.sum(np.where(present, windows, 0.0) / np.maximum(present.sum(axis=1, keepdims=True), 1), axis=1)
    return Series(name, steps, np.where(np.isfinite(values), mean, np.nan), raw=values)


def _sample(one: Mapping) -> Sample:
    before, after = one.get("before"), one.get("after")
    badges = [("unchanged", False)] if str(before) == str(after) else []
    return Sample(conversation(one.get("prompt")), [("Before", before), ("After", after)], badges)


def _numbers_table(metrics: Sequence[Mapping]) -> Table:
    keys = ["step", *dict.fromkeys(key for line in metrics for key in line if key != "step")]
    rows = np.unique(np.linspace(0, len(metrics) - 1, min(len(metrics), _TABLE_ROWS)).round().astype(int))
    cells = [[format_number(metrics[row].get(key)) for key in keys] for row in rows]
    caption = f"{len(rows)} of {len(metrics)} logged steps, evenly spaced; all are in metrics.jsonl."
    return Table(keys, cells, caption, numeric=True)
