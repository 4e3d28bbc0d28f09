"""Runs of the real commands that take seconds: records of sorting tasks, and the flags that shrink configs/tiny.py.

What tests count on is set here, for the values of configs/tiny.py are tuned for the quickstart.
"""

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.py"
SMALL = {
    "data.max_length": 32,
    "objective.beta": 0.1,
    "objective.desirable_weight": 1.0,
    "objective.undesirable_weight": 1.0,
    "objective.reference_point": "global_mean",
    "estimator.draws": 2,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_fraction": 0.03,
    "train.epochs": 0,
    "train.steps": 5,
    "train.global_batch_size": 4,
    "train.microbatch_tokens": 32,
    "train.residuals": "auto",
    "train.checkpoint_every": 2,
    "train.keep_checkpoints": 0,  # tests look at earlier steps
    "train.samples": 0,
    "sampler.gen_length": 4,
    "sampler.steps": 4,
    "sampler.block_length": 4,
}


def records(num: int, first: int = 0) -> list[dict[str, Any]]:
    """Sort one to five digits; every other answer is wrong, and labelled so."""
    found = []
    for i in range(first, first + num):
        digits = str(7919 * (i + 3))[: 1 + i % 5]
        answer = "".join(sorted(digits, reverse=i % 2 == 1))
        found.append(
            {
                "id": f"record {i}",
                "prompt": [{"role": "user", "content": f"Sort {digits}"}],
                "completion": [{"role": "assistant", "content": answer}],
                "label": i % 2 == 0,
            }
        )
    return found


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One row a line; a row that is a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags(settings: Mapping[str, Any], *more: str, config: str | Path = CONFIG) -> list[str]:
    """The command line of a small run: `settings` by config key, then the flags `more`."""
    values = {**SMALL, **settings}
    return [f"--config={config}", *(f"--config.{key}={value}" for key, value in values.items()), *more]


def grid(file: Path, sweep: Mapping[str, Any]) -> Path:
    """A config file of `sweep`: configs/tiny.py with these lists."""
    file.write_text(grid_text(sweep))
    return file


def grid_text(sweep: Mapping[str, Any]) -> str:
    return (
        f"import runpy\ndef get_config():\n    config = runpy.run_path({str(CONFIG)!r})['get_config']()\n"
        f"    config.sweep = {dict(sweep)!r}\n    return config\n"
    )


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of a sweep's table but for the time they took."""
    with (folder / "table.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def replace_keeping_age(file: Path, content: bytes) -> None:
    """Other content of the same size and age: only who reads it can tell."""
    before = file.stat()
    assert len(content) == before.st_size
    assert content != file.read_bytes()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
