"""The card of a published model: README.md and its plots, from what is known of the checkpoint (facts.py).

The last line of README.md has a checksum of the text before it, so that a card that somebody edited is recognised.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from elbo_kto_jax import __version__
from elbo_kto_jax.publishing.facts import Facts, hub_name, is_hub_id
from elbo_kto_jax.reports.formatting import format_number
from elbo_kto_jax.reports.page import svg
from elbo_kto_jax.reports.training import curves, in_step_order, mean_of_end
from elbo_kto_jax.runtime.messages import one_line, redacted

CARD = "README.md"
_PLOTS = ("Rewards", "Reward margin", "Loss")  # of the training report
_MARK = re.compile(r"\n<!-- written by elbo_kto_jax ([0-9a-f]{16}) -->\n\Z")
_REWARDS = {
    "reward_desirable": "reward of good answers",
    "reward_undesirable": "reward of bad answers",
    "reward_margin": "reward margin",
    "eval_reward_margin": "reward margin, held-out data",
    "loss": "loss",
    "eval_loss": "loss, held-out data",
}


def model_card(facts: Facts, name: str, licence: str | None = None) -> dict[str, bytes]:
    """README.md and its plots, by their names.

    Args:
      name: of the model.
      licence: of the model; None: that of its base, where it is known.
    """
    metrics = in_step_order(facts.metrics)
    plots = {f"{_slug(one.heading)}.svg": one for one in curves(metrics) if one.heading in _PLOTS}
    rewards = []
    for key, words in _REWARDS.items():
        mean, count = mean_of_end(metrics, key)
        if count:
            unit = "" if "loss" in key else " nats"
            rewards.append((words, f"{format_number(mean)}{unit}", f"the last {count} logged" if count > 1 else "last"))
    text = _ENVIRONMENT.get_template("card.md.j2").render(
        facts=facts,
        name=name,
        header=_header(facts, licence or facts.licences.get("base")),
        settings=_settings(facts),
        rewards=rewards,
        plots=[(file, one.heading, one.caption) for file, one in plots.items()],
        win_rate=_win_rate(facts.evaluation),
        tasks=_tasks(facts.evaluation),
        start=_last_start(facts.record),
        version=__version__,
    )
    drawn = {file: svg(one.chart, one.heading).encode() for file, one in plots.items()}
    return {CARD: _marked(text), **drawn}


def is_edited(card: bytes) -> bool:
    """Whether README.md is not, or not any more, what `model_card` wrote."""
    text = card.decode("utf-8", "replace")
    mark = _MARK.search(text)
    return mark is None or _checksum(text[: mark.start()]) != mark[1]


def kept(folder: Path) -> bytes | None:
    """README.md of a folder, where somebody edited it."""
    file = folder / CARD
    content = file.read_bytes() if file.is_file() else b""
    return content if content and is_edited(content) else None


def _marked(text: str) -> bytes:
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return f"{text}\n<!-- written by elbo_kto_jax {_checksum(text)} -->\n".encode("utf-8", "replace")


def _checksum(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def _header(facts: Facts, licence: str | None) -> list[str]:
    """The lines of YAML that the hub reads; values are written as JSON, which YAML reads."""
    objective = facts.config.get("objective", {}).get("name")
    said: dict[str, Any] = {
        "license": licence,
        "base_model": hub_name(facts.base) if is_hub_id(facts.base) else None,
        "base_model_relation": ("adapter" if facts.alone else "finetune") if is_hub_id(facts.base) else None,
        "datasets": [hub_name(name) for name in facts.data if is_hub_id(name)],
        "library_name": "peft" if facts.alone else "transformers" if facts.needs_code else "elbo_kto_jax",
        "pipeline_tag": "text-generation",
        "tags": ["elbo_kto_jax", "masked-diffusion", facts.family, *([objective] if objective else [])],
    }
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in said.items() if value]


def _settings(facts: Facts) -> list[tuple[str, str]]:
    """What the run was made with, by name; what is not known is left out."""
    config, progress = facts.config, facts.progress
    objective, train = config.get("objective", {}), config.get("train", {})
    adapters, where = facts.adapters, "" if facts.alone else ", merged into these weights"
    licences = {key: f" (licence: {_code(found)})" for key, found in facts.licences.items()}
    steps = progress.get("step")
    rows = {
        "base": facts.base and _linked(facts.base, "") + licences.get("base", ""),
        "data": ", ".join(_linked(name, "datasets/") for name in facts.data) + licences.get("data", ""),
        "objective": _code(objective.get("name")),
        "beta (1/nats)": objective.get("beta"),
        "masks per example (K)": config.get("estimator", {}).get("draws"),
        "mask scheme": _code(config.get("estimator", {}).get("scheme")),
        "steps": format_number(steps) if steps else None,
        "examples": format_number(progress["examples"]) if progress.get("examples") else None,
        "batch size": train.get("global_batch_size"),
        "learning rate": config.get("optimizer", {}).get("learning_rate"),
        "schedule": config.get("optimizer", {}).get("schedule"),
        "longest example (tokens)": config.get("data", {}).get("max_length"),
        "adapters": adapters and f"rank {adapters['rank']}, alpha {adapters['alpha']:g}{where}",
        "seed": config.get("seed"),
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "", {})]


def _win_rate(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The win rate with its interval, in words; {} without one."""
    rate, interval = evaluation.get("adjusted_win_rate"), evaluation.get("ci95")
    if not isinstance(rate, float) or not isinstance(interval, list) or len(interval) != 2:
        return {}
    judge = evaluation.get("judge") or {}
    names = [str(judge[key]) for key in ("name", "model") if isinstance(judge, dict) and judge.get(key)]
    counts = {key: format_number(evaluation.get(key)) for key in ("wins", "ties", "losses", "comparisons")}
    baseline = str(evaluation.get("baseline") or "")
    return {
        "rate": f"{rate:.1%}",
        "interval": f"{interval[0]:.1%} to {interval[1]:.1%}",
        "baseline": baseline and (baseline if is_hub_id(baseline) else Path(baseline).name),
        "judge": ", ".join(names),
        **counts,
    }


