import re
import xml.etree.ElementTree as ElementTree

import pytest

from elbo_kto_jax.reports import page
from elbo_kto_jax.reports.style import STYLE


def _contrast(a, b):
    """The contrast of WCAG 2 between two colours #rrggbb."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def _colours(block):
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


LIGHT = _colours(STYLE.split("@media", 1)[0])
DARK = _colours(STYLE.split("@media (prefers-color-scheme: dark)", 1)[1].split("*,", 1)[0])


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(colours):
    for text, backs in {
        "text": ("page", "card", "warn-back", "good-back"),
        "muted": ("page", "card"),
        "warn": ("warn-back", "card"),
        "good": ("good-back",),
    }.items():
        for back in backs:
            assert _contrast(colours[text], colours[back]) >= 4.5, (text, back)
    for line in ("s0", "s1", "s2", "s3", "axis"):
        assert _contrast(colours[line], colours["card"]) >= 3, line


def test_both_schemes_define_the_same_colours():
    assert LIGHT.keys() == DARK.keys()
    set_by_elements = {"colour", *re.findall(r"\.l\d \{ --([\w-]+):", STYLE)}
    assert set(re.findall(r"var\(--([\w-]+)", STYLE)) - set_by_elements <= LIGHT.keys()


def test_page_is_self_contained_and_titled():
    text = page.render_page(title="a < b", summary="It & that.", parts=[page.section("Part", page.figures([]))])
    assert text.startswith("<!doctype html>")
    assert "<title>a &lt; b</title>" in text
    assert "<h1>a &lt; b</h1>" in text
    assert "It &amp; that." in text
    assert '<html lang="en">' in text
    assert 'name="viewport"' in text
    assert "default-src &#x27;none&#x27;" in text
    assert not re.search(r"<script|https?:|src=|@import|url\(|<link", text)


def test_settings_are_flattened():
    table = page.settings_table({"a": {"b": {"c": 1}, "d": None}, "e": [1, 2], "f": "x<y", "g": {}, "h": ""})
    rows = ElementTree.fromstring(f"<div>{table}</div>").iter("tr")
    cells = [tuple("".join(cell.itertext()) for cell in row) for row in rows]
    assert cells[1:] == [
        ("a.b.c", "1"), ("a.d", "null"), ("e", "[1, 2]"), ("f", "x<y"), ("g", "{}"), ("h", '""')
    ]  # fmt: skip
    assert "All settings (6)" in table


def test_sample_marks_the_chosen_answer_and_empty_texts():
    shown = page.sample("", [("A", "yes"), ("B", None)], badges=[("note", True)], chosen=0)
    assert shown.count("(empty)") == 2
    assert shown.count('class="chosen"') == 1
    assert "✓ A" in shown
    assert 'class="badge warn"' in shown


def test_later_samples_are_folded():
    samples = [page.sample(str(i), [("A", ""), ("B", "")]) for i in range(5)]
    assert "<details>" not in page.sample_list(samples, shown=5)
    assert "2 more" in page.sample_list(samples, shown=3)


def test_table_caption_and_scope():
    table = page.table(("k", "v"), [("a", 1)], caption="all of <them>", numeric=True)
    root = ElementTree.fromstring(f"<div>{table}</div>")
    assert root.find("p").text == "all of <them>"
    assert [cell.get("scope") for cell in root.iter("th")] == ["col", "col", "row"]
