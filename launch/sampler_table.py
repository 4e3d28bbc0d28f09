"""python -m launch.sampler_table --quickstart=DIR --workdir=DIR: what the sampler's speed-ups save, and what they cost.

Two models answer held-out prompts at temperature 0 under every setting of a list: the quickstart's aligned model
(--quickstart is the working folder of bash launch/quickstart.sh) and one of eight times its parameters, which is
fine-tuned here on the same task with longer words, by the quickstart's recipe.

    WORKDIR/data/, untrained/, sft/   demonstrations and prompts, random weights and fine-tuning of the bigger model
    WORKDIR/table.md                  the table; tokens are those of whole responses, and forward-pass tokens all
                                      positions that went through the layers, padding included

The training goes on where it was interrupted. Every setting answers all prompts once before the clock, for the
compilations; the clock is worth looking at on a machine that does nothing else.
"""

import dataclasses
import itertools
import shlex
import string
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elbo_kto_jax import cli, quickstart, train
from elbo_kto_jax.checkpoints import huggingface, tiny
from elbo_kto_jax.data import capitals
from elbo_kto_jax.evaluation.judges.verifiable import Expected
from elbo_kto_jax.evaluation.prompts import read_prompts
from elbo_kto_jax.runtime import paths, terminal
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.runtime.flags import load_config_file
from elbo_kto_jax.sampling.respond import open_checkpoint, respond

