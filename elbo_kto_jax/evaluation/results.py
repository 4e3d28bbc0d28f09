"""results.json: all that an evaluation found, and from what, in one file for programs.

    checkpoint, baseline      as they were named; digests: of their files
    prompts, adjusted_win_rate, ci95, wins, ties, losses, ...    as in the summary of `evaluate`
    judge                     all that its verdicts depend on
    settings                  seed, model and sampler, as in the config
    versions                  of this package, jax and Python
    tasks                     task -> its metrics, with checkpoint, digest, settings and versions of its own

A command replaces what it finds out, and keeps what others wrote into the same folder.
"""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import elbo_kto_jax
from elbo_kto_jax.evaluation.kept import read_json
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.files import atomic_write, to_json

RESULTS = "results.json"


def write_win_rate(out: Path, found: Mapping[str, Any]) -> None:
    """Puts a win rate, and what it depends on, into the results.json of the folder `out`."""
    tasks = _tasks(read_json(out / RESULTS))
    _write(out, {**found, "versions": _versions(), **({"tasks": tasks} if tasks else {})})


def write_task(out: Path, name: str, found: Mapping[str, Any]) -> None:
    """Puts the metrics of a task, and what they depend on, into the results.json of the folder `out`."""
    before = read_json(out / RESULTS) or {}
    _write(out, {**before, "tasks": {**_tasks(before), name: {**found, "versions": _versions()}}})


def _tasks(results: Mapping[str, Any] | None) -> dict[str, Any]:
    found = (results or {}).get("tasks")
    return found if isinstance(found, dict) else {}


def _versions() -> dict[str, str]:
    return {"elbo_kto_jax": elbo_kto_jax.__version__, "jax": jax.__version__, "python": platform.python_version()}


def _write(out: Path, results: Mapping[str, Any]) -> None:
    if processes.is_first():
        lines = ",\n".join(f"  {to_json(key)}: {to_json(value)}" for key, value in results.items())
        atomic_write(out / RESULTS, f"{{\n{lines}\n}}\n")
