import math
import re

import pytest

from elbo_kto_jax.reports.winrate import write_winrate_report

SUMMARY = {
    "adjusted_win_rate": 0.659,
    "ci95": (0.612, 0.704),
    "wins": 290,
    "ties": 79,
    "losses": 131,
    "comparisons": 500,
}
EXAMPLES = [
    {"prompt": "p", "answer_a": "one two three", "answer_b": "one", "verdict": "A", "expected": "A"},
    {"prompt": "q", "answer_a": "x", "answer_b": "y", "verdict": "tie", "expected": "B"},
    {"prompt": "r", "answer_a": "x", "answer_b": "", "verdict": "B"},
]


def _report(tmp_path, summary=SUMMARY, examples=EXAMPLES, names=("tuned", "base")):
    path = tmp_path / "report.html"
    write_winrate_report(path, title="Win rate", summary=summary, examples=examples, names=names)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.612, 0.704), "(95% interval 61.2% to 70.4%): tuned is preferred."),
        ([0.3, 0.4], "base is preferred."),
        ((0.45, 0.55), "the interval holds 50%, so neither is shown to be preferred."),
        ((0.5, 0.7), "so neither is shown to be preferred."),
    ],
)
def test_sentence(tmp_path, interval, verdict):
    text = _report(tmp_path, {**SUMMARY, "ci95": interval})
    assert "tuned wins 65.9% of 500 comparisons with base, ties counted as half" in text
    assert verdict in text


def test_structure(tmp_path):
    text = _report(tmp_path)
    tiles = dict(re.findall(r"<dt>([^<]*)</dt><dd class=\"value\">([^<]*)", text))
    assert tiles == {
        "Adjusted win rate": "65.9%", "Wins": "290", "Ties": "79", "Losses": "131", "Comparisons": "500",
        "Judge as expected": "1 of 2",
    }  # fmt: skip
    assert text.count('class="chosen"') == 2
    assert text.index("✓ tuned") < text.index("✓ base")
    assert "expected: base preferred" in text
    shares = re.search(r'aria-label="Win rate and outcomes\. ([^"]*)"', text)[1]
    assert shares == ("Adjusted win rate: 65.9 (61.2 to 70.4). tuned preferred: 58.0. Tie: 15.8. base preferred: 26.2.")
    lengths = re.search(r'aria-label="Difference in length\. ([^"]*)"', text)[1]
    assert "3 values of words more in the answer of A, from 0 to 2.00; median 1.00." in lengths


def test_equal_answers_are_reported(tmp_path):
    assert "the two answers are equal" not in _report(tmp_path)
    assert "In 16 of the 500 comparisons the two answers are equal" in _report(tmp_path, {**SUMMARY, "not_judged": 16})


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"adjusted_win_rate": math.nan, "ci95": (math.nan, None), "wins": 0, "ties": 0, "losses": 0, "comparisons": 0},
    ],
)
def test_nothing_was_judged(tmp_path, summary):
    text = _report(tmp_path, summary, [])
    assert "No comparison of tuned with base has been judged." in text
    assert "no finite value" in text
    assert "Judge as expected" not in text


def test_everything_is_escaped(tmp_path):
    hostile = "</p><script>alert(1)</script>\"'"
    example = {"prompt": hostile, "answer_a": hostile, "answer_b": hostile, "verdict": "A", "expected": "B"}
    text = _report(tmp_path, examples=[example], names=(hostile, hostile))
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8


@pytest.mark.parametrize(("key", "value"), [("verdict", "a"), ("verdict", None), ("expected", "x")])
def test_unknown_verdicts_are_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"examples\[1\]\.{key}: expected one of"):
        _report(tmp_path, examples=[EXAMPLES[0], {**EXAMPLES[1], key: value}])
    assert not (tmp_path / "report.html").exists()
