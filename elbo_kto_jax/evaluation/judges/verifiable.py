"""For tasks with a checkable answer: the records say what is right."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax.evaluation.judges import Judge
from elbo_kto_jax.evaluation.prompts import Prompts
from elbo_kto_jax.evaluation.winrate import Opinion, Verdict
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.messages import shown


def make(options: config.Judge, prompts: Prompts, cache: Path, stop_requested: Callable[[], bool] | None) -> Judge:
    """See judges/__init__.py."""
    return verifiable(prompts.rows, [record.where for record in prompts.records])


def describe(options: config.Judge) -> dict[str, Any]:
    """See judges/__init__.py."""
    return {"name": "verifiable"}


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

    @classmethod
    def where_stated(cls, record: Mapping[str, Any]) -> "Expected | None":
        """The same, or None where the record does not say what is right."""
        try:
            return cls.from_record(record, "")
        except UserError:
            return None

    def is_met_by(self, answer: str) -> bool:
        return any(_MATCHES[self.match](expected, answer) for expected in self.answers)


def _is_equal(expected: str, answer: str) -> bool:
    return expected.strip() == answer.strip()


def _is_contained(expected: str, answer: str) -> bool:
    return expected in answer


def _is_found(expected: str, answer: str) -> bool:
    return re.search(expected, answer) is not None


_MATCHES: dict[str, Callable[[str, str], bool]] = {"exact": _is_equal, "contains": _is_contained, "regex": _is_found}


def verifiable(records: Sequence[Mapping[str, Any]], where: Sequence[str]) -> Judge:
    """For tasks with a checkable answer: correct beats wrong, anything else is a tie; each prompt is judged once.

    Args:
      records: the prompt records; for their fields see `Expected.from_record`.
      where: "FILE:LINE" of each.

    Raises:
      UserError: a record has no usable answer.
    """
    expected = [Expected.from_record(record, place) for record, place in zip(records, where, strict=True)]

    def judge(answers_a: Sequence[str], answers_b: Sequence[str]) -> list[tuple[Verdict | Opinion, ...]]:
        verdicts: list[tuple[Verdict | Opinion, ...]] = []
        for wanted, a, b in zip(expected, answers_a, answers_b, strict=True):
            a_is_right, b_is_right = wanted.is_met_by(a), wanted.is_met_by(b)
            verdicts.append(("tie",) if a_is_right == b_is_right else ("A",) if a_is_right else ("B",))
        return verdicts

    return judge
