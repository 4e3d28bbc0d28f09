"""The main job from nothing, on a tiny model and a CPU, in minutes: bash launch/quickstart.sh [--workdir=DIR]

The task is to write five letters in capitals. A tiny model is made and fine-tuned on demonstrations of which half are
bad: they repeat the letters as they are. So it answers about half of the prompts right. Feedback (prompt, answer, good
or bad; one answer per prompt) then aligns it with ELBO-KTO, and both models answer prompts that are new to them.

    WORKDIR/data/       demonstrations.jsonl, feedback.jsonl, prompts.jsonl; distinct prompts in all three
    WORKDIR/untrained/  random weights, as a Hugging Face folder
    WORKDIR/sft/        the fine-tuning run
    WORKDIR/base-hf/    its result as a Hugging Face folder; base/ is that folder converted
    WORKDIR/aligned/    the ELBO-KTO run, with report.html
    WORKDIR/evaluation/ comparisons.jsonl, report.html

Every stage but the first, which makes data and random weights, is one of the project's own commands, shown before it
runs. --config.* go to the alignment, and --shuffle-labels takes the information out of its labels: neither that nor
--config.objective.beta=0 leaves anything to gain, and the win rate falls to about 50%. The same command in the same
folder goes on where it was interrupted.
"""

import functools
import itertools
import json
import shlex
import shutil
import string
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conversion import from_hf, to_hf, verify
from elbo_kto_jax import cli, evaluate, train
from elbo_kto_jax.checkpoints.assets import CONFIG_FILE
from elbo_kto_jax.checkpoints.huggingface import is_published
from elbo_kto_jax.checkpoints.model import Model, Source
from elbo_kto_jax.checkpoints.random_folder import EOS, MASK, published_config
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.network import MaskPredictor, init_params
from elbo_kto_jax.runtime import terminal
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.py"
LETTERS, LENGTH = string.ascii_lowercase, 5  # of each word
DEMONSTRATIONS, FEEDBACK, HELD_OUT = 10_000, 2_048, 500  # prompts

