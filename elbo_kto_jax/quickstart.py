"""The main job from nothing, on a tiny model and a CPU, in minutes: bash launch/quickstart.sh [--workdir=DIR]

The task is to write five letters in capitals. A tiny model is made and fine-tuned on demonstrations of which half are
bad: they repeat the letters as they are. So it answers about half of the prompts right. Feedback (prompt, answer, good
or bad; one answer per prompt) then aligns it with ELBO-KTO, and both models answer prompts that are new to them.

    WORKDIR/data/       demonstrations.jsonl, feedback.jsonl, prompts.jsonl; distinct prompts in all three
    WORKDIR/untrained/  random weights, as a Hugging Face folder
    WORKDIR/sft/        the fine-tuning run
    WORKDIR/base-hf/    its result as a Hugging Face folder; base/ is that folder converted
    WORKDIR/aligned/    the ELBO-KTO run, with report.html
    WORKDIR/evaluation/ results.json, comparisons.jsonl, report.html

Every stage but the first, which makes data and random weights, is one of the project's own commands, shown before it
runs. --config.* go to the alignment, and --shuffle-labels takes the information out of its labels: neither that nor
--config.objective.beta=0 leaves anything to gain, and the win rate falls to about 50%. The same command in the same
folder goes on where it was interrupted.
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elbo_kto_jax import cli, evaluate, from_hf, to_hf, train, verify
from elbo_kto_jax.checkpoints import huggingface
from elbo_kto_jax.checkpoints.tiny import write_untrained
from elbo_kto_jax.data.capitals import FEEDBACK, HELD_OUT, LENGTH, write_data
from elbo_kto_jax.models import registry
from elbo_kto_jax.runtime import paths, terminal
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, remove_tree, to_json
from elbo_kto_jax.runtime.flags import command_line

CONFIG = "tiny"  # the recipe


def main(argv: list[str]) -> dict[str, Any]:
    started = time.monotonic()
    flags, overrides = _parse(argv)
    workdir, seed = paths.here(flags.workdir, "--workdir"), f"--config.seed={flags.seed}"
    _open(workdir, flags)
    feedback = workdir / "data" / ("feedback-shuffled.jsonl" if flags.shuffle_labels else "feedback.jsonl")

    _stage(1, f"making data and a random tiny {flags.architecture}: the task is to write {LENGTH} letters in capitals")
    write_data(workdir / "data", flags.seed)
    if not huggingface.is_published(workdir / "untrained"):
        write_untrained(workdir / "untrained", flags.seed, flags.architecture)

    _stage(2, "fine-tuning it (SFT) on demonstrations of which half are bad: it learns good and bad answers alike")
    sft = _run(
        train.main,
        "elbo_kto_jax.train",
        f"--config={CONFIG}:sft",
        seed,
        f"--config.model.path={workdir / 'untrained'}",
        f"--config.data.train={workdir / 'data' / 'demonstrations.jsonl'}",
        f"--workdir={workdir / 'sft'}",
    )

    _stage(3, "publishing it as a Hugging Face folder and converting that back, as with a large model")
    published, base = f"{workdir / 'base-hf'}", f"{workdir / 'base'}"
    _run(to_hf.main, "conversion.to_hf", f"--source={sft['checkpoint']}", f"--out={published}", "--overwrite")
    _run(from_hf.main, "conversion.from_hf", f"--source={published}", f"--out={base}", "--overwrite")
    _run(verify.main, "conversion.verify", f"--source={published}", f"--checkpoint={base}")

    _stage(4, f"aligning it (ELBO-KTO) with {FEEDBACK} answers that are labelled good or bad, one per prompt")
    aligned = _run(
        train.main,
        "elbo_kto_jax.train",
        f"--config={CONFIG}",
        seed,
        f"--config.model.path={base}",
        f"--config.data.train={feedback}",
        f"--workdir={workdir / 'aligned'}",
        *overrides,
    )

    _stage(5, f"asking both models {HELD_OUT} new questions, under identical decoding")
    result = _run(
        evaluate.main,
        "elbo_kto_jax.evaluate",
        f"--config={CONFIG}",
        seed,
        f"--checkpoint={aligned['checkpoint']}",
        f"--baseline={base}",
        f"--prompts={workdir / 'data' / 'prompts.jsonl'}",
        f"--out={workdir / 'evaluation'}",
        "--overwrite",
    )
    summary = {**_summary(result), "seconds": time.monotonic() - started, "report": result["report"]}
    terminal.say(_closing_words(summary, aligned))
    return summary


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    """What the quickstart tells of its evaluation."""
    kept = {key: result[key] for key in ("adjusted_win_rate", "ci95", "comparisons")}
    return kept | {"aligned_accuracy": result["accuracy_a"], "base_accuracy": result["accuracy_b"]}


def _parse(argv: list[str]) -> tuple[Any, list[str]]:
    """The flags, and the words that go on to the alignment."""
    parser = cli.Flags("launch.quickstart", "Makes a tiny model, aligns it with ELBO-KTO and measures the win rate.")
    parser.add_argument("--workdir", default="runs/quickstart", help="working folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    architectures = registry.architectures()
    parser.add_argument(
        "--architecture", choices=architectures, default="llada", help="of the tiny model (default: %(default)s)"
    )
    parser.add_argument("--shuffle-labels", action="store_true", help="align with labels that say nothing")
    parser.add_argument("--overwrite", action="store_true", help="delete what --workdir holds and start again")
    return (
        parser.parse_args([word for word in argv if not word.startswith("--config.")]),
        [word for word in argv if word.startswith("--config.")],
    )


def _open(workdir: Path, flags: Any) -> None:
    """Makes the working folder, or goes on in it where it is of the same quickstart.

    Raises:
      UserError: it is something else.
    """
    other = {} if flags.architecture == "llada" else {"architecture": flags.architecture}
    file, made = workdir / "quickstart.json", to_json({"seed": flags.seed, **other})
    if flags.overwrite and file.is_file():
        remove_tree(workdir)
    if workdir.exists() and not file.is_file() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"--workdir={workdir} exists and is not the folder of a quickstart; choose another")
    if file.is_file() and (found := file.read_bytes().decode("utf-8", "replace")) != made:
        raise UserError(
            f"--workdir={workdir} holds a quickstart with other settings ({found});\n"
            "choose another --workdir, or pass --overwrite to delete it"
        )
    atomic_write(file, made)


def _stage(number: int, what: str) -> None:
    print(f"\n[{number}/5] {what}", file=sys.stderr, flush=True)


def _run(command: Callable[[list[str]], dict[str, Any]], name: str, *arguments: str) -> dict[str, Any]:
    """Runs a command of the project in this process, and shows how it is called by itself."""
    print(f"$ {command_line(name)} {shlex.join(arguments)}", file=sys.stderr, flush=True)
    return command(list(arguments))


def _closing_words(summary: dict[str, Any], aligned: dict[str, Any]) -> str:
    low, high = summary["ci95"]
    return "\n".join(
        [
            f"right answers: base model {summary['base_accuracy']:.1%}, "
            f"aligned model {summary['aligned_accuracy']:.1%}",
            f"adjusted win rate of the aligned model: {summary['adjusted_win_rate']:.1%} "
            f"(95% interval {low:.1%} to {high:.1%}, {summary['comparisons']} comparisons, ties counted as half)",
            f"reports: {summary['report']} (answers side by side), {aligned['report']} (training curves)",
            f"next: {command_line('elbo_kto_jax.generate')} "
            + shlex.join([f"--config={CONFIG}", f"--checkpoint={aligned['checkpoint']}", "--prompt=Capitals mntzk"]),
        ]
    )


if __name__ == "__main__":
    cli.run(main)