LENGTH = 31  # letters of the bigger model's words; with the end of the turn, 32 tokens
DEMONSTRATIONS, HELD_OUT = 10_000, 500  # prompts
BATCH = 8  # prompts at once, as in configs/kto_mix.py: with a threshold, a batch waits for its slowest in every block
DIMENSIONS = {"d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 256}
TRAINING = {  # where it differs from configs/tiny.py:sft
    "data.max_length": 152,  # two examples to a packed row
    "optimizer.learning_rate": 2e-3,
    "train.steps": 300,
    "train.global_batch_size": 16,
    "train.microbatch_tokens": 8 * 152,
    "train.samples": 0,
}
SETTINGS = {
    "one token a step": {},
    "two tokens a step": {"tokens_per_step": 2},
    "threshold": {"threshold": 0.9},
    "prefix reuse": {"cache": "prefix"},
    "dual reuse": {"cache": "dual"},
    "threshold, prefix reuse": {"threshold": 0.9, "cache": "prefix"},
    "threshold, dual reuse": {"threshold": 0.9, "cache": "dual"},
    "threshold, dual reuse, one block": {"threshold": 0.9, "cache": "dual", "one_block": True},
    "early stop": {"early_stop": True},
    "threshold, dual reuse, early stop": {"threshold": 0.9, "cache": "dual", "early_stop": True},
}


class Subject(NamedTuple):
    """A model with its prompts."""

    name: str
    checkpoint: str
    prompts: str
    gen_length: int
    block_length: int


def main(argv: list[str]) -> dict[str, Any]:
    parser = cli.Flags("launch.sampler_table", "Measures the speed-ups of the sampler on two tiny models.")
    parser.add_argument("--quickstart", required=True, metavar="DIR", help="working folder of a finished quickstart")
    parser.add_argument("--workdir", default="runs/sampler_table", help="working folder (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=HELD_OUT, help="prompts per model (default: %(default)s)")
    flags = parser.parse_flags(argv)
    workdir, small = paths.here(flags.workdir, "--workdir"), paths.here(flags.quickstart, "--quickstart")
    subjects = [
        Subject(f"{LENGTH} letters", train_bigger(workdir), str(workdir / "data" / "prompts.jsonl"), LENGTH + 1, 16),
        Subject("quickstart", str(small / "aligned"), str(small / "data" / "prompts.jsonl"), 16, 8),
    ]
    rows = [row for subject in subjects for row in measure(subject, flags.limit)]
    table = "".join(f"| {' | '.join(map(str, row))} |\n" for row in _cells(rows))
    atomic_write(workdir / "table.md", table)
    terminal.say(table)
    return {"rows": rows, "table": str(workdir / "table.md")}


def train_bigger(workdir: Path) -> str:
    """Fine-tunes the bigger model on demonstrations that are all good; returns its checkpoint."""
    _write_data(workdir / "data")
    if not huggingface.is_published(workdir / "untrained"):
        tiny.write_untrained(workdir / "untrained", 0, max_sequence_length=256, **DIMENSIONS)
    arguments = [
        f"--config={quickstart.CONFIG}:sft",
        f"--config.model.path={workdir / 'untrained'}",
        f"--config.data.train={workdir / 'data' / 'demonstrations.jsonl'}",
        f"--workdir={workdir / 'sft'}",
        *(f"--config.{key}={value}" for key, value in TRAINING.items()),
    ]
    print(f"$ python -m elbo_kto_jax.train {shlex.join(arguments)}", file=sys.stderr, flush=True)
    return train.main(arguments)["checkpoint"]


def measure(subject: Subject, limit: int) -> list[dict[str, Any]]:
    """One row per setting that differs from those before it."""
    records, rows, _ = read_prompts(subject.prompts)
    expected = [Expected.from_record(row, record.where) for row, record in zip(rows, records, strict=True)][:limit]
    base = Config.from_mapping(load_config_file(str(quickstart.CONFIG)).to_dict())
    checkpoint = open_checkpoint(subject.checkpoint, base, flag="--quickstart")
    measured = {}
    for name, setting in SETTINGS.items():
        one_block, per_step = setting.get("one_block", False), setting.get("tokens_per_step", 1)
        sampler = dataclasses.replace(
            base.sampler,
            gen_length=subject.gen_length,
            block_length=subject.gen_length if one_block else subject.block_length,
            steps=subject.gen_length // per_step,
            threshold=setting.get("threshold", 0.0),
            cache=setting.get("cache", "none"),
            early_stop=setting.get("early_stop", False),
            temperature=0.0,
            remasking="low_confidence",
            batch_size=BATCH,
        )
        if sampler in measured:
            continue
        config = dataclasses.replace(base, sampler=sampler)
        respond(checkpoint, records[:limit], config)  # compiles every program that they need
        answers = respond(checkpoint, records[:limit], config)
        tokens = answers.responses.tokens.size
        right = [one.is_met_by(text) for one, text in zip(expected, answers.texts, strict=True)]
        measured[sampler] = {
            "model": subject.name,
            "setting": name,
            "accuracy": float(np.mean(right)),
            "forward_tokens_per_token": answers.responses.forward_tokens / tokens,
            "tokens_per_second": tokens / answers.seconds,
        }
        cli.log.info("%s", to_json(measured[sampler]))
    return list(measured.values())


def _cells(rows: list[dict[str, Any]]) -> list[list[object]]:
    """The table in Markdown; the factors compare with the model's first row."""
    cells: list[list[object]] = [
        ["model", "setting", "accuracy", "forward-pass tokens per token", "fewer by", "tokens/s"],
        ["---"] * 6,
    ]
    for _, group in itertools.groupby(rows, key=lambda row: row["model"]):
        of_model = list(group)
        for row in of_model:
            cost = row["forward_tokens_per_token"]
            factor = of_model[0]["forward_tokens_per_token"] / cost
            accuracy, speed = f"{row['accuracy']:.1%}", f"{row['tokens_per_second']:,.0f}"
            cells.append([row["model"], row["setting"], accuracy, f"{cost:.1f}", f"{factor:.1f}x", speed])
    return cells


def _write_data(folder: Path) -> None:
    rng, words = np.random.default_rng(0), {}
    while len(words) < HELD_OUT + DEMONSTRATIONS:
        words["".join(rng.choice(list(string.ascii_lowercase), LENGTH))] = None
    records = [capitals.demonstration(word, label=True) for word in words]
    prompts = [{"prompt": record["prompt"], "answer": record["completion"][0]["content"]} for record in records]
    for name, rows in (("prompts", prompts[:HELD_OUT]), ("demonstrations", records[HELD_OUT:])):
        atomic_write(folder / f"{name}.jsonl", "".join(f"{to_json(row)}\n" for row in rows))


if __name__ == "__main__":
    cli.run(main)
