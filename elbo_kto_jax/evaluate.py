"""Win rate of one checkpoint against another under a judge.

    python -m elbo_kto_jax.evaluate --config=FILE.py --checkpoint=A --baseline=B --prompts=FILE.jsonl --out=DIR

Both checkpoints answer the same prompts under identical decoding: options config.sampler.*, and random draws that
depend on config.seed and the prompt's id alone. The judge "verifiable" needs, in each prompt record, the checkable
`answer` (a string or a list of acceptable ones); `match` may be "exact" (default), "contains" or "regex".

    DIR/comparisons.jsonl   per comparison: id, prompt, answer_a, answer_b, verdict ("A", "B" or "tie"), expected
    DIR/report.html         win rate with its interval, and the answers side by side
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from elbo_kto_jax import cli, processes
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.evaluation.judges import JUDGES
from elbo_kto_jax.evaluation.winrate import win_rate
from elbo_kto_jax.files import atomic_write, to_json
from elbo_kto_jax.report.winrate import write_winrate_report
from elbo_kto_jax.sampling.respond import answer
from elbo_kto_jax.text.records import Message, Record, read_records


def main(argv: list[str]) -> dict[str, Any]:
    flags, config = _parser().parse(argv)
    comparisons_file, report_file = Path(flags.out) / "comparisons.jsonl", Path(flags.out) / "report.html"
    for file in (comparisons_file, report_file):
        cli.refuse_existing(file, flags.overwrite)
    records, rows = read_prompts(flags.prompts)
    judge = JUDGES[flags.judge](rows, [record.where for record in records])

    cli.log.info("%d prompts to %s and to %s, under identical decoding", len(records), flags.checkpoint, flags.baseline)
    answers_a = answer(flags.checkpoint, records, config, flag="--checkpoint").texts
    answers_b = answer(flags.baseline, records, config, flag="--baseline").texts
    verdicts = judge(answers_a, answers_b)

    comparisons = [
        {
            "id": record.id,
            "prompt": _text(record.prompt),
            "answer_a": a,
            "answer_b": b,
            "verdict": verdict,
            "expected": row.get("answer"),
        }
        for record, row, a, b, given in zip(records, rows, answers_a, answers_b, verdicts, strict=True)
        for verdict in given
    ]
    result = dataclasses.asdict(win_rate(verdicts))
    if processes.is_first():
        _write(flags, comparisons_file, report_file, comparisons, result)
    cli.log.info("report: %s", report_file)
    return {**result, "comparisons_file": str(comparisons_file), "report": str(report_file)}


def _write(flags: Any, comparisons_file: Path, report_file: Path, comparisons: list[dict], result: dict) -> None:
    atomic_write(comparisons_file, "".join(f"{to_json(comparison)}\n" for comparison in comparisons))
    write_winrate_report(
        report_file,
        title=f"{flags.checkpoint} against {flags.baseline}",
        summary=result,
        # The report's `expected` is the verdict that a judge should have given, not the answer to the task.
        examples=[{key: value for key, value in c.items() if key != "expected"} for c in comparisons],
        names=(flags.checkpoint, flags.baseline),
    )


def read_prompts(path: str) -> tuple[list[Record], list[dict[str, Any]]]:
    """The prompt records of a JSONL file, and the same with all their fields, for the judge.

    Raises:
      UserError: the file is missing or of another kind, or a record is bad.
    """
    if not path.endswith(".jsonl"):
        raise UserError(f"--prompts={path}: expected a file that ends in .jsonl")
    records = read_records(path, needs=("prompt",), flag="--prompts").records
    lines = Path(path).read_bytes().split(b"\n")
    return records, [json.loads(lines[int(record.where.rpartition(":")[2]) - 1]) for record in records]


def _text(prompt: list[Message] | str) -> str:
    """A prompt for the reader: a single user message without its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _parser() -> cli.Flags:
    parser = cli.Flags("elbo_kto_jax.evaluate", "Win rate of one checkpoint against another under a judge.")
    parser.add_config()
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model A, whose win rate is asked for")
    parser.add_argument("--baseline", required=True, metavar="DIR", help="model B")
    parser.add_argument("--prompts", required=True, metavar="FILE.jsonl", help="records with what the judge needs")
    parser.add_argument("--out", required=True, metavar="DIR", help="where comparisons.jsonl and report.html go")
    parser.add_argument("--judge", choices=JUDGES, default="verifiable", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    return parser


if __name__ == "__main__":
    cli.run(main)
