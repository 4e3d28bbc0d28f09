"""Win rate of one checkpoint against another under a judge, and benchmarks; either or both.

    python -m elbo_kto_jax.evaluate --config=FILE.py --checkpoint=A --out=DIR
        --baseline=B --prompts=FILE.jsonl [--judge=chat --judge-model=NAME]      the win rate
        --config.tasks=gsm8k,arc_challenge                                       tasks of lm-evaluation-harness

Win rate: both checkpoints answer the same prompts under identical decoding: options config.sampler.*, and random draws
that depend on config.seed and the prompt's id alone. The judge "verifiable" needs, in each prompt record, the checkable
`answer` (a string or a list of acceptable ones); `match` may be "exact" (default), "contains" or "regex". The judge
"chat" is a model behind an OpenAI-compatible endpoint, asked in both orders: OPENAI_BASE_URL and OPENAI_API_KEY name
it (the key is sent, and never written anywhere), --judge-model or JUDGE_MODEL its model.

Tasks (extra `eval`): names that lm_eval knows, or YAML files of tasks, run as configs/tasks.py says.

    DIR/comparisons.jsonl   per comparison: id, prompt, answer_a, answer_b, verdict ("A", "B", "tie" or "unparsable"),
                            expected, and, where both orders were judged, first ("A" or "B")
    DIR/report.html         win rate with its interval, and the answers side by side
    DIR/judge/              the judge's replies; an evaluation that is started again asks for none of them twice
    DIR/tasks/TASK.json     lm_eval's results; TASK.samples.jsonl its questions and answers
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from elbo_kto_jax import cli, lock, processes
from elbo_kto_jax.config import Config, Task
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.evaluation import endpoint, judges
from elbo_kto_jax.evaluation.winrate import win_rate
from elbo_kto_jax.files import atomic_write, to_json
from elbo_kto_jax.report.winrate import write_winrate_report
from elbo_kto_jax.sampling.respond import Checkpoint, answer, open_checkpoint
from elbo_kto_jax.text.records import Message, Record, read_records

TASK_TABLE = Path(__file__).resolve().parent.parent / "configs" / "tasks.py"
_JUDGE_PROMPT = Path(judges.__file__).with_name("judge_prompt.txt")


def main(argv: list[str]) -> dict[str, Any]:
    flags, config = _parser().parse(argv)
    with lock.inside(flags.out, "--out"):
        return _evaluate(flags, config)


def _evaluate(flags: argparse.Namespace, config: Config) -> dict[str, Any]:
    if bool(flags.baseline) != bool(flags.prompts):
        raise UserError("--baseline and --prompts: the win rate needs both, the checkpoint to compare with and prompts")
    tasks = split_tasks(config.tasks)
    if not tasks and not flags.prompts:
        raise UserError("nothing to evaluate: pass --baseline and --prompts (win rate), --config.tasks=..., or both")
    out = Path(flags.out)
    planned = [out / "comparisons.jsonl", out / "report.html"] if flags.prompts else []
    for file in [*planned, *(task_file(out, task) for task in tasks)]:
        cli.refuse_existing(file, flags.overwrite)
    benchmarks = load_benchmarks(tasks, flags, config, "--config.tasks")
    summary: dict[str, Any] = {}
    if flags.prompts:
        records, rows = read_prompts(flags.prompts)
        judge = make_judge(flags, records, rows, out / "judge")
        cli.log.info(
            "%d prompts to %s and to %s, under identical decoding", len(records), flags.checkpoint, flags.baseline
        )
        answers_a = answer(flags.checkpoint, records, config, flag="--checkpoint").texts
        answers_b = answer(flags.baseline, records, config, flag="--baseline").texts
        comparison = Comparison((flags.checkpoint, flags.baseline), records, rows, answers_a, answers_b)
        summary |= compare(comparison, judge, out)
    if benchmarks:
        checkpoint = open_checkpoint(flags.checkpoint, config, flag="--checkpoint")
        metrics = {
            benchmark.name: run_benchmark(benchmark, checkpoint, config, flags, task_file(out, benchmark.name))
            for benchmark in benchmarks
        }
        summary |= {"tasks": metrics, "results": {name: str(task_file(out, name)) for name in metrics}}
    return summary


# The win rate.


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models' answers to the same prompts."""

    names: tuple[str, str]  # of A and of B
    records: Sequence[Record]
    rows: Sequence[dict[str, Any]]  # the records with all their fields
    answers_a: Sequence[str]
    answers_b: Sequence[str]


