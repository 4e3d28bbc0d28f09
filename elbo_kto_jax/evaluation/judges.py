"""Judges: which of two answers to a prompt is better.

A judge is made from the prompt records, so that a record it cannot use is refused before anything is generated. Called
with the answers of A and B it returns, for each prompt, one verdict per comparison that it made: one where the order in
which it sees the answers cannot matter, two where it can and both orders were judged. A verdict always names the model,
never the place in which the judge saw it; a reply that states none is "unparsable", and counts for nobody.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from elbo_kto_jax.evaluation.messages import shown
from elbo_kto_jax.runtime.errors import UserError

Verdict = Literal["A", "B", "tie", "unparsable"]
Judge = Callable[[Sequence[str], Sequence[str]], list[tuple[Verdict, ...]]]


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a correct answer looks like.

    Attributes:
      answers: one of these has to match.
      match: "exact" (the same text, white space around it aside), "contains" or "regex" (found anywhere in the answer).
    """

    answers: tuple[str, ...]
    match: str

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> "Expected":
        """Reads `answer` (a string or a list of strings) and `match` (default "exact") of the record at `where`.

        Raises:
          UserError: one of them is missing or not usable.
        """
        answer, match = record.get("answer"), record.get("match", "exact")
        answers = [answer] if isinstance(answer, str) else answer
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(
                f"{where}: field `answer`: expected a string or a list of strings, none of them empty, "
                f"got {shown(answer)}; the verifiable judge compares answers with it"
            )
        if match not in _MATCHES:
            raise UserError(f"{where}: field `match`: expected one of {', '.join(_MATCHES)}, got {shown(match)}")
        if match == "regex":
            for pattern in answers:
                try:
                    with warnings.catch_warnings(action="ignore"):
                        re.compile(pattern)
                except (re.error, RecursionError, OverflowError) as error:
                    raise UserError(
                        f"{where}: field `answer`: {shown(pattern)} is no regular expression: {shown(str(error))}"
                    ) from None
        return cls(tuple(answers), match)

    def is_met_by(self, answer: str) -> bool:
        return any(_MATCHES[self.match](expected, answer) for expected in self.answers)


_MATCHES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda expected, answer: expected.strip() == answer.strip(),
    "contains": lambda expected, answer: expected in answer,
    "regex": lambda expected, answer: re.search(expected, answer) is not None,
}


def verifiable(records: Sequence[Mapping[str, Any]], where: Sequence[str]) -> Judge:
    """For tasks with a checkable answer: correct beats wrong, anything else is a tie; each prompt is judged once.

    Args:
      records: the prompt records; for their fields see `Expected.from_record`.
      where: "FILE:LINE" of each.

    Raises:
      UserError: a record has no usable answer.
    """
    expected = [Expected.from_record(record, place) for record, place in zip(records, where, strict=True)]

    def judge(answers_a: Sequence[str], answers_b: Sequence[str]) -> list[tuple[Verdict, ...]]:
        verdicts: list[tuple[Verdict, ...]] = []
        for wanted, a, b in zip(expected, answers_a, answers_b, strict=True):
            a_is_right, b_is_right = wanted.is_met_by(a), wanted.is_met_by(b)
            verdicts.append(("tie",) if a_is_right == b_is_right else ("A",) if a_is_right else ("B",))
        return verdicts

    return judge


def chat(prompts: Sequence[str], ask: Callable[[Sequence[str]], list[str]], template: str) -> Judge:
    """A chat model as the judge; each prompt is judged in both orders.

    Equal answers are a tie without being judged: the two orders would be the same question, and its one answer would
    count once for A and once for B.

    Args:
      prompts: the texts that were answered.
      ask: replies to a list of texts (endpoint.py); "" where there is none.
      template: what to ask, see `check_template`; the reply's verdict is [[A]], [[B]] or [[tie]].

    Raises:
      UserError: the template lacks a field.
    """
    check_template(template, "template")

    def judge(answers_a: Sequence[str], answers_b: Sequence[str]) -> list[tuple[Verdict, ...]]:
        asked = [
            _fill(template, prompt=prompt, answer_a=first, answer_b=second)
            for prompt, a, b in zip(prompts, answers_a, answers_b, strict=True)
            if a != b
            for first, second in ((a, b), (b, a))
        ]
        replies = iter(ask(asked))
        verdicts: list[tuple[Verdict, ...]] = []
        for a, b in zip(answers_a, answers_b, strict=True):
            if a == b:
                verdicts.append(("tie", "tie"))
            else:
                a_first, b_first = read_verdict(next(replies)), read_verdict(next(replies))
                verdicts.append((a_first, _OTHER[b_first]))
        return verdicts

    return judge


_FIELDS = ("prompt", "answer_a", "answer_b")
_OTHER: dict[Verdict, Verdict] = {"A": "B", "B": "A", "tie": "tie", "unparsable": "unparsable"}


def check_template(template: str, where: str) -> None:
    """Raises UserError where the judge prompt that `where` named lacks {prompt}, {answer_a} or {answer_b}."""
    missing = [f"{{{field}}}" for field in _FIELDS if f"{{{field}}}" not in template]
    if missing:
        raise UserError(f"{where}: the judge prompt lacks {', '.join(missing)}")


def _fill(template: str, **fields: str) -> str:
    """The template with its fields replaced, in one pass: an answer that contains "{prompt}" stays as it is."""
    return re.sub(r"\{(prompt|answer_a|answer_b)\}", lambda match: fields[match[1]], template)


# What sets reasoning off where a server leaves it in the text: tags, the marks of Mistral and Kimi, gpt-oss's channels.
_THINK = r"(?:think|thinking|thought|thoughts|reason|reasoning|reflection|analysis|scratchpad)"
_OPEN = rf"<\s*{_THINK}\b[^<>]*>|\[THINK\]|◁think▷|<\|channel\|>analysis(?:<\|message\|>)?"
_CLOSE = rf"<\s*/\s*{_THINK}\s*>|\[/THINK\]|◁/think▷|<\|channel\|>final(?:<\|message\|>)?"
_REASONING = re.compile(f"(?P<open>{_OPEN})|(?P<close>{_CLOSE})", re.IGNORECASE)
# The brackets may be escaped or the letter emphasised: Markdown and LaTeX.
_STATED = re.compile(r"\\?\[\\?\[[\s*_`]*(A|B|tie)[\s*_`]*\\?\]\\?\]", re.IGNORECASE)


def without_reasoning(reply: str) -> str:
    """What a reply says beside its reasoning.

    Reasoning stands between two marks, after one that nothing closes (the reply was cut off), or before one that
    nothing opened (some templates write the opening mark into the prompt).
    """
    said, start, opened = [], 0, None
    for mark in _REASONING.finditer(reply):
        if mark["open"]:
            opened = mark.start() if opened is None else opened
            continue
        said = [] if opened is None else [*said, reply[start:opened]]
        start, opened = mark.end(), None
    return "".join([*said, reply[start:opened]])


def read_verdict(reply: str) -> Verdict:
    """The verdict that a reply states beside its reasoning; none where it states none, or several that differ."""
    stated = {verdict.upper() for verdict in _STATED.findall(without_reasoning(reply))}
    if len(stated) != 1:
        return "unparsable"
    (verdict,) = stated
    return {"A": "A", "B": "B", "TIE": "tie"}[verdict]
