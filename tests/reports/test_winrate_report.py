import math

import pytest

from elbo_kto_jax.reports.winrate import write_winrate_report
from tests.reports.seen import HOSTILE, Seen, words

COUNTS = {"wins": 290, "ties": 79, "losses": 131, "comparisons": 500}
SUMMARY = {"adjusted_win_rate": 0.659, "ci95": (0.612, 0.704), **COUNTS}
EXAMPLES = [
    {"prompt": "p", "answer_a": "one two three", "answer_b": "one", "verdict": "A", "expected": "A"},
    {"prompt": "q", "answer_a": "x", "answer_b": "y", "verdict": "tie", "expected": "B"},
    {"prompt": "r", "answer_a": "x", "answer_b": "", "verdict": "B"},
]


def _report(tmp_path, summary=SUMMARY, examples=EXAMPLES, names=("tuned", "base")):
    path = tmp_path / "report.html"
    write_winrate_report(path, title="Win rate", summary=summary, examples=examples, names=names)
    return Seen(path)


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
    text = _report(tmp_path, {**SUMMARY, "ci95": interval}).text
    assert "tuned wins 65.9% of 500 comparisons with base, ties counted as half" in text
    assert verdict in text


def test_structure(tmp_path):
    seen = _report(tmp_path)
    assert seen.key_numbers == {
        "Adjusted win rate": "65.9%", "Wins": "290", "Ties": "79", "Losses": "131", "Comparisons": "500",
        "Judge as expected": "1 of 2",
    }  # fmt: skip
    assert [words(one) for one in seen.of_class("chosen")] == ["✓ tuned one two three", "✓ base (empty)"]
    assert [words(one) for one in seen.of_class("warn")] == ["expected: base preferred"]
    assert seen.charts == {
        "Win rate and outcomes": (
            "Adjusted win rate: 65.9 (61.2 to 70.4). tuned preferred: 58.0. Tie: 15.8. base preferred: 26.2."
        ),
        "Difference in length": "3 values of words more in the answer of A, from 0 to 2.00; median 1.00.",
    }


def test_both_orders_are_on_one_card(tmp_path):
    answers = {"id": "0", "prompt": "p", "answer_a": "x", "answer_b": "y"}
    other = {**answers, "id": "1"}
    examples = [
        {**answers, "first": "A", "verdict": "A", "reason": "because"},
        {**answers, "first": "B", "verdict": "A"},
        {**other, "first": "A", "verdict": "A"},
        {**other, "first": "B", "verdict": "B"},
    ]
    seen = _report(tmp_path, examples=examples)
    agree, disagree = (words(one) for one in seen.of_class("sample"))
    assert "tuned shown first: tuned preferred" in agree
    assert "base shown first: tuned preferred" in agree
    assert "because" in agree
    assert "✓ tuned" in agree
    assert "the orders disagree" in disagree
    assert "✓" not in disagree
    assert "over the 4 comparisons below" in seen.text


def test_what_was_not_judged_is_reported(tmp_path):
    assert "the two answers are equal" not in _report(tmp_path).text
    text = _report(tmp_path, {**SUMMARY, "not_judged": 16, "unparsable": 3, "left_out": 2}).text
    assert "In 16 of the 500 comparisons the two answers are equal" in text
    assert "3 replies of the judge state no verdict. The 2 prompts concerned are left out" in text


@pytest.mark.parametrize(
    "summary", [{}, {**dict.fromkeys(COUNTS, 0), "adjusted_win_rate": math.nan, "ci95": (math.nan, None)}]
)
def test_nothing_was_judged(tmp_path, summary):
    seen = _report(tmp_path, summary, [])
    assert "No comparison of tuned with base has been judged." in seen.text
    assert seen.charts == {"Win rate and outcomes": "No finite value."}
    assert "Judge as expected" not in seen.key_numbers


def test_everything_is_escaped(tmp_path):
    example = {"prompt": HOSTILE, "answer_a": HOSTILE, "answer_b": HOSTILE, "verdict": "A", "expected": "B"}
    assert _report(tmp_path, examples=[example], names=(HOSTILE, HOSTILE)).text.count(HOSTILE) == 18


@pytest.mark.parametrize(("key", "value"), [("verdict", "a"), ("verdict", None), ("expected", "x")])
def test_unknown_verdicts_are_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"examples\[1\]\.{key}: expected one of"):
        _report(tmp_path, examples=[EXAMPLES[0], {**EXAMPLES[1], key: value}])
    assert not (tmp_path / "report.html").exists()