def compare(comparison: Comparison, judge: judges.Judge, out: Path) -> dict[str, Any]:
    """Has the answers judged, writes comparisons.jsonl and report.html into `out`; returns the summary.

    Raises:
      UserError: the judge gave no prompt a verdict in every order.
    """
    verdicts = judge(comparison.answers_a, comparison.answers_b)
    rows = list(_comparison_rows(comparison, verdicts))
    comparisons_file, report_file = out / "comparisons.jsonl", out / "report.html"
    if processes.is_first():
        atomic_write(comparisons_file, "".join(f"{to_json(row)}\n" for row in rows))
    if all("unparsable" in given for given in verdicts):
        raise UserError(
            f"the judge gave none of the {len(verdicts)} prompts a verdict that can be read ({comparisons_file});\n"
            "choose another --judge-model, or a --judge-prompt that asks for [[A]], [[B]] or [[tie]]"
        )
    result = dataclasses.asdict(win_rate(verdicts))
    if processes.is_first():
        write_winrate_report(
            report_file,
            title=" against ".join(comparison.names),
            summary=result,
            # The report's `expected` is the verdict that a judge should have given, not the answer to the task.
            examples=[{key: value for key, value in row.items() if key != "expected"} for row in rows],
            names=comparison.names,
        )
    cli.log.info("report: %s", report_file)
    return {**result, "comparisons_file": str(comparisons_file), "report": str(report_file)}


def _comparison_rows(comparison: Comparison, verdicts: list[tuple[judges.Verdict, ...]]) -> Iterator[dict[str, Any]]:
    """One row per verdict; where both orders were judged, `first` is the answer that the judge saw first."""
    together = zip(
        comparison.records, comparison.rows, comparison.answers_a, comparison.answers_b, verdicts, strict=True
    )
    for record, row, a, b, given in together:
        for first, verdict in zip("AB", given, strict=False):
            yield {
                "id": record.id,
                "prompt": prompt_text(record.prompt),
                "answer_a": a,
                "answer_b": b,
                "verdict": verdict,
                "expected": row.get("answer"),
                **({"first": first} if len(given) == 2 else {}),
            }


def read_prompts(path: str, flag: str = "--prompts") -> tuple[list[Record], list[dict[str, Any]]]:
    """The prompt records of a JSONL file, and the same with all their fields, for the judge.

    Raises:
      UserError: the file is missing or of another kind, or a record is bad.
    """
    if not path.endswith(".jsonl"):
        raise UserError(f"{flag}={path}: expected a file that ends in .jsonl")
    records = read_records(path, needs=("prompt",), flag=flag).records
    lines = Path(path).read_bytes().split(b"\n")
    return records, [json.loads(lines[int(record.where.rpartition(":")[2]) - 1]) for record in records]


def prompt_text(prompt: list[Message] | str) -> str:
    """A prompt for the reader: a single user message without its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def make_judge(
    flags: argparse.Namespace, records: Sequence[Record], rows: Sequence[dict[str, Any]], cache: Path
) -> judges.Judge:
    """The judge that the flags of `add_judge_flags` and the environment name; its replies are kept in `cache`.

    Raises:
      UserError: a flag or variable is missing or wrong, or a record lacks what the judge needs.
    """
    if flags.judge == "verifiable":
        return judges.verifiable(rows, [record.where for record in records])
    try:
        template = Path(flags.judge_prompt).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--judge-prompt={flags.judge_prompt}: cannot be read ({error})") from error
    judges.check_template(template, f"--judge-prompt={flags.judge_prompt}")
    return judges.chat([prompt_text(record.prompt) for record in records], judge_endpoint(flags, cache).ask, template)


def judge_endpoint(flags: argparse.Namespace, cache: Path) -> endpoint.Endpoint:
    """The endpoint of the judge "chat".

    Raises:
      UserError: the model's name or the key is missing, or something cannot be what it should.
    """
    url = os.environ.get("OPENAI_BASE_URL") or endpoint.OPENAI_URL
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    model = flags.judge_model or os.environ.get("JUDGE_MODEL", "")
    if not model:
        raise UserError("--judge-model: missing; name the judge's model here or in JUDGE_MODEL")
    if not key and url == endpoint.OPENAI_URL:
        raise UserError("OPENAI_API_KEY: not set; set it, or OPENAI_BASE_URL to an endpoint that needs no key")
    endpoint.check_url(url, "OPENAI_BASE_URL")
    endpoint.check_key(key, "OPENAI_API_KEY")
    return endpoint.Endpoint(
        base_url=url,
        model=model,
        key=key,
        temperature=flags.judge_temperature,
        parallel=flags.judge_parallel,
        requests_per_minute=flags.judge_requests_per_minute,
        timeout=flags.judge_timeout,
        retries=flags.judge_retries,
        backoff=1.0,
        cache=cache,
    )


def add_judge_flags(parser: cli.Flags) -> None:
    """--judge and what belongs to it."""
    parser.add_argument("--judge", choices=("verifiable", "chat"), default="verifiable", help="default: %(default)s")
    parser.add_argument(
        "--judge-model", type=str, default="", help="judge chat: the model's name (default: JUDGE_MODEL)"
    )
    parser.add_argument("--judge-prompt", default=str(_JUDGE_PROMPT), metavar="FILE", help="judge chat: what to ask")
    number = lambda kind, low: lambda text: _number(kind, low, text)  # noqa: E731
    parser.add_argument("--judge-temperature", type=number(float, 0), default=0.0, help="default: %(default)s")
    parser.add_argument("--judge-parallel", type=number(int, 1), default=8, help="requests at once (%(default)s)")
    parser.add_argument(
        "--judge-requests-per-minute", type=number(float, 0), default=0.0, help="0: no limit of our own (%(default)s)"
    )
    parser.add_argument("--judge-timeout", type=number(float, 0.01), default=120.0, help="seconds (%(default)s)")
    parser.add_argument("--judge-retries", type=number(int, 0), default=6, help="of a failed request (%(default)s)")


def _number(kind: Callable[[str], float], low: float, text: str) -> float:
    """`text` as a finite number of at least `low`, for argparse."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least {low}, got {text!r}")
    return value


