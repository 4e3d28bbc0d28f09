"""What is known of a checkpoint that is to be published: from its manifest, the run that made it, and an evaluation.

What is not known is left out; nothing is fetched over a network.
"""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elbo_kto_jax.checkpoints.folders import STEPS_FOLDER, is_checkpoint, locate
from elbo_kto_jax.checkpoints.load import load_config
from elbo_kto_jax.checkpoints.manifest import read_manifest
from elbo_kto_jax.models import registry
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import from_json
from elbo_kto_jax.runtime.workdir import CONFIG, read_metrics

log = logging.getLogger(__name__)
RESULTS = "results.json"  # of `evaluate`
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)
_LICENCE = re.compile(r"^license:\s*[\"']?([\w.-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Facts:
    """What the card of a model says of it.

    Attributes:
      family: of the architecture, such as "llada".
      needs_code: transformers needs the code that lies beside the weights.
      base: hub id or name of what the run began with; "": not known.
      data: the same of the data sets that it was trained on.
      licences: "base" and "data" -> licence, where their own cards say it.
      record: config.json of the run's working folder; {}: the checkpoint is not of a run.
      progress: the totals of the run at this checkpoint.
      adapters: rank, alpha and so on of the adapters that were trained.
      metrics: rows of metrics.jsonl up to this checkpoint.
      evaluation: results.json of an evaluation of this checkpoint.
      alone: whether the adapters are published without their base.
    """

    family: str
    needs_code: bool
    base: str
    data: Sequence[str]
    licences: Mapping[str, str]
    record: Mapping[str, Any]
    progress: Mapping[str, Any]
    adapters: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    alone: bool = False

    @property
    def config(self) -> Mapping[str, Any]:
        return self.record.get("config") or {}


def gather(source: str, *, evaluation: str | None = None, base: str | None = None) -> Facts:
    """What is known of the checkpoint `source`.

    Args:
      source: see `load_model`.
      evaluation: the folder of an evaluation; None: that of the run or beside it, if it is of this checkpoint.
      base: hub id of the model that the run began with; None: config.model.path.

    Raises:
      UserError: `source` is no model, or `evaluation` holds no results.
    """
    model, assets = load_config(source, "--source")
    found = locate(source, "--source", weights=False)
    manifest = read_manifest(found) if is_checkpoint(found) else None
    folder = paths.at(found)
    workdir = folder.parent.parent
    record = _read(workdir / CONFIG) if folder.parent.name == STEPS_FOLDER else {}
    record = record if isinstance(record.get("config"), dict) else {}
    progress = (manifest and manifest.progress) or {}
    last = progress.get("step", 0)
    config = record.get("config", {})
    began, data = str(config.get("model", {}).get("path", "")), config.get("data", {}).get("train", "")
    sets = [str(name) for name in (data if isinstance(data, list) else [data]) if name]
    licences = {"base": licence(base or began, "model"), "data": licence(sets[0], "dataset") if len(sets) == 1 else ""}
    return Facts(
        family=registry.architecture(model).name,
        needs_code="auto_map" in from_json(assets["config.json"]),
        base=base or public_name(began),
        data=[public_name(name) for name in sets],
        licences={key: said for key, said in licences.items() if said},
        record=record,
        progress=progress,
        adapters=manifest.lora.to_json() if manifest and manifest.lora else {},
        metrics=[row for row in read_metrics(workdir) if row["step"] <= last] if record else [],
        evaluation=_evaluation(evaluation, folder, workdir if record else None),
    )


def public_name(path: str) -> str:
    """How a model or data set is called for others: its hub id, or the name of a local file or folder alone."""
    return path if is_hub_id(path) else Path(path).name


def is_hub_id(path: str) -> bool:
    return HUB_ID.fullmatch(hub_name(path)) is not None and not paths.at(path).exists()


def hub_name(path: str) -> str:
    """A hub id without its revision and its split (ORG/NAME@REVISION:SPLIT)."""
    return re.split("[@:]", path, maxsplit=1)[0]


def licence(path: str, kind: str) -> str:
    """The licence that the card of a model or data set (`kind`) names, if it lies here or in the hub's cache."""
    if not path:
        return ""
    card: Any = Path(path) / "README.md"
    if is_hub_id(path):
        from huggingface_hub import try_to_load_from_cache  # here: it takes a second

        revision = path.partition("@")[2].partition(":")[0]
        card = try_to_load_from_cache(hub_name(path), "README.md", repo_type=kind, revision=revision or None)
    try:
        text = Path(card).read_text(encoding="utf-8", errors="replace") if isinstance(card, (str, Path)) else ""
    except OSError:  # there is none
        return ""
    head = _FRONT_MATTER.match(text)
    found = _LICENCE.search(head[1]) if head else None
    return found[1] if found else ""


def _evaluation(named: str | None, checkpoint: Path, workdir: Path | None) -> Mapping[str, Any]:
    if named is not None:
        if not (found := _read(paths.at(named) / RESULTS)):
            raise UserError(f"--evaluation={named}: no {RESULTS}; name the folder that `evaluate` wrote (--out)")
        return found
    places = [] if workdir is None else [workdir, workdir / "evaluation", workdir.parent / "evaluation"]
    for place in places:
        found = _read(place / RESULTS)
        if found and _same(str(found.get("checkpoint", "")), checkpoint):
            log.info("win rate and benchmarks: those of %s", place / RESULTS)
            return found
    return {}


def _same(path: str, checkpoint: Path) -> bool:
    """Whether `path`, as `evaluate` was given it, is this checkpoint, or the working folder whose last step it is."""
    found = os.path.realpath(path)
    is_last = all(
        int(step.name) <= int(checkpoint.name) for step in checkpoint.parent.iterdir() if step.name.isdecimal()
    )
    return found == os.path.realpath(checkpoint) or (is_last and found == os.path.realpath(checkpoint.parent.parent))


def _read(file: Path) -> dict[str, Any]:
    """What a JSON file says; {} where there is none, or something else."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
