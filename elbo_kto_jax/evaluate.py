"""Win rate of one checkpoint against another under a judge, and benchmarks; either or both.

    python -m elbo_kto_jax.evaluate --config=FILE.py --checkpoint=A --out=DIR
        --baseline=B --prompts=FILE.jsonl [--judge=chat --judge-model=NAME]      the win rate
        --config.tasks=gsm8k,arc_challenge                                       tasks of lm-evaluation-harness

Win rate: both checkpoints answer the same prompts under identical decoding: options config.sampler.*, and random draws
that depend on config.seed and the prompt's id alone. The judge "verifiable" needs, in each prompt record, the checkable
`answer` (a string or a list of acceptable ones); `match` may be "exact" (default), "contains" or "regex". The judge
"chat" (extra `judge`) is a model behind an OpenAI-compatible endpoint, asked in both orders: OPENAI_BASE_URL and
OPENAI_API_KEY name it (the key is sent, and never written anywhere), --judge-model or JUDGE_MODEL its model. Prompts
that it gives no verdict are counted and left out; equal answers are ties that nobody is asked about.

Tasks (extra `eval`): names that lm_eval knows, or YAML files of tasks, run as configs/tasks.py says.

    DIR/comparisons.jsonl   per comparison: id, prompt, answer_a, answer_b, verdict ("A", "B", "tie" or "unparsable"),
                            expected, and, where both orders were judged, first ("A" or "B")
    DIR/report.html         win rate with its interval, and the answers side by side
    DIR/answers/            both models' answers
    DIR/judge/              the judge's replies; neither is made or asked for twice when an evaluation is started again
    DIR/evaluation.json     what the results depend on (settings, digests of checkpoints and data), and which are done
    DIR/tasks/TASK.json     lm_eval's results; TASK.samples.jsonl its questions and answers
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from elbo_kto_jax import cli
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.data.records import Message, Record
from elbo_kto_jax.evaluation import judges, kept
from elbo_kto_jax.evaluation.address import check_key, check_url
from elbo_kto_jax.evaluation.messages import one_line, shown
from elbo_kto_jax.evaluation.winrate import win_rate
from elbo_kto_jax.reports.winrate import write_winrate_report
from elbo_kto_jax.runtime import lock, processes
from elbo_kto_jax.runtime.config import Config, Task
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.sampling.respond import Checkpoint

TASK_TABLE = Path(__file__).resolve().parent.parent / "configs" / "tasks.py"
WIN_RATE, COMPARISONS, REPORT = "win_rate", "comparisons.jsonl", "report.html"
OPENAI_URL = "https://api.openai.com/v1"
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
    planned = [out / COMPARISONS, out / REPORT] if flags.prompts else []
    for file in [*planned, *(task_file(out, task) for task in tasks)]:
        cli.refuse_existing(file, flags.overwrite or kept.is_unfinished(out))
    benchmarks = load_benchmarks(tasks, flags, config, "--config.tasks")
    prompts = judge = None
    if flags.prompts:
        prompts = read_prompts(flags.prompts)
        judge = make_judge(flags, prompts, out / "judge")
    models = [kept.pin(flags.checkpoint, "--checkpoint")]
    models += [kept.pin(flags.baseline, "--baseline")] if flags.prompts else []
    progress = kept.Progress(out, _parts(flags, config, out, prompts, benchmarks, models), flags.overwrite)
    summary: dict[str, Any] = {}
    if prompts:
        if WIN_RATE not in progress.done:
            compare(_answered(prompts, models, config, out), judge, out)
            progress.finish(WIN_RATE)
        files = {"comparisons_file": str(out / COMPARISONS), "report": str(out / REPORT)}
        summary |= {**result_of(_read_rows(out / COMPARISONS)), **files}
    metrics = {}
    checkpoint = models[0].load(config) if benchmarks else None
    for benchmark in benchmarks:
        file, name = task_file(out, benchmark.name), _part_name(benchmark)
        if name not in progress.done:
            run_benchmark(benchmark, checkpoint, config, flags, file)
            progress.finish(name)
        metrics[benchmark.name] = _import_harness("tasks").read_metrics(file, benchmark.name)
    if metrics:
        summary |= {"tasks": metrics, "results": {name: str(task_file(out, name)) for name in metrics}}
    return summary


def _part_name(benchmark: Any) -> str:
    return f"tasks/{benchmark.name}"


def _parts(
    flags: argparse.Namespace,
    config: Config,
    out: Path,
    prompts: "Prompts | None",
    benchmarks: Sequence[Any],
    models: Sequence[kept.Pinned],
) -> dict[str, kept.Part]:
    """The results that are asked for, by name, with all that they depend on."""
    tree = config.to_dict()
    base = {"checkpoint": models[0].content, **{key: tree[key] for key in ("seed", "model", "sampler")}}
    parts = {}
    if prompts:
        settings = {"baseline": models[1].content, "prompts": prompts.digest, "judge": describe_judge(flags)}
        parts[WIN_RATE] = kept.Part([out / COMPARISONS, out / REPORT], {**base, **settings})
    for benchmark in benchmarks:
        settings = {"row": dataclasses.asdict(benchmark.settings), "content": benchmark.content, "limit": flags.limit}
        parts[_part_name(benchmark)] = kept.Part([task_file(out, benchmark.name)], {**base, **settings})
    return parts


# The win rate.


class Prompts(NamedTuple):
    """The prompts of a win rate."""

    records: list[Record]
    rows: list[dict[str, Any]]  # the same with all their fields, for the judge
    digest: str  # of their file


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models' answers to the same prompts."""

    names: tuple[str, str]  # of A and of B
    prompts: Prompts
    answers_a: Sequence[str]
    answers_b: Sequence[str]