# The benchmarks.


def split_tasks(tasks: str) -> list[str]:
    """The names in a comma-separated list, each once."""
    return list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))


def load_benchmarks(names: Sequence[str], flags: argparse.Namespace, config: Config, flag: str) -> list[Any]:
    """The tasks `names` (`harness.Benchmark`), with the rows of --task-table; `flag` named them.

    Raises:
      UserError: the extra is not installed, the table is wrong, or a task cannot be run.
    """
    if not names:
        return []
    harness = _import_harness(flag)
    table = read_task_table(flags.task_table)
    for name in names:
        if row := table.get(Path(name).stem):
            config.with_sampler(row.sampler, f"{flags.task_table}: {name}")
    return harness.load_benchmarks(names, table, allow_code=flags.confirm_run_unsafe_code, flag=flag)


def run_benchmark(
    benchmark: Any, checkpoint: Checkpoint, config: Config, flags: argparse.Namespace, out: Path
) -> dict[str, float]:
    """`harness.run` with the flags of `add_task_flags`."""
    harness = _import_harness("tasks")
    cli.log.info("task %s: %s", benchmark.name, harness.describe(benchmark.settings))
    return harness.run(
        benchmark, checkpoint, config, limit=flags.limit, allow_code=flags.confirm_run_unsafe_code, out=out
    )


def read_task_table(path: str) -> dict[str, Task]:
    """The rows of a table of tasks (configs/tasks.py), by the task's name."""
    return Task.table(cli.load_config_file(path, "--task-table").to_dict(), path)


def task_file(out: Path, task: str) -> Path:
    """Where the results of a task go."""
    return out / "tasks" / f"{Path(task).stem}.json"


def add_task_flags(parser: cli.Flags) -> None:
    """What belongs to the tasks of lm-evaluation-harness."""
    parser.add_argument("--task-table", default=str(TASK_TABLE), metavar="FILE.py", help="default: configs/tasks.py")
    parser.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="let tasks execute the code that the model writes"
    )


def _import_harness(flag: str) -> ModuleType:
    """evaluation/harness.py, whose imports take seconds and need the extra `eval`."""
    try:
        return importlib.import_module("elbo_kto_jax.evaluation.harness")
    except ImportError as error:
        raise UserError(
            f"{flag}: needs lm-evaluation-harness ({error}); pip install 'elbo_kto_jax[eval]', or from a clone "
            "pip install '.[eval]'"
        ) from error


def _parser() -> cli.Flags:
    parser = cli.Flags("elbo_kto_jax.evaluate", "Win rate of a checkpoint against another under a judge; benchmarks.")
    parser.add_config()
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model A, which is evaluated")
    parser.add_argument("--baseline", default="", metavar="DIR", help="win rate: model B")
    parser.add_argument(
        "--prompts", default="", metavar="FILE.jsonl", help="win rate: records with what the judge needs"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the results go")
    add_judge_flags(parser)
    add_task_flags(parser)
    parser.add_argument("--limit", type=lambda text: _number(int, 0, text), default=0, help="examples per task; 0: all")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    return parser


if __name__ == "__main__":
    cli.run(main)
