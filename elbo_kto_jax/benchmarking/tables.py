"""A benchmark's result as tables for a terminal, and as one self-contained page."""

from pathlib import Path

from elbo_kto_jax.reports.charts import Bar, bar_chart
from elbo_kto_jax.reports.page import Figure, Table, flattened, write_page
from elbo_kto_jax.runtime import terminal

_WORK = {"train": "training step", "reference": "reference pass"}
_VARIANTS = {
    "device": "ours, one pass",
    "host": "ours, one pass, residuals on the host",
    "recompute": "ours, two passes",
}
_NOTE = (
    "Useful FLOPs: real tokens and hidden positions only, three forward passes' worth for a training step. "
    "In brackets: lowest and highest ratio of the rounds."
)


def as_text(result: dict) -> str:
    """The tables for a terminal."""
    tables = [(_header(result), _rows(result)), (_memory_header(result), _memory_rows(result))]
    if result["differences"]:
        tables.append((_DIFFERENCES, _difference_rows(result)))
    return "".join(f"{terminal.table(*table)}\n\n" for table in tables)


def write_report(path: Path, result: dict) -> None:
    """One self-contained page."""
    figures = []
    for work, name in _WORK.items():
        bars = [Bar(label, found["seconds_per_example"]) for label, found in _figures(result, work).values()]
        chart = bar_chart(bars, x_label="seconds per example")
        figures.append(Figure(name.capitalize(), chart, "Medians; shorter is better."))
    bars = [
        Bar(f"{label}, {k}", size / 1e6)
        for label, sizes in _memory(result).items()
        for k, size in sizes.items()
        if size is not None
    ]
    figures.append(Figure("Peak memory", bar_chart(bars, x_label="MB"), "Of one training step."))
    tables = [Table(_header(result), _rows(result), _NOTE, numeric=True)]
    tables.append(Table(_memory_header(result), _memory_rows(result), numeric=True))
    if result["differences"]:
        tables.append(Table(_DIFFERENCES, _difference_rows(result), numeric=True))
    write_page(
        path,
        "benchmark.html.j2",
        title="Benchmark",
        summary=_in_one_sentence(result),
        figures=figures,
        tables=tables,
        settings=flattened(result["setting"]),
    )


def _labels(result: dict) -> dict[str, str]:
    """What the sides are called; our step by where it keeps its residuals, where another way stands beside it."""
    ours = _VARIANTS[result["setting"]["residuals"]] if len(result["memory"].keys() & _VARIANTS.keys()) else "ours"
    peers = {
        "padded": "peer, padded",
        "true": "peer, true length",
        "equal": "peer, padded, uniform K = 8 (variance as ours)",
        "peer": "peer, padded",
    }
    return {"ours": ours, **_VARIANTS, **peers}


def _figures(result: dict, work: str) -> dict[str, tuple[str, dict]]:
    """Side -> its label and figures, of all that did the work."""
    sides = {"ours": result["ours"], **result["variants"], **result["peer"]}
    labels = _labels(result) | ({} if work == "train" else {"ours": "ours"})
    return {side: (labels[side], found[work]) for side, found in sides.items() if work in found}


def _header(result: dict) -> tuple[str, ...]:
    faster = (f"{_VARIANTS[side]}, is faster by" for side in result["variants"])
    return "", "s/example", "real tokens/s", "useful TFLOP/s", "of matrix peak", "ours is faster by", *faster


def _rows(result: dict) -> list[tuple[str, ...]]:
    ratios = [result["ratios"], *(found["ratios"] for found in result["variants"].values())]
    mark = " (NOT THE SAME WORK)" if result["agrees"] is False else ""
    return [
        (
            f"{_WORK[work]}, {label}{mark}",
            f"{found['seconds_per_example']:.3f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['flops'] / 1e12:.3g}",
            f"{found['fraction_of_peak']:.0%}",
            *(_times(ratio.get(side, {}).get(work)) for ratio in ratios),
        )
        for work in _WORK
        for side, (label, found) in _figures(result, work).items()
    ]


def _times(ratio: dict | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _memory(result: dict) -> dict[str, dict]:
    """Label -> bytes by number of draws."""
    labels = _labels(result)
    return {labels[side]: sizes for side, sizes in result["memory"].items()}


def _memory_header(result: dict) -> tuple[str, ...]:
    return "", *next(iter(result["memory"].values()), {})


def _memory_rows(result: dict) -> list[tuple[str, ...]]:
    return [
        (
            f"peak memory, {label}",
            *("does not fit" if size is None else f"{size / 1e6:,.0f} MB" for size in sizes.values()),
        )
        for label, sizes in _memory(result).items()
    ]


_DIFFERENCES = ("largest difference from the peer, in units of what rounding allows", "ours", "peer", "allowed", "")


def _difference_rows(result: dict) -> list[tuple[str, ...]]:
    labels = _labels(result)
    return [
        (
            f"{found['what']}, {labels[found['side']]}",
            f"{found['ours']:.8g}",
            f"{found['peer']:.8g}",
            f"{found['allowance']:.2g}",
            "agrees" if found["agrees"] else "DIFFERS",
        )
        for found in result["differences"]
    ]


def _in_one_sentence(result: dict) -> str:
    setting, seconds = result["setting"], result["ours"]["train"]["seconds_per_example"]
    device = f"{setting['cores']} cores" if setting["platform"] == "cpu" else setting["device"]
    what = f"{setting['records']} records, K = {setting['draws']}, rows of {setting['max_length']} tokens, {device}"
    if result["ratio"] is None:
        return f"A training step takes {seconds:.3f} s per example ({what})."
    times = f"{result['ratio']:.1f} times as long"
    alarm = "" if result["agrees"] else " The two did not compute the same, so that the ratio says nothing."
    return f"A training step takes {seconds:.3f} s per example, the padded peer {times} ({what}).{alarm}"