def _answered(prompts: Prompts, models: Sequence[kept.Pinned], config: Config, out: Path) -> Comparison:
    """What both models answer; of each, what was written down before is not made again."""
    names = tuple(model.source for model in models)
    cli.log.info("%d prompts to %s and to %s, under identical decoding", len(prompts.records), *names)
    texts = [
        kept.answers(
            out / "answers", model, prompts.records, prompts.digest, config, functools.partial(model.load, config)
        )
        for model in models
    ]
    return Comparison(names, prompts, *texts)


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
            examples=[{key: value for key, value in row.items() if key != "expected"} for row in rows],
            names=comparison.names,
        )
    cli.log.info("report: %s", report_file)
    return result


def result_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The win rate over the lines of a comparisons.jsonl, and `not_judged`: the comparisons of equal answers."""
    verdicts = [tuple(row["verdict"] for row in of_prompt) for _, of_prompt in _by_prompt(rows)]
    return {**dataclasses.asdict(win_rate(verdicts)), "not_judged": sum(not _was_asked(row) for row in rows)}


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
        cli.log.warning(
            "%d of %d prompts have no verdict that can be read in both orders, and are left out of the win rate",
            *(len(without), len(asked)),
        )
    if not asked:
        cli.log.warning("the two models' answers are equal throughout: nothing was judged, and 50% says no more")


def _by_prompt(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Iterator[Mapping[str, Any]]]]:
    return itertools.groupby(rows, key=lambda row: row["id"])


def _was_asked(row: Mapping[str, Any]) -> bool:
    """Whether a judge saw the answers of a comparison: one that judges both orders is not asked about equal ones."""
    return "first" not in row or row["answer_a"] != row["answer_b"]


def _read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _comparison_rows(comparison: Comparison, verdicts: list[tuple[judges.Verdict, ...]]) -> Iterator[dict[str, Any]]:
    """One row per verdict; where both orders were judged, `first` is the answer that the judge saw first."""
    prompts = comparison.prompts
    together = zip(prompts.records, prompts.rows, comparison.answers_a, comparison.answers_b, verdicts, strict=True)
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


def read_prompts(path: str, flag: str = "--prompts") -> Prompts:
    """The prompt records of a JSONL file.

    Raises:
      UserError: the file is missing or of another kind, or a record is bad.
    """
    if not path.endswith(".jsonl"):
        raise UserError(f"{flag}={one_line(path, 200)}: expected a file that ends in .jsonl")
    records = read_records(path, needs=("prompt",), flag=flag).records
    content = Path(path).read_bytes()
    lines = content.split(b"\n")
    rows = [json.loads(lines[int(record.where.rpartition(":")[2]) - 1]) for record in records]
    return Prompts(records, rows, kept.digest(content))


def prompt_text(prompt: list[Message] | str) -> str:
    """A prompt for the reader: a single user message without its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def make_judge(
    flags: argparse.Namespace, prompts: Prompts, cache: Path, stop_requested: Callable[[], bool] | None = None
) -> judges.Judge:
    """The judge that the flags of `add_judge_flags` and the environment name; its replies are kept in `cache`.

    `stop_requested` is asked while replies are awaited: True ends the wait.

    Raises:
      UserError: a flag or variable is missing or wrong, or a record lacks what the judge needs.
    """
    if flags.judge == "verifiable":
        return judges.verifiable(prompts.rows, [record.where for record in prompts.records])
    template = _judge_template(flags)
    endpoint = judge_endpoint(flags, cache)
    if stop_requested is not None:
        endpoint = dataclasses.replace(endpoint, stop_requested=stop_requested)
    return judges.chat([prompt_text(record.prompt) for record in prompts.records], endpoint.ask, template)