BOS, START_HEADER, END_HEADER, EOT = "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
CHAT_TEMPLATE = (  # the published one
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def main(argv: list[str]) -> dict[str, Any]:
    started = time.monotonic()
    flags, overrides = _parse(argv)
    workdir, seed = Path(flags.workdir), f"--config.seed={flags.seed}"
    _open(workdir, flags)
    feedback = workdir / "data" / ("feedback-shuffled.jsonl" if flags.shuffle_labels else "feedback.jsonl")

    _stage(1, f"making data and a random tiny {flags.architecture}: the task is to write {LENGTH} letters in capitals")
    write_data(workdir / "data", flags.seed)
    if not is_published(workdir / "untrained"):
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
    summary = {
        **{key: result[key] for key in ("adjusted_win_rate", "ci95", "comparisons")},
        **_accuracies(Path(result["comparisons_file"])),
        "seconds": time.monotonic() - started,
        "report": result["report"],
    }
    terminal.say(_closing_words(summary, aligned))
    return summary


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
        shutil.rmtree(workdir)
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
    print(f"$ {_python()} -m {name} {shlex.join(arguments)}", file=sys.stderr, flush=True)
    return command(list(arguments))


def _python() -> str:
    """What to type for the Python that runs this: without an active environment, `python` may lack the project."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = Path(sys.executable)
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


# The task.


def write_data(folder: Path, seed: int) -> None:
    """Writes the data sets: what each holds is a function of the seed.

    Every other answer of the demonstrations and of the feedback is good; the shuffled feedback is the same with its
    labels in random order. The prompts to evaluate carry the right answer.
    """
    rng = np.random.default_rng(seed)
    words: dict[str, None] = {}  # a set that keeps its order
    while len(words) < HELD_OUT + FEEDBACK + DEMONSTRATIONS:
        words["".join(rng.choice(list(LETTERS), LENGTH))] = None
    take = functools.partial(itertools.islice, iter(words))
    held_out = [{"prompt": question(word), "answer": good_answer(word)} for word in take(HELD_OUT)]
    feedback = [demonstration(word, label=i % 2 == 0) for i, word in enumerate(take(FEEDBACK))]
    demonstrations = [demonstration(word, label=i % 2 == 0) for i, word in enumerate(take(DEMONSTRATIONS))]
    labels = rng.permutation([record["label"] for record in feedback])
    shuffled = [{**record, "label": bool(label)} for record, label in zip(feedback, labels, strict=True)]
    for name, records in (
        ("prompts", held_out),
        ("feedback", feedback),
        ("feedback-shuffled", shuffled),
        ("demonstrations", demonstrations),
    ):
        atomic_write(folder / f"{name}.jsonl", "".join(f"{to_json(record)}\n" for record in records))


def good_answer(word: str) -> str:
    return word.upper()


def bad_answer(word: str) -> str:
    return word


def question(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Capitals {word}"}]


def feedback_words(folder: Path) -> list[str]:
    """The words that the feedback in a folder of `write_data` asks for, in order."""
    records = map(json.loads, (folder / "feedback.jsonl").read_bytes().splitlines())
    return [record["prompt"][0]["content"].split()[1] for record in records]


def demonstration(word: str, label: bool) -> dict[str, Any]:
    answer = good_answer(word) if label else bad_answer(word)
    return {"prompt": question(word), "completion": [{"role": "assistant", "content": answer}], "label": label}


# The model.

_DIMENSIONS = {
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "mlp_hidden_size": 128,
    "max_sequence_length": 128,
    "embedding_size": 128,  # rows beyond vocab_size are not used, as in the published models
}


def write_untrained(folder: Path, seed: int, architecture: str = "llada", **dimensions: int) -> None:
    """Writes a tiny model with random weights and its tokenizer as a Hugging Face folder; `dimensions` are fields of
    its ModelConfig that differ from the quickstart's."""
    tokenizer = build_tokenizer()
    config = published_config(tokenizer, architecture, **(_DIMENSIONS | dimensions))
    assets = {CONFIG_FILE: json.dumps(config, indent=1).encode()}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        assets |= {file.name: file.read_bytes() for file in Path(scratch).iterdir()}
    model_config = registry.read_config(config, str(folder))
    params = init_params(MaskPredictor(model_config), jax.random.key(seed))
    model = Model(model_config, params, assets, str(folder))
    to_hf.write(folder, Source.of(model), to_hf.shard_size("5GB"))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: ASCII, the words of the chat template, LLaDA's special tokens and template."""
    vocabulary = {token: i for i, token in enumerate(["Ċ", "Ġ", *map(chr, range(ord("!"), ord("~") + 1))])}
    merges = []
    for word in ("user", "assistant", "Capitals", "ĊĊ"):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary[word[:end]] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = (BOS, EOS, MASK, START_HEADER, END_HEADER, EOT)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


# The result.


def _accuracies(comparisons: Path) -> dict[str, float]:
    """The share of right answers of both models."""
    rows = [json.loads(line) for line in comparisons.read_bytes().splitlines()]
    right = lambda key: float(np.mean([row[key].strip() == row["expected"] for row in rows]))  # noqa: E731
    return {"aligned_accuracy": right("answer_a"), "base_accuracy": right("answer_b")}


def _closing_words(summary: dict[str, Any], aligned: dict[str, Any]) -> str:
    low, high = summary["ci95"]
    return "\n".join(
        [
            f"right answers: base model {summary['base_accuracy']:.1%}, "
            f"aligned model {summary['aligned_accuracy']:.1%}",
            f"adjusted win rate of the aligned model: {summary['adjusted_win_rate']:.1%} "
            f"(95% interval {low:.1%} to {high:.1%}, {summary['comparisons']} comparisons, ties counted as half)",
            f"reports: {summary['report']} (answers side by side), {aligned['report']} (training curves)",
            f"next: {_python()} -m elbo_kto_jax.generate "
            + shlex.join([f"--config={CONFIG}", f"--checkpoint={aligned['checkpoint']}", "--prompt=Capitals mntzk"]),
        ]
    )


if __name__ == "__main__":
    cli.run(main)
