"""The report of a comparison of two models under a judge."""

import math
import os
from collections.abc import Mapping, Sequence

from elbo_kto_jax.reports.charts import Bar, Chart, bar_chart, histogram
from elbo_kto_jax.reports.formatting import DASH, format_number, number
from elbo_kto_jax.reports.page import KeyNumber, Notice, Sample, conversation, write_page

_VERDICTS = ("A", "B", "tie", "unparsable")


def write_winrate_report(
    path: str | os.PathLike,
    *,
    title: str,
    summary: Mapping,
    examples: Sequence[Mapping],
    names: tuple[str, str],
) -> None:
    """Write the page to `path`, atomically; an earlier report there is replaced.

    Args:
        title: heading of the page.
        summary: `adjusted_win_rate` and `ci95` (pair) of A against B as fractions of 1, and the counts `wins`, `ties`,
            `losses`, `comparisons`. Missing or NaN numbers are shown as such. `unparsable` comparisons, and the prompts
            that are `left_out` on their account, ties of equal answers, which were `not_judged`, and `accuracy_a` and
            `accuracy_b`, fractions of 1 over the `checked` prompts, and `order_agreement`, how often both orders of the
            `judged_twice` prompts have one verdict, are reported where there are any.
        examples: {"prompt", "answer_a", "answer_b", "verdict"} with verdict "A", "B", "tie" or "unparsable", and
            optionally "expected", the verdict that is known to be right, "first", the answer the judge saw first,
            "expected_answer" (text, or a list of which one is enough), "correct_a" and "correct_b", and "reason".
        names: of A and of B.

    Raises:
        ValueError: a verdict that is none of these.
    """
    for index, example in enumerate(examples):
        for key in ("verdict", "expected"):
            if example.get(key) not in (*_VERDICTS, *((None,) if key == "expected" else ())):
                raise ValueError(f"examples[{index}].{key}: expected one of {_VERDICTS}, got {example.get(key)!r}")
    write_page(
        path,
        "winrate.html.j2",
        title=title,
        summary=_in_one_sentence(summary, names),
        key_numbers=_key_numbers(summary, examples, names),
        notices=_notices(summary),
        names=names,
        outcomes=_outcomes(summary, names),
        lengths=_lengths(examples),
        comparisons=len(examples),
        samples=[_sample(card, names) for card in _cards(examples)],
    )


def _notices(summary: Mapping) -> list[Notice]:
    notices = []
    if number(summary.get("unparsable")) > 0:
        text = (
            f"{format_number(summary['unparsable'])} replies of the judge state no verdict. The "
            f"{format_number(summary.get('left_out'))} prompts concerned are left out of all figures."
        )
        notices.append(Notice("Unparsable verdicts.", text))
    if number(summary.get("not_judged")) > 0:
        text = (
            f"In {format_number(summary['not_judged'])} of the {format_number(summary.get('comparisons'))} comparisons "
            "the two answers are equal: these are ties, about which the judge was not asked."
        )
        notices.append(Notice("Equal answers.", text))
    return notices


def _interval(summary: Mapping) -> tuple[float, float]:
    low, high = summary.get("ci95") or (math.nan, math.nan)
    return number(low), number(high)


def _percent(value: float) -> str:
    return DASH if math.isnan(value) else f"{100 * value:.1f}%"


def _in_one_sentence(summary: Mapping, names: tuple[str, str]) -> str:
    rate, (low, high) = number(summary.get("adjusted_win_rate")), _interval(summary)
    if math.isnan(rate):
        return f"No comparison of {names[0]} with {names[1]} has been judged."
    found = (
        f"{names[0]} wins {_percent(rate)} of {format_number(summary.get('comparisons'))} comparisons with {names[1]}, "
        f"ties counted as half"
    )
    if math.isnan(low) or math.isnan(high):
        return f"{found}."
    if low > 0.5:
        verdict = f"{names[0]} is preferred"
    elif high < 0.5:
        verdict = f"{names[1]} is preferred"
    else:
        verdict = "the interval holds 50%, so neither is shown to be preferred"
    return f"{found} (95% interval {_percent(low)} to {_percent(high)}): {verdict}."


