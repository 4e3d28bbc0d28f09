"""Two models' answers to the same prompts, judged: comparisons.jsonl, the win rate, and its report."""

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax.evaluation import judges, kept
from elbo_kto_jax.evaluation.judges.verifiable import Expected
from elbo_kto_jax.evaluation.prompts import Prompts, prompt_text
from elbo_kto_jax.evaluation.winrate import Opinion, Verdict, win_rate
from elbo_kto_jax.reports.winrate import write_winrate_report
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json

log = logging.getLogger(__name__)
COMPARISONS, REPORT = "comparisons.jsonl", "report.html"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models' answers to the same prompts."""

    names: tuple[str, str]  # of A and of B
    prompts: Prompts
    answers_a: Sequence[str]
    answers_b: Sequence[str]


def answered(prompts: Prompts, models: Sequence[kept.Pinned], config: Config, out: Path) -> Comparison:
    """What both models answer; of each, what was written down before is not made again."""
    name_a, name_b = (model.source for model in models)
    log.info("%d prompts to %s and to %s, under identical decoding", len(prompts.records), name_a, name_b)
    texts = [
        kept.answers(
            out / "answers", model, prompts.records, prompts.digest, config, functools.partial(model.load, config)
        )
        for model in models
    ]
    return Comparison((name_a, name_b), prompts, *texts)


def compare(comparison: Comparison, judge: judges.Judge, out: Path) -> dict[str, Any]:
    """Has the answers judged, writes comparisons.jsonl and report.html into `out`; returns the result.

    Raises:
      UserError: the judge gave none of the prompts that it was asked about a verdict in every order.
    """
    verdicts = judge(comparison.answers_a, comparison.answers_b)
    rows = list(_comparison_rows(comparison, verdicts))
    comparisons_file, report_file = out / COMPARISONS, out / REPORT
    if processes.is_first():
        atomic_write(comparisons_file, "".join(f"{to_json(row)}\n" for row in rows))
    _check_judged(rows, comparisons_file)
    result = result_of(rows)
    if processes.is_first():
        write_winrate_report(
            report_file,
            title=" against ".join(comparison.names),
            summary=result,
            # The report's `expected` is the verdict that a judge should have given, not the answer to the task.
            examples=[{**row, "expected": None, "expected_answer": row["expected"]} for row in rows],
            names=comparison.names,
        )
    log.info("report: %s", report_file)
    return result


def result_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The win rate over the lines of a comparisons.jsonl, with these numbers beside it.

    prompts: how many there are.
    not_judged: the comparisons of equal answers.
    order_agreement: the share of the `judged_twice` prompts, those with a verdict in either order, in which the two
      verdicts are the same; None where there are none. A judge that looks at the place alone has 0.
    accuracy_a, accuracy_b: the share of right answers among the `checked` prompts, those whose record says what is
      right; None where there are none.
    """
    prompts = [list(of_prompt) for _, of_prompt in _by_prompt(rows)]
    verdicts = [tuple(row["verdict"] for row in of_prompt) for of_prompt in prompts]
    checked = [of_prompt[0] for of_prompt in prompts if "correct_a" in of_prompt[0]]
    twice = [verdict for verdict, of_prompt in zip(verdicts, prompts, strict=True) if _has_both_orders(of_prompt)]
    return {
        **dataclasses.asdict(win_rate(verdicts)),
        "prompts": len(prompts),
        "not_judged": sum(not _was_asked(row) for row in rows),
        "accuracy_a": _share(row["correct_a"] for row in checked),
        "accuracy_b": _share(row["correct_b"] for row in checked),
        "checked": len(checked),
        "order_agreement": _share(first == second for first, second in twice),
        "judged_twice": len(twice),
    }


def _has_both_orders(of_prompt: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a judge gave a verdict in both orders."""
    judged = [row for row in of_prompt if "first" in row and _was_asked(row)]
    return len(judged) == 2 and all(row["verdict"] != "unparsable" for row in judged)


def _share(which: Iterable[bool]) -> float | None:
    """The fraction that is true; None of nothing."""
    found = list(which)
    return sum(found) / len(found) if found else None


def _check_judged(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Raises UserError where the judge gave no verdicts; warns where it gave few, or was not asked at all."""
    asked = [list(of_prompt) for _, of_prompt in _by_prompt([row for row in rows if _was_asked(row)])]
    without = [of_prompt for of_prompt in asked if any(row["verdict"] == "unparsable" for row in of_prompt)]
    if asked and len(without) == len(asked):
        raise UserError(
            f"the judge gave none of the {len(asked)} prompts a verdict that can be read ({file});\n"
            "choose another --judge-model, or a --judge-prompt that asks for [[A]], [[B]] or [[tie]]"
        )
    if without:
        log.warning(
            "%d of %d prompts have no verdict that can be read in both orders, and are left out of the win rate",
            *(len(without), len(asked)),
        )
    if not asked:
        log.warning("the two models' answers are equal throughout: nothing was judged, and 50% says no more")


def _by_prompt(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Iterator[Mapping[str, Any]]]]:
    return itertools.groupby(rows, key=lambda row: row["id"])


def _was_asked(row: Mapping[str, Any]) -> bool:
    """Whether a judge saw the answers of a comparison: one that judges both orders is not asked about equal ones."""
    return "first" not in row or row["answer_a"] != row["answer_b"]


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _comparison_rows(comparison: Comparison, verdicts: list[tuple[Verdict | Opinion, ...]]) -> Iterator[dict[str, Any]]:
    """One row per verdict; where both orders were judged, `first` is the answer that the judge saw first.

    Where the record says what is right, `correct_a` and `correct_b` say whose answer is; `reason` is the judge's.
    """
    prompts = comparison.prompts
    together = zip(prompts.records, prompts.rows, comparison.answers_a, comparison.answers_b, verdicts, strict=True)
    for record, row, a, b, given in together:
        expected = Expected.where_stated(row)
        checked = {} if expected is None else {"correct_a": expected.is_met_by(a), "correct_b": expected.is_met_by(b)}
        for first, said in zip("AB", given, strict=False):
            opinion = said if isinstance(said, Opinion) else Opinion(said)
            yield {
                "id": record.id,
                "prompt": prompt_text(record.prompt),
                "answer_a": a,
                "answer_b": b,
                "verdict": opinion.verdict,
                "expected": row.get("answer"),
                **checked,
                **({"first": first} if len(given) == 2 else {}),
                **({"reason": opinion.reason} if opinion.reason else {}),
            }
