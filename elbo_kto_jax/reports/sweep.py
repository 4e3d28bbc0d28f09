"""The report of a sweep: every metric over the axis of the grid that it was measured along, and the whole table."""

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from elbo_kto_jax.reports.charts import SERIES_STYLES, Bar, Chart, Series, bar_chart, line_chart
from elbo_kto_jax.reports.formatting import DASH, format_number, number
from elbo_kto_jax.reports.page import Figure, KeyNumber, Notice, Table, flattened, write_page

_BARS = 24  # in one chart; the table has them all
_LABEL = 15  # characters that are sure to find room beside a number and its interval


def write_sweep_report(
    path: str | os.PathLike,
    *,
    title: str,
    config: Mapping,
    rows: Sequence[Mapping],
    cells: int,
    done: int,
) -> None:
    """Write the page to `path`, atomically; an earlier report there is replaced, since it shows the same sweep.

    Args:
        title: heading of the page.
        config: the resolved config, nested.
        rows: one per metric of a cell that is done: "checkpoint", "task", "sampler" (JSON; None where nothing is
            sampled), "draws" (None where it does not apply), "metric", "value", "low", "high" and "seconds".
        cells: of the whole grid.
        done: of them, how many have been evaluated.
    """
    groups = itertools.groupby(sorted(rows, key=_metric_key), key=_metric_key)
    left = f"{cells - done} of {cells} cells are still to be evaluated."
    write_page(
        path,
        "sweep.html.j2",
        title=title,
        summary=_in_one_sentence(rows, cells, done),
        key_numbers=_key_numbers(rows, cells, done),
        notices=[Notice("Not complete.", left)] if done < cells else [],
        figures=[figure for _, group in groups for figure in _figures(list(group))],
        table=_table(rows),
        settings=flattened(config),
    )


def _in_one_sentence(rows: Sequence[Mapping], cells: int, done: int) -> str:
    tasks, checkpoints = _distinct(rows, "task"), _distinct(rows, "checkpoint")
    return (
        f"{done} of {_counted(cells, 'evaluation')} done: {_counted(len(checkpoints), 'checkpoint')}, "
        f"{_counted(len(tasks), 'task')}."
    )


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _key_numbers(rows: Sequence[Mapping], cells: int, done: int) -> list[KeyNumber]:
    seconds = {row["cell"]: number(row.get("seconds")) for row in rows}
    return [
        KeyNumber("Cells", format_number(cells), f"{format_number(done)} done"),
        KeyNumber("Checkpoints", format_number(len(_distinct(rows, "checkpoint")))),
        KeyNumber("Tasks", format_number(len(_distinct(rows, "task")))),
        KeyNumber("Hours", format_number(sum(seconds.values()) / 3600), "of evaluation, over all cells"),
    ]


def _distinct(rows: Sequence[Mapping], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def _metric_key(row: Mapping) -> tuple[str, str, bool]:
    return str(row["task"]), str(row["metric"]), row["draws"] is None


def _figures(rows: list[Mapping]) -> list[Figure]:
    """One metric of one task: a line for each checkpoint along an axis of numbers, else bars.

    Bars have room for short labels only: they compare the checkpoints at one setting, a chart for each setting, or the
    settings of the one checkpoint that there is.
    """
    heading = f"{PurePath(str(rows[0]['task'])).name}: {rows[0]['metric']}"
    names = _short_names(_distinct(rows, "checkpoint"))
    axis, values = _number_axis(rows)
    if axis and len(names) <= SERIES_STYLES:
        return [Figure(heading, _lines(rows, names, axis, values), f"Over {axis}.")]
    if len(names) == 1:
        chart = _bars([(_setting(row), row) for row in rows])
        return [Figure(heading, chart, f"Of {next(iter(names))}, a bar for each setting.{_more(rows)}")]
    figures = []
    for setting in dict.fromkeys(_setting(row) for row in rows):
        own = [row for row in rows if _setting(row) == setting]
        chart = _bars([(names[row["checkpoint"]], row) for row in own])
        whole = f"From the top: {', '.join(names.values())}." if max(map(len, names.values())) > _LABEL else ""
        figures.append(Figure(f"{heading}, {setting}", chart, f"{whole}{_more(own)}".strip()))
    return figures


def _number_axis(rows: Sequence[Mapping]) -> tuple[str, list[float]]:
    """The one number in which the settings of the rows differ: its name and its value in each; "" without."""
    settings = [{"draws K": row["draws"]} if row["draws"] else json.loads(row["sampler"] or "{}") for row in rows]
    keys = {key for setting in settings for key in setting}
    if len(keys) != 1 or {} in settings:  # what {} means depends on the task
        return "", []
    (key,) = keys
    values = [number(setting[key]) for setting in settings]
    return (key, values) if len(set(values)) > 1 and not any(map(math.isnan, values)) else ("", [])


def _lines(rows: Sequence[Mapping], names: Mapping[str, str], axis: str, values: Sequence[float]) -> Chart:
    series = []
    for checkpoint, name in names.items():
        own = sorted((x, i) for i, x in enumerate(values) if rows[i]["checkpoint"] == checkpoint)
        y, low, high = ([rows[i][key] for _, i in own] for key in ("value", "low", "high"))
        series.append(Series(name, [x for x, _ in own], y, low=low, high=high))
    return line_chart(series, x_label=axis, y_label=str(rows[0]["metric"]))


def _bars(labelled: Sequence[tuple[str, Mapping]]) -> Chart:
    bars = [Bar(label, row["value"], row["low"], row["high"]) for label, row in labelled[:_BARS]]
    is_share = all(0 <= number(row["value"]) <= 1 for _, row in labelled)
    return bar_chart(bars, x_label=str(labelled[0][1]["metric"]), x_max=1.0 if is_share else None)


def _more(rows: Sequence[Mapping]) -> str:
    return f" The first {_BARS} of {len(rows)}." if len(rows) > _BARS else ""


def _setting(row: Mapping) -> str:
    """What a cell sets, for people."""
    if row["draws"] is not None:
        return f"K={row['draws']}"
    if row["sampler"] is None:
        return "Nothing is drawn"
    return ", ".join(f"{key}={value}" for key, value in json.loads(row["sampler"]).items()) or "As configured"


def _short_names(checkpoints: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or the whole where several have the same."""
    last = [PurePath(checkpoint).name for checkpoint in checkpoints]
    short = zip(checkpoints, last, strict=True)
    return {checkpoint: name if last.count(name) == 1 else checkpoint for checkpoint, name in short}


def _table(rows: Sequence[Mapping]) -> Table:
    header = ("Checkpoint", "Task", "Sampler", "K", "Metric", "Value", "95% interval", "Seconds")
    cells = [
        (
            row["checkpoint"],
            PurePath(str(row["task"])).name,
            DASH if row["sampler"] is None else _setting(row),
            DASH if row["draws"] is None else row["draws"],
            row["metric"],
            format_number(row["value"]),
            _interval(number(row["low"]), number(row["high"])),
            format_number(row["seconds"]),
        )
        for row in rows
    ]
    return Table(header, cells, "All figures; the same in table.csv and table.md.", stacked=True)


def _interval(low: float, high: float) -> str:
    return DASH if math.isnan(low) or math.isnan(high) else f"{format_number(low)} to {format_number(high)}"
