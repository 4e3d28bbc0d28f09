"""python -m launch.settings_page: writes the generated parts of docs/settings.md, from the code.

What stands between the lines <!-- NAME --> and <!-- end --> is replaced; the rest of the page is written by hand.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax import cli
from elbo_kto_jax.runtime import metric_names, recipes, settings
from elbo_kto_jax.runtime.files import atomic_write
from elbo_kto_jax.runtime.grid import SweepConfig

FILE = Path(__file__).resolve().parents[1] / settings.PAGE


def main(argv: list[str]) -> dict[str, Any]:
    cli.flags.Flags("launch.settings_page", f"Write the generated parts of {settings.PAGE}.").parse_flags(argv)
    text = FILE.read_text(encoding="utf-8")
    new = generated(text)
    if new != text:
        atomic_write(FILE, new)
    return {"page": str(FILE), "changed": new != text}


def generated(text: str) -> str:
    """The page with its generated parts as the code has them now."""
    for name, part in {"keys": _keys(), "metrics": _metrics()}.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{mark}{part}\n{end}{after}"
    return text


def _keys() -> str:
    """A table for each group; the values are those of kto_mix.py, and of the sweep those of eval_sweep.py."""
    stated = recipes.load("eval_sweep").to_dict() | recipes.load("kto_mix").to_dict()
    groups: dict[str, list[Sequence[str]]] = {}
    for key in settings.keys(SweepConfig):
        group, _, name = key.name.rpartition(".")
        value = stated[group][name] if group else stated[name]
        groups.setdefault(group, []).append((f"`{key.name}`", key.kind, f"`{value!r}`", key.meaning))
    groups[""] = groups.pop("")  # last
    header = ("key", "values", "in kto_mix", "meaning")
    tables = [f"### {group or 'Keys without a group'}\n\n{_table(header, rows)}" for group, rows in groups.items()]
    return "\n" + "\n\n".join(tables) + "\n"


def _metrics() -> str:
    rows = [
        (f"`{name}`", f"`{metric_names.tag(name)}`", metric.unit, metric.meaning)
        for name, metric in {**metric_names.METRICS, **metric_names.THROUGHPUT}.items()
    ]
    return "\n" + _table(("metric", "in trackers", "unit", "meaning"), rows) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    cli.run(main)
