"""The report of a plan: memory, time and traffic of a run on TPUs that were not asked."""

import os
from collections.abc import Mapping, Sequence

from elbo_kto_jax.reports.charts import Bar, Chart, bar_chart
from elbo_kto_jax.reports.formatting import DASH, format_number
from elbo_kto_jax.reports.page import KeyNumber, Table, flattened, write_page
from elbo_kto_jax.runtime import terminal

_GIB = 2**30
_SECONDS = {
    "compute": "compute",
    "overlapped": "traffic beside it",
    "exposed": "traffic it waits for",
}
_MEMORY = ("program", "arguments", "temporaries", "aliased", "host", "beside it", "in all")
_TIME = ("program", "TFLOP", "compute (s)", "HBM (s)", "overlapped (s)", "exposed (s)", "in all (s)", "compiled in (s)")
_TRAFFIC = ("program", "collective", "overlapped (GB)", "exposed (GB)")


def write_plan_report(path: str | os.PathLike, plan: Mapping) -> None:
    """Writes the page of `plan` (elbo_kto_jax/planning/plan.py) to `path`, atomically."""
    settings = {
        key: plan[key] for key in ("versions", "topology", "mesh", "settings", "step", "data", "assumed", "model")
    }
    write_page(
        path,
        "plan.html.j2",
        title=f"Plan for {plan['topology']}",
        summary=in_one_sentence(plan),
        key_numbers=_key_numbers(plan),
        memory=_memory(plan),
        time=_time(plan["programs"]),
        tables=[
            Table(_MEMORY, memory_rows(plan), f"GiB per chip. {_compiled_by(plan)}", numeric=True),
            Table(_TIME, time_rows(plan), "One run on one chip; bounds, not measured.", numeric=True),
            Table(_TRAFFIC, traffic_rows(plan), "Sent by one chip in one run.", numeric=True),
        ],
        tried=Table(_TRIED, tried_rows(plan), numeric=True) if plan["tried"] else None,
        settings=flattened(settings),
    )


def _key_numbers(plan: Mapping) -> list[KeyNumber]:
    fits = f"{_gib(plan['bytes_per_chip'])} of {_gib(plan['usable_bytes_per_chip'])} GiB"
    return [
        KeyNumber("Fits", "yes" if plan["fits"] else "no", fits),
        KeyNumber("MFU", f"≤ {plan['mfu_bound']:.2f}", "bound, not measured"),
        KeyNumber("Text MFU", f"≤ {plan['text_mfu_bound']:.2f}", "of it, what goes into text"),
        KeyNumber("Text tokens per second", f"≤ {format_number(int(plan['tokens_per_second_bound']))}", "bound"),
        KeyNumber("Chip-hours", f"≥ {format_number(plan['chip_hours_bound'])}", _cost(plan)),
    ]


def _memory(plan: Mapping) -> Chart:
    usable = plan["usable_bytes_per_chip"] / _GIB
    bars = [Bar(name, found["bytes_per_chip"] / _GIB, reference=usable) for name, found in plan["programs"].items()]
    return bar_chart(bars, x_label="GiB per chip")


def _time(programs: Mapping) -> Chart:
    bars = [
        Bar(f"{name}: {label}", found["seconds"][key])
        for name, found in programs.items()
        if "seconds" in found
        for key, label in _SECONDS.items()
    ]
    return bar_chart(bars, x_label="seconds at peak rates")


def in_one_sentence(plan: Mapping) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    return (
        f"{plan['topology']} ({mesh}): {_gib(plan['bytes_per_chip'])} of {_gib(plan['usable_bytes_per_chip'])} GiB per "
        f"chip; at most {plan['mfu_bound']:.0%} of peak, {plan['text_mfu_bound']:.0%} in text, and "
        f"{plan['tokens_per_second_bound']:,.0f} tokens of text per second, at least "
        f"{format_number(plan['chip_hours_bound'])} chip-hours (bounds, not measured)."
    )