def _tasks(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Task, metric and value of each benchmark."""
    tasks = evaluation.get("tasks")
    return [
        (task, metric, format_number(value))
        for task, found in (tasks if isinstance(tasks, dict) else {}).items()
        for metric, value in (found.get("metrics") or {}).items()
        if isinstance(value, (int, float))
    ]


def _last_start(record: Mapping[str, Any]) -> dict[str, Any]:
    """Command, commit, versions and devices of the run's last start, with keys and passwords cut out."""
    starts = record.get("provenance") or []
    start = starts[-1] if starts and isinstance(starts[-1], dict) else {}
    versions = {name: found for name, found in (start.get("versions") or record.get("versions") or {}).items() if found}
    devices = start.get("devices") or {}
    return {
        "command": redacted(" ".join(str(start.get("command", "")).split())),
        "commit": start.get("commit"),
        "versions": versions,
        "devices": f"{devices['number']} x {devices['kind']}" if {"number", "kind"} <= devices.keys() else "",
        "starts": len(starts),
    }


def _slug(heading: str) -> str:
    return re.sub(r"\W+", "_", heading).strip("_").lower()


def _linked(name: str, kind: str) -> str:
    """A model or data set: a link to the hub where it is from there."""
    if not is_hub_id(name):
        return _code(name)
    return f"[{_code(name)}](https://huggingface.co/{kind}{hub_name(name)})"


def _code(value: Any) -> str:
    """Foreign text in Markdown: as it is, in a code span that it cannot leave; in a table, too."""
    text = one_line(str(value), 200).replace("|", "¦") if value not in (None, "") else ""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""


_ENVIRONMENT = jinja2.Environment(  # Markdown: nothing is escaped as HTML, foreign text stands in code
    loader=jinja2.PackageLoader("elbo_kto_jax.publishing"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["code"] = _code
