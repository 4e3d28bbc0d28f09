import math
from html.parser import HTMLParser

import numpy as np
import pytest

from elbo_kto_jax.reports.markup import DASH, Html, escape, format_number, number, tag

HOSTILE = ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "</style></title>&amp;", "]]>-->"]


class _Seen(HTMLParser):
    """Names of elements, attributes and the text, as a browser would read them."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_text_and_attributes_come_back_as_text(text):
    seen = _Seen()
    seen.feed(tag("p", text, title=text))
    seen.close()
    assert seen.tags == ["p"]
    assert seen.text == text
    assert seen.attributes == [("title", text)]


def test_markup_is_not_escaped_twice():
    assert tag("p", tag("b", "1 < 2")) == "<p><b>1 &lt; 2</b></p>"
    assert isinstance(tag("p"), Html)


def test_unprintable_characters_are_replaced():
    assert escape("a\x00b\x1b[0m\ud800\n\tc") == "a\ufffdb\ufffd[0m\ufffd\n\tc"
    escape("\udfff").encode("utf-8")


def test_attributes():
    assert tag("rect", x=1.0, y=0.123456, class_="a", aria_label="l", id=None, open=True) == (
        '<rect x="1" y="0.12" class="a" aria-label="l" open></rect>'
    )


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, -math.inf, 10**400, [1]])
def test_number_refuses_what_is_not_one(value):
    assert math.isnan(number(value))


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.float64(2), np.int64(2)])
def test_number_accepts_every_kind_of_number(value):
    assert number(value) == 2.0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3200, "3,200"),
        (-5, "−5"),
        (0.4123, "0.412"),
        (4.312, "4.31"),
        (12345.6, "12,346"),
        (-0.05, "−0.0500"),
        (1.5e-6, "1.50e-06"),
        (-1.5e-6, "−1.50e-06"),
        (2.5e20, "2.50e+20"),
        (0.0, "0"),
        (-0.0, "0"),
        (math.nan, DASH),
        (None, DASH),
        (True, DASH),
    ],
)
def test_format_number(value, shown):
    assert format_number(value) == shown
