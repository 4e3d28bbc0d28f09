"""HTML and SVG elements as escaped strings: text becomes markup in `tag` only, so nothing reaches a page unescaped."""

import html
import math
import numbers
import re

# C0 and C1 controls (tab and newline are kept) and lone surrogates, which neither HTML nor UTF-8 can carry.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"meta", "br"})

DASH = "–"  # stands for a number that is missing or not finite


class Html(str):
    """Markup that is escaped already."""

    __slots__ = ()


def escape(text: object) -> Html:
    """`text` as markup: `Html` unchanged, anything else through `str`, escaped, unprintable characters as U+FFFD."""
    if isinstance(text, Html):
        return text
    printable = _UNPRINTABLE.sub("\ufffd", str(text).replace("\r\n", "\n"))
    return Html(html.escape(printable, quote=True))


def join(*children: object) -> Html:
    """The children one after the other, each escaped unless it is `Html`."""
    return Html("".join(escape(child) for child in children))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element, e.g. `tag("p", "a < b", class_="note")`.

    In attribute names a trailing underscore is dropped and the others become hyphens. None leaves an attribute out,
    True writes it without a value, floats are written with at most two decimals.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        key = key.rstrip("_").replace("_", "-")
        if isinstance(value, float):
            value = f"{value:.2f}".rstrip("0").rstrip(".")
        parts.append(key if value is True else f'{key}="{escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if name in _VOID else f"{opening}{join(*children)}</{name}>")


def number(value: object) -> float:
    """A JSON value as a float; NaN for anything that is not a finite number (null, text, booleans, infinities)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        value = float(value)
    except OverflowError:  # an int beyond the range of float64
        return math.nan
    return value if math.isfinite(value) else math.nan


def format_number(value: object) -> str:
    """A number for people: 3,200 or 0.412 or 1.50e-06 (three significant digits; integers in full)."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return f"{int(value):,}".replace("-", "−")
    value = number(value)
    if math.isnan(value):
        return DASH
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e15:
        return f"{value:.2e}".replace("-", "−", 1) if value < 0 else f"{value:.2e}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")
