"""Win rate of one checkpoint against another under a judge, and benchmarks; either or both.

    python -m elbo_kto_jax.evaluate --checkpoint=A --out=DIR
        --baseline=B --prompts=FILE.jsonl [--judge=chat --judge-model=NAME]      the win rate
        --config.tasks=gsm8k,arc_challenge                                       tasks of lm-evaluation-harness

Without --config the settings are those of the run to which A belongs, or those that suit the model.

Win rate: both checkpoints answer the same prompts under identical decoding: options config.sampler.*, and random draws
that depend on config.seed and the prompt's id alone. The judge "verifiable" needs, in each prompt record, the checkable
`answer` (a string or a list of acceptable ones); `match` may be "exact" (default), "contains" or "regex". The judge
"chat" (extra `judge`) is a model behind an OpenAI-compatible endpoint, asked in both orders: OPENAI_BASE_URL and
OPENAI_API_KEY name it (the key is sent, and never written anywhere), --judge-model or JUDGE_MODEL its model. Prompts
that it gives no verdict are counted and left out; equal answers are ties that nobody is asked about.

Tasks (extra `eval`): names that lm_eval knows, or YAML files of tasks, run as configs/tasks.py says.

    DIR/results.json        all that was found (win rate, interval, accuracies, metrics of tasks), and from what
    DIR/comparisons.jsonl   per comparison: id, prompt, answer_a, answer_b, verdict ("A", "B", "tie" or "unparsable"),
                            expected; correct_a and correct_b, where the record says what is right; first ("A" or "B"),
                            where both orders were judged; reason, where the judge gives one
    DIR/report.html         win rate with its interval, and the answers side by side
    DIR/answers/            both models' answers
    DIR/judge/              the judge's replies; neither is made or asked for twice when an evaluation is started again
    DIR/evaluation.json     what the results depend on (settings, digests of checkpoints and data), and which are done
    DIR/tasks/TASK.json     lm_eval's results; TASK.samples.jsonl its questions and answers
"""

from typing import Any

from elbo_kto_jax import cli
from elbo_kto_jax.evaluation.evaluation import Request, evaluate
from elbo_kto_jax.runtime import paths


def main(argv: list[str]) -> dict[str, Any]:
    flags, config = _parser().parse(argv)
    request = Request(
        checkpoint=flags.checkpoint,
        out=paths.at(flags.out),
        baseline=flags.baseline,
        prompts=flags.prompts,
        allow_code=flags.confirm_run_unsafe_code,
        overwrite=flags.overwrite,
    )
    return evaluate(request, config)


_VARIABLES = """environment, for --judge=chat:
  OPENAI_API_KEY        key of the endpoint; it is sent to it, and written nowhere
  OPENAI_BASE_URL       its address, before /chat/completions (default:
                        https://api.openai.com/v1); a server of your own may need no key
  JUDGE_MODEL           the judge's model, where --judge-model names none"""


def add_judge_flags(parser: cli.Flags) -> None:
    """--judge and what belongs to it, short for config.judge."""
    parser.epilog = _VARIABLES
    for key, what in (
        ("name", "verifiable, chat (needs OPENAI_API_KEY or OPENAI_BASE_URL), or a file of evaluation/judges/"),
        ("model", "judge chat: the model's name; empty: JUDGE_MODEL"),
        ("prompt", "judge chat: a file, what to ask"),
        ("temperature", "judge chat: a number, or none to send none"),
        ("parallel", "judge chat: requests at once"),
        ("requests_per_minute", "judge chat: 0: no limit of our own"),
        ("timeout", "judge chat: seconds of one attempt, from the connection to the last byte"),
        ("retries", "judge chat: of a failed request"),
    ):
        flag = "--judge" if key == "name" else f"--judge-{key.replace('_', '-')}"
        parser.add_short_form(flag, f"judge.{key}", what)


def add_task_flags(parser: cli.Flags) -> None:
    """What belongs to the tasks of lm-evaluation-harness."""
    parser.add_short_form("--task-table", "benchmarks.table", "how tasks are run, as in configs/tasks.py")
    parser.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="let tasks execute the code that the model writes"
    )


def _parser() -> cli.Flags:
    parser = cli.Flags("elbo_kto_jax.evaluate", "Win rate of a checkpoint against another under a judge; benchmarks.")
    parser.add_config_of_model()
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model A, which is evaluated")
    parser.add_argument("--baseline", default="", metavar="DIR", help="win rate: model B")
    parser.add_argument(
        "--prompts", default="", metavar="FILE.jsonl", help="win rate: records with what the judge needs"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the results go")
    add_judge_flags(parser)
    add_task_flags(parser)
    parser.add_short_form("--limit", "benchmarks.limit", "examples per task; 0: all")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    return parser


if __name__ == "__main__":
    cli.run(main)
