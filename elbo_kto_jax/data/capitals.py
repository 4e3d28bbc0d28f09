"""The quickstart's task: to write five letters in capitals. Demonstrations, feedback and prompts, all distinct."""

import functools
import itertools
import json
import string
from pathlib import Path
from typing import Any

import numpy as np

from elbo_kto_jax.runtime.files import atomic_write, to_json

LETTERS, LENGTH = string.ascii_lowercase, 5  # of each word
DEMONSTRATIONS, FEEDBACK, HELD_OUT = 10_000, 2_048, 500  # prompts


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
