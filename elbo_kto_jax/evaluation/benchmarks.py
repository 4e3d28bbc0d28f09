"""Tasks of lm-evaluation-harness by name: how each is run (configs/tasks.py), and where its results go.

The harness itself (harness.py) is imported when a task is asked for, since it needs the extra `eval` and takes seconds.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from elbo_kto_jax.runtime.config import Config, Task
from elbo_kto_jax.runtime.extras import import_extra
from elbo_kto_jax.runtime.flags import load_config_file
from elbo_kto_jax.sampling.respond import Checkpoint

log = logging.getLogger(__name__)
TABLE = "tasks"  # the recipe of this project


def split_tasks(tasks: str) -> list[str]:
    """The names in a comma-separated list, each once."""
    return list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))


def load(names: Sequence[str], config: Config, *, allow_code: bool, flag: str) -> list[Any]:
    """The tasks `names` (`harness.Benchmark`), with their rows of the table config.benchmarks.table.

    Args:
      names: see `harness.load_benchmarks`.
      config: its `benchmarks` and `sampler`.
      allow_code: whether tasks may execute what the model writes.
      flag: the flag or config key that named the tasks, for messages.

    Raises:
      UserError: the extra is not installed, the table is wrong, or a task cannot be run.
    """
    if not names:
        return []
    harness = import_harness(flag)
    rows = table(config.benchmarks.table or TABLE)
    for name in names:
        if row := rows.get(Path(name).stem):
            config.with_sampler(row.sampler, f"{config.benchmarks.table or TABLE}: {name}")
    return harness.load_benchmarks(names, rows, allow_code=allow_code, flag=flag)


def run(benchmark: Any, checkpoint: Checkpoint, config: Config, *, allow_code: bool, out: Path) -> dict[str, float]:
    """`harness.run` on the first config.benchmarks.limit examples."""
    harness = import_harness("tasks")
    log.info("task %s: %s", benchmark.name, harness.describe(benchmark.settings))
    return harness.run(benchmark, checkpoint, config, limit=config.benchmarks.limit, allow_code=allow_code, out=out)


def table(spec: str) -> dict[str, Task]:
    """The rows of a table of tasks, by the task's name; `spec` as for `flags.load_config_file`.

    Raises:
      UserError: there is none, or a row has unknown or missing keys.
    """
    return Task.table(load_config_file(spec, "--task-table").to_dict(), spec)


def settings_of(benchmark: Any) -> dict[str, Any]:
    """What the result of a task depends on, beside the model, the config and the number of examples."""
    return {"row": dataclasses.asdict(benchmark.settings), "content": benchmark.content}


def task_file(out: Path, task: str) -> Path:
    """Where the results of a task go."""
    return out / "tasks" / f"{Path(task).stem}.json"


def import_harness(key: str) -> ModuleType:
    """evaluation/harness.py; `key` is the flag or config key that needs it."""
    return import_extra("elbo_kto_jax.evaluation.harness", key, "lm-evaluation-harness", "eval")
