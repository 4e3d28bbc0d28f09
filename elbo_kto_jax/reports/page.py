"""Pages from the templates beside this file: one self-contained HTML file each, without scripts.

A report prepares plain values and calls `write_page`; its template, which extends templates/page.html.j2, lays them
out. Templates escape all text, and what neither HTML nor UTF-8 can carry is replaced.
"""

import base64
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from elbo_kto_jax import __version__
from elbo_kto_jax.reports.charts import Chart
from elbo_kto_jax.runtime.files import atomic_write

# C0 and C1 controls (tab and newline are kept), lone surrogates and what is no character.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("elbo_kto_jax.reports"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# Parts of a path or a key. Not after the point or the minus of a number: 0.410, 1e-06.
_BETWEEN_PARTS = re.compile(r"(?<=[/_=])(?=\w)|(?<=[.\-])(?=[^\W\d])")


def _breakable(text: object) -> Markup:
    """The text, escaped, where a line may be broken between the parts of a path or a key before it is inside one."""
    return Markup("<wbr>").join(_BETWEEN_PARTS.split(str(text)))


def svg(chart: Chart, heading: str) -> str:
    """The chart as an SVG file of its own."""
    drawing = _ENVIRONMENT.get_template("chart.svg.j2").render(chart=chart, heading=heading)
    return _UNPRINTABLE.sub("\ufffd", drawing)


def _download(chart: Chart, heading: str) -> dict[str, str]:
    """The chart as an SVG file: `name` of the file and `address`, a data URL that holds it."""
    name = re.sub(r"\W+", "-", heading).strip("-").lower()[:60] or "chart"
    content = svg(chart, heading).encode("utf-8", "replace")
    return {"name": f"{name}.svg", "address": f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"}


_ENVIRONMENT.filters.update(breakable=_breakable, download=_download)


class KeyNumber(NamedTuple):
    """A number at the top of a page; the note below it may be empty."""

    label: str
    value: str
    note: str = ""


class Notice(NamedTuple):
    """Something the reader must not miss."""

    heading: str
    text: str


class Figure(NamedTuple):
    """A chart with what stands above and below it."""

    heading: str
    chart: Chart
    caption: str


@dataclass(frozen=True)
class Table:
    """A table whose first column names its row; the columns of one of numbers (`numeric`) end at the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    numeric: bool = False
    stacked: bool = False  # on a narrow screen each row becomes a card, with the header beside every cell


@dataclass(frozen=True)
class Sample:
    """A prompt and its answers, side by side.

    Attributes:
      prompt: what `conversation` makes of it.
      answers: (name, text) of each; a text that is None or blank is shown as empty.
      badges: (text, whether it is a warning), shown under the prompt.
      chosen: index of the answer to set off.
      notes: (heading, text) of what else there is to say, shown under the badges.
    """

    prompt: Sequence[tuple[object, object]]
    answers: Sequence[tuple[str, object]]
    badges: Sequence[tuple[str, bool]] = ()
    chosen: int | None = None
    notes: Sequence[tuple[str, object]] = ()


def write_page(
    path: str | os.PathLike,
    template: str,
    *,
    title: str,
    summary: str,
    key_numbers: Sequence[KeyNumber] = (),
    notices: Sequence[Notice] = (),
    **values: object,
) -> None:
    """Write a page to `path`, atomically; an earlier one there is replaced.

    Args:
        template: file name in templates/.
        title: heading of the page.
        summary: one sentence that says what came out.
        key_numbers, notices: shown above everything else.
        values: what the template needs beyond these.
    """
    common = {"title": title, "summary": summary, "key_numbers": key_numbers, "notices": notices}
    page = _ENVIRONMENT.get_template(template).render(**common, version=__version__, **values)
    atomic_write(path, _UNPRINTABLE.sub("\ufffd", page.replace("\r\n", "\n")) + "\n")


def conversation(prompt: object) -> list[tuple[object, object]]:
    """(role, text) of each message if `prompt` is {"role", "content"} messages, else its one text with role None."""
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(one, Mapping) for one in prompt):
        return [(None, prompt)]
    return [(str(one.get("role")), one.get("content")) for one in prompt]


def flattened(config: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    """A nested config as dotted keys and their values in JSON (text as it is)."""
    rows = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += flattened(value, f"{prefix}{key}.")
        else:
            is_text = isinstance(value, str) and value
            rows.append((f"{prefix}{key}", value if is_text else json.dumps(value, default=str, ensure_ascii=False)))
    return rows