def as_text(plan: Mapping) -> str:
    """The tables for a terminal."""
    step, assumed, data = plan["step"], plan["assumed"], plan["data"]
    lines = [in_one_sentence(plan), ""]
    for header, rows in (
        (_MEMORY, memory_rows(plan)),
        (_TIME, time_rows(plan)),
        (_TRAFFIC, traffic_rows(plan)),
        *([(_TRIED, tried_rows(plan))] if plan["tried"] else []),
    ):
        lines += [terminal.table(header, rows), ""]
    lines += [
        f"A step: {step['rows']} rows of text in {step['micro_batches']} micro-batches of {step['rows_at_once']} rows "
        f"of {_row_lengths(step['row_lengths'])} tokens ({step['row_fill']:.0%} of them text, "
        f"{step['visited_blocks']:.0%} of attention's blocks visited), "
        f"{step['model_flops_per_chip'] / 1e12:.0f} TFLOP of the model per chip, "
        f"{step['text_flops_per_chip'] / 1e12:.0f} of them for text, {step['seconds']:.3g} s.",
        f"A run: {data['steps']} steps, {data['examples']} examples of {data['mean_tokens']:.0f} tokens on average; "
        f"the reference pass {data['reference_seconds']:.3g} s. {_cost(plan)}".rstrip(),
        f"Assumed per chip: {assumed['peak_flops'] / 1e12:.0f} TFLOP/s, "
        f"{assumed['hbm_bytes_per_second'] / 1e9:.0f} GB/s HBM, "
        f"{assumed['one_axis_bytes_per_second'] / 1e9:.0f} GB/s along one axis of the torus, "
        f"{assumed['all_chips_bytes_per_second'] / 1e9:.0f} GB/s along all. Every time is a bound, not measured.",
    ]
    lines.append(_compiled_by(plan))
    if step["row_fill"] < 0.8:
        lines.append("Hint: a larger --config.train.global_batch_size, or a smaller slice, would fill the rows.")
    return "\n".join(lines)


def _row_lengths(lengths: Sequence[int]) -> str:
    """In words: all micro-batches but the last have rows of one length."""
    first, last = lengths[0], lengths[-1]
    return f"{first}" if first == last else f"{first}, in the last of {last}"


def memory_rows(plan: Mapping) -> list[tuple[str, ...]]:
    keys = ("arguments", "temporaries", "aliased", "host", "resident", "bytes_per_chip")
    return [(name, *(_gib(found[key]) for key in keys)) for name, found in plan["programs"].items()]


def time_rows(plan: Mapping) -> list[tuple[str, ...]]:
    rows = []
    for name, found in plan["programs"].items():
        seconds = found.get("seconds")
        parts = (
            [f"{seconds[key]:.4f}" for key in ("compute", "hbm", "overlapped", "exposed", "total")] if seconds else []
        )
        flops = DASH if found["flops"] is None else f"{found['flops'] / 1e12:.1f}"
        rows.append((name, flops, *(parts or [DASH] * 5), f"{found['compile_seconds']:.0f}"))
    return rows


def traffic_rows(plan: Mapping) -> list[tuple[str, ...]]:
    return [
        (name, kind, f"{sent['overlapped_bytes'] / 1e9:.3f}", f"{sent['exposed_bytes'] / 1e9:.3f}")
        for name, found in plan["programs"].items()
        for kind, sent in found.get("collectives", {}).items()
    ]


_TRIED = ("candidate", "fits", "GiB per chip", "MFU at most", "text MFU at most", "tokens/s at most")


def tried_rows(plan: Mapping) -> Sequence[tuple[str, ...]]:
    rows = []
    for found in plan["tried"]:
        name = " ".join(found["flags"]) or "the config as it is"
        if "mfu_bound" in found:
            figures = (
                _gib(found["bytes_per_chip"]),
                f"{found['mfu_bound']:.3f}",
                f"{found['text_mfu_bound']:.3f}",
                f"{found['tokens_per_second_bound']:,.0f}",
            )
        else:
            figures = DASH, DASH, DASH, DASH
        rows.append((name, "yes" if found["fits"] else "no", *figures))
    return rows


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"


def _compiled_by(plan: Mapping) -> str:
    found = plan["versions"]
    return f"Compiled by jax {found['jax']} and libtpu {found['libtpu']}; another libtpu may need more memory, or less."


def _cost(plan: Mapping) -> str:
    return f"at least {plan['cost_bound']:,.0f} at the given price" if "cost_bound" in plan else ""
