"""One self-contained HTML page: no script, no external resource, light and dark, from a phone's width to print.

A page is `render_page(title=..., summary=..., parts=[...])`, whose parts are made by the functions below. They escape
all text they are given; only the results of this package (`Html`) pass unchanged.
"""

import json
from collections.abc import Mapping, Sequence

from elbo_kto_jax import __version__
from elbo_kto_jax.reports.markup import Html, join, tag
from elbo_kto_jax.reports.style import STYLE

# Forbids whatever the escaping is there to prevent: scripts and any load from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render_page(*, title: str, summary: str, parts: Sequence[Html]) -> str:
    """The whole document: title, one sentence that says what came out, then the parts in order."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    header = tag("header", tag("h1", title), tag("p", summary, class_="lead"))
    body = tag("body", tag("main", header, *parts), tag("footer", f"Written by elbo_kto_jax {__version__}."))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def tiles(items: Sequence[tuple[str, str, str]]) -> Html:
    """Key figures as (label, value, note); a note may be empty."""
    cells = []
    for label, value, note in items:
        remark = tag("dd", note, class_="note") if note else ""
        cells.append(tag("div", tag("dt", label), tag("dd", value, class_="value"), remark, class_="tile"))
    return tag("dl", *cells, class_="tiles")


def notice(heading: str, text: str) -> Html:
    """Something the reader must not miss."""
    return tag("p", tag("strong", heading), " ", text, class_="notice", role="note")


def section(heading: str, *content: Html, intro: str = "") -> Html:
    """A part of the page under a heading."""
    return tag("section", tag("h2", heading), tag("p", intro, class_="intro") if intro else "", *content)


def figures(items: Sequence[tuple[str, Html, str]]) -> Html:
    """Charts as (heading, chart, caption), two beside each other where there is room."""
    drawn = [tag("figure", tag("h3", heading), chart, tag("figcaption", text)) for heading, chart, text in items]
    return tag("div", *drawn, class_="figures")


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "", numeric: bool = False) -> Html:
    """A table whose first column names its row; it scrolls sideways by itself where the screen is too narrow."""
    head = tag("thead", tag("tr", *[tag("th", name, scope="col") for name in header]))
    body = [tag("tr", tag("th", row[0], scope="row"), *[tag("td", cell) for cell in row[1:]]) for row in rows]
    inner = tag("table", head, tag("tbody", *body), class_="numbers" if numeric else None)
    # The caption stays outside, so that it does not scroll away with the table.
    note = tag("p", caption, class_="note") if caption else ""
    return join(note, tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption or header[0]))


def folded(heading: str, *content: Html) -> Html:
    """Content that opens with a click."""
    return tag("details", tag("summary", heading), *content)


def settings_table(config: Mapping) -> Html:
    """A nested config as a folded table of dotted keys and their values in JSON."""
    rows = [(tag("code", key), tag("code", _as_json(value))) for key, value in _flatten(config)]
    return folded(f"All settings ({len(rows)})", table(("Key", "Value"), rows))


def sample(
    prompt: object,
    answers: Sequence[tuple[str, object]],
    *,
    badges: Sequence[tuple[str, bool]] = (),
    chosen: int | None = None,
) -> Html:
    """A prompt with two answers side by side.

    Args:
        prompt: text or messages; None or empty is shown as such.
        answers: (name, text) of each.
        badges: (text, whether it is a warning), shown under the prompt.
        chosen: index of the answer to set off.
    """
    marks = [tag("span", text, class_="badge warn" if warning else "badge") for text, warning in badges]
    cells = []
    for index, (name, text) in enumerate(answers):
        heading = f"✓ {name}" if index == chosen else name
        style = "chosen" if index == chosen else None
        cells.append(tag("div", tag("h3", heading), _quoted(text), class_=style))
    asked = tag("div", tag("h3", "Prompt"), conversation(prompt), *marks)
    return tag("article", asked, tag("div", *cells, class_="answers"), class_="sample")


def sample_list(samples: Sequence[Html], *, shown: int = 6) -> Html:
    """Samples, those after the first `shown` folded."""
    rest = samples[shown:]
    return join(*samples[:shown], folded(f"{len(rest)} more", *rest) if rest else "")


def conversation(prompt: object) -> Html:
    """Text, or {"role", "content"} messages, each under its role."""
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(one, Mapping) for one in prompt):
        return _quoted(prompt)
    return join(*[join(tag("div", one.get("role"), class_="role"), _quoted(one.get("content"))) for one in prompt])


def _quoted(text: object) -> Html:
    if text is None or not str(text).strip():
        return tag("div", "(empty)", class_="empty")
    return tag("div", text, class_="text", dir="auto")


def _flatten(config: Mapping, prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _as_json(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str, ensure_ascii=False)