def _key_numbers(summary: Mapping, examples: Sequence[Mapping], names: tuple[str, str]) -> list[KeyNumber]:
    low, high = _interval(summary)
    items = [
        KeyNumber(
            "Adjusted win rate",
            _percent(number(summary.get("adjusted_win_rate"))),
            f"95% interval {_percent(low)} to {_percent(high)}",
        ),
        KeyNumber("Wins", format_number(summary.get("wins")), f"{names[0]} preferred"),
        KeyNumber("Ties", format_number(summary.get("ties")), "counted as half"),
        KeyNumber("Losses", format_number(summary.get("losses")), f"{names[1]} preferred"),
        KeyNumber("Comparisons", format_number(summary.get("comparisons"))),
    ]
    if summary.get("order_agreement") is not None:
        note = f"one verdict whichever is shown first, of {format_number(summary.get('judged_twice'))} prompts"
        items.append(KeyNumber("Orders agree", _percent(number(summary["order_agreement"])), note))
    if summary.get("accuracy_a") is not None:
        both = (_percent(number(summary.get(key))) for key in ("accuracy_a", "accuracy_b"))
        note = f"{names[0]} / {names[1]}, of {format_number(summary.get('checked'))} prompts"
        items.append(KeyNumber("Right answers", " / ".join(both), note))
    known = [example for example in examples if example.get("expected") is not None]
    if known:
        right = sum(example["verdict"] == example["expected"] for example in known)
        items.append(KeyNumber("Judge as expected", f"{right} of {len(known)}", "where the right verdict is known"))
    return items


def _outcomes(summary: Mapping, names: tuple[str, str]) -> Chart:
    low, high = _interval(summary)
    total = number(summary.get("comparisons")) or math.nan
    share = {key: 100 * number(summary.get(key)) / total for key in ("wins", "ties", "losses")}
    bars = [
        Bar("Adjusted win rate", 100 * number(summary.get("adjusted_win_rate")), 100 * low, 100 * high, reference=50),
        Bar(f"{names[0]} preferred", share["wins"]),
        Bar("Tie", share["ties"]),
        Bar(f"{names[1]} preferred", share["losses"]),
    ]
    return bar_chart(bars, x_label="share of comparisons (%)", x_max=100)


def _lengths(examples: Sequence[Mapping]) -> Chart:
    differences = [_words(example.get("answer_a")) - _words(example.get("answer_b")) for example in examples]
    return histogram(differences, x_label="words more in the answer of A", y_label="comparisons")


def _words(text: object) -> int:
    return len(str(text or "").split())


def _cards(examples: Sequence[Mapping]) -> list[list[Mapping]]:
    """The examples in lists of one, and the two orders of one pair of answers in a list of two."""
    cards: list[list[Mapping]] = []
    for example in examples:
        before = cards[-1][0] if cards else {}
        same = all(before.get(key) == example.get(key) for key in ("id", "prompt", "answer_a", "answer_b"))
        orders = {before.get("first"), example.get("first")} == {"A", "B"}
        if same and orders and len(cards[-1]) == 1:
            cards[-1].append(example)
        else:
            cards.append([example])
    return cards


def _sample(card: Sequence[Mapping], names: tuple[str, str]) -> Sample:
    """What is shown of one example, or of both orders of one pair of answers."""
    said = {
        "A": f"{names[0]} preferred",
        "B": f"{names[1]} preferred",
        "tie": "tie",
        "unparsable": "unparsable verdict, not counted",
    }
    badges = []
    for example in card:
        verdict, expected = example["verdict"], example.get("expected")
        first = "" if example.get("first") is None else f"{names['AB'.index(example['first'])]} shown first: "
        badges.append((f"{first}{said[verdict]}", verdict == "unparsable"))
        if expected is not None and expected != verdict:
            badges.append((f"expected: {said[expected]}", True))
    verdicts = {example["verdict"] for example in card}
    if len(verdicts) > 1:
        badges.append(("the orders disagree", True))
    for name, key in zip(names, ("correct_a", "correct_b"), strict=True):
        if card[0].get(key) is not None:
            badges.append((f"{name}: {'right' if card[0][key] else 'wrong'}", False))
    return Sample(
        conversation(card[0].get("prompt")),
        [(names[0], card[0].get("answer_a")), (names[1], card[0].get("answer_b"))],
        badges,
        chosen={"A": 0, "B": 1}.get(verdicts.pop()) if len(verdicts) == 1 else None,
        notes=[*_expected(card[0]), *(note for example in card for note in _reason(example, names))],
    )


def _expected(example: Mapping) -> list[tuple[str, object]]:
    """The answer that was expected, where it is known."""
    answer = example.get("expected_answer")
    if answer is None:
        return []
    several = isinstance(answer, (list, tuple))
    text = "\n".join(map(str, answer)) if several else answer
    return [("Expected answer, one of" if several and len(answer) > 1 else "Expected answer", text)]


def _reason(example: Mapping, names: tuple[str, str]) -> list[tuple[str, object]]:
    """Why the judge decided as it did, where it says so."""
    reason, first = example.get("reason"), example.get("first")
    shown = "" if first is None else f"; its answer A is that of {names['AB'.index(first)]}"
    return [(f"The judge's reason{shown}", reason)] if reason else []
