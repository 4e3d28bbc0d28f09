"""reports/page.py and the templates: escaping, self-containedness, colours."""

import re
from pathlib import Path

import jinja2
import pytest

from elbo_kto_jax.reports import page
from elbo_kto_jax.reports.page import KeyNumber, Notice, Sample, conversation, flattened, write_page
from tests.reports.seen import HOSTILE, Seen, words

STYLE_FILE = Path(page.__file__).parent / "templates" / "style.css"
STYLE = STYLE_FILE.read_text()


def _page(tmp_path, samples=(), **values):
    values = {
        "checkpoint": None,
        "best": None,
        "window": 1,
        "figures": [],
        "changed": 0,
        "numbers": None,
        "settings": [],
    } | values
    write_page(tmp_path / "page.html", "training.html.j2", samples=samples, **{"title": "a", "summary": "b"} | values)
    return Seen(tmp_path / "page.html")


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


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("/runs/kto_mix-a/check.npz", ["/", "runs/", "kto_", "mix-", "a/", "check.", "npz"]),
        ("from 0.503 to 0.410, 1e-06 of -2", ["from 0.503 to 0.410, 1e-06 of -2"]),
        ("a/<b>", ["a/&lt;b&gt;"]),
    ],
)
def test_lines_break_between_the_parts_of_a_path_and_inside_no_number(text, parts):
    assert page._breakable(text).split("<wbr>") == parts


def test_both_schemes_define_the_same_colours():
    assert LIGHT.keys() == DARK.keys()
    set_by_elements = {"colour", *re.findall(r"\.l\d \{ --([\w-]+):", STYLE)}
    assert set(re.findall(r"var\(--([\w-]+)", STYLE)) - set_by_elements <= LIGHT.keys()


def test_all_texts_come_back_as_text(tmp_path):
    sample = Sample(conversation([{"role": HOSTILE, "content": HOSTILE}]), [(HOSTILE, HOSTILE)], [(HOSTILE, True)], 0)
    seen = _page(
        tmp_path,
        [sample],
        title=HOSTILE,
        summary=HOSTILE,
        key_numbers=[KeyNumber(HOSTILE, HOSTILE, HOSTILE)],
        notices=[Notice(HOSTILE, HOSTILE)],
        checkpoint=HOSTILE,
        settings=flattened({HOSTILE: {HOSTILE: HOSTILE}}),
    )
    assert words(seen.root.find("head/title")) == HOSTILE
    assert seen.text.count(HOSTILE) == 2 + 3 + 2 + 1 + 5 + 3


def test_no_template_turns_escaping_off():
    for template in STYLE_FILE.parent.glob("*.j2"):
        assert not re.search(r"\bsafe\b|autoescape", template.read_text()), template


def test_characters_that_no_page_can_hold_are_replaced(tmp_path):
    seen = _page(tmp_path, summary="日本語 ü a\x00b\x1b[0m\ud800\r\n\tc \u202e")
    assert "日本語 ü a\ufffdb\ufffd[0m\ufffd\n\tc \u202e" in "".join(seen.root.find("body").itertext())


def test_what_a_template_misses_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'version_of_jax' is undefined"):
        page._ENVIRONMENT.from_string("{{ version_of_jax }}").render()


def test_settings_are_flattened(tmp_path):
    config = {"a": {"b": {"c": 1}, "d": None}, "e": [1, 2], "f": "x<y", "g": {}, "h": ""}
    seen = _page(tmp_path, settings=flattened(config))
    expected = {"a.b.c": "1", "a.d": "null", "e": "[1, 2]", "f": "x<y", "g": "{}", "h": '""'}
    assert seen.table("Key") == {key: [value] for key, value in expected.items()}
    assert "All settings (6)" in seen.text


def test_samples(tmp_path):
    """Six are shown, the rest is folded; empty texts are named, the chosen answer is set off."""
    seen = _page(tmp_path, [Sample([(None, "")], [("A", f"yes {i}"), ("B", None)], (), 0) for i in range(8)])
    assert [words(one) for one in seen.of_class("chosen")] == [f"✓ A yes {i}" for i in range(8)]
    assert len(seen.of_class("empty")) == 16
    folded = next(one for one in seen.root.iter("details") if "2 more" in words(one.find("summary")))
    assert len(folded.findall("article")) == 2