def describe_judge(flags: argparse.Namespace) -> dict[str, Any]:
    """What a verdict depends on."""
    if flags.judge == "verifiable":
        return {"name": "verifiable"}
    endpoint, template = judge_endpoint(flags, Path()), kept.digest(_judge_template(flags).encode())
    asked = {"url": endpoint.shown_url, "model": endpoint.model, "temperature": endpoint.temperature}
    return {**asked, "template": template}


def _judge_template(flags: argparse.Namespace) -> str:
    try:
        template = Path(flags.judge_prompt).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise UserError(f"--judge-prompt={one_line(flags.judge_prompt, 200)}: cannot be read ({reason})") from error
    judges.check_template(template, f"--judge-prompt={one_line(flags.judge_prompt, 200)}")
    return template


def judge_endpoint(flags: argparse.Namespace, cache: Path) -> Any:
    """The endpoint (`endpoint.Endpoint`) of the judge "chat".

    Raises:
      UserError: the extra is not installed, the model's name or the key is missing, or something cannot be what it
        should.
    """
    url = os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    model = flags.judge_model or os.environ.get("JUDGE_MODEL", "")
    if not model:
        raise UserError("--judge-model: missing; name the judge's model here or in JUDGE_MODEL")
    if not key and url == OPENAI_URL:
        raise UserError("OPENAI_API_KEY: not set; set it, or OPENAI_BASE_URL to an endpoint that needs no key")
    endpoint = _import_extra("elbo_kto_jax.evaluation.endpoint", "--judge=chat", "the client of OpenAI", "judge")
    check_url(url, "OPENAI_BASE_URL")
    check_key(key, "OPENAI_API_KEY")
    return endpoint.Endpoint(
        base_url=url,
        model=model,
        key=key,
        temperature=flags.judge_temperature,
        parallel=flags.judge_parallel,
        requests_per_minute=flags.judge_requests_per_minute,
        timeout=flags.judge_timeout,
        retries=flags.judge_retries,
        cache=cache,
    )


def add_judge_flags(parser: cli.Flags) -> None:
    """--judge and what belongs to it."""
    parser.add_argument("--judge", choices=("verifiable", "chat"), default="verifiable", help="default: %(default)s")
    parser.add_argument(
        "--judge-model", type=str, default="", help="judge chat: the model's name (default: JUDGE_MODEL)"
    )
    parser.add_argument("--judge-prompt", default=str(_JUDGE_PROMPT), metavar="FILE", help="judge chat: what to ask")
    number, count = functools.partial(_number, float), functools.partial(_number, int)
    parser.add_argument(
        "--judge-temperature", type=_temperature, default=0.0, help='a number, or "none" to send none (%(default)s)'
    )
    parser.add_argument(
        "--judge-parallel", type=functools.partial(count, 1), default=8, help="requests at once (%(default)s)"
    )
    parser.add_argument(
        "--judge-requests-per-minute",
        type=functools.partial(number, 0),
        default=0.0,
        help="0: no limit of our own (%(default)s)",
    )
    parser.add_argument(
        "--judge-timeout",
        type=functools.partial(number, 0.01),
        default=120.0,
        help="seconds that one attempt may take, from the connection to the last byte (%(default)s)",
    )
    parser.add_argument(
        "--judge-retries", type=functools.partial(count, 0), default=6, help="of a failed request (%(default)s)"
    )


def _number(kind: Callable[[str], float], low: float, text: str) -> float:
    """`text` as a finite number of at least `low`, for argparse."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least {low}, got {shown(text)}")
    return value


def _temperature(text: str) -> float | None:
    return None if text == "none" else _number(float, 0, text)


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
    return _import_extra("elbo_kto_jax.evaluation.harness", flag, "lm-evaluation-harness", "eval")


def _import_extra(module: str, flag: str, what: str, extra: str) -> ModuleType:
    """A module whose imports take seconds and need packages that an extra installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{flag}: needs {what} ({error}); pip install 'elbo_kto_jax[{extra}]', or from a clone "
            f"pip install '.[{extra}]'"
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
    parser.add_argument("--limit", type=functools.partial(_number, int, 0), default=0, help="examples per task; 0: all")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    return parser


if __name__ == "__main__":
    cli.run(main)
