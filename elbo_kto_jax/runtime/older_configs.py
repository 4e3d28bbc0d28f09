"""Configs of earlier versions: keys that came later and what a config without them meant, and keys that are gone."""

from collections.abc import Mapping
from typing import Any

# Keys of older groups, and groups, that came later.
_LATER_KEYS: dict[str, dict[str, Any]] = {
    "data": {"weights": [], "cache": ""},
    "model": {"mask_token_id": -1},
    "objective": {"label_smoothing": 0.0},
    "optimizer": {"moments_dtype": "float32", "schedule": "cosine"},
    "lora": {"targets": [], "path": ""},
    "train": {"keep_checkpoints": 0, "keep_best": "", "patience": 0},
}
_LATER_GROUPS: dict[str, Any] = {
    "benchmarks": {"table": "", "limit": 0},
    "judge": {
        "name": "verifiable",
        "model": "",
        "prompt": "",
        "temperature": 0.0,
        "parallel": 8,
        "requests_per_minute": 0.0,
        "timeout": 120.0,
        "retries": 6,
    },
    "trackers": ["tensorboard"],
}


def with_later_keys(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A config that was written for an earlier version, as this version would have written it."""
    complete = {**_LATER_GROUPS, **mapping}
    for key, meant in {**_LATER_KEYS, **_LATER_GROUPS}.items():
        found = complete.get(key)
        if isinstance(meant, dict) and isinstance(found, Mapping):
            complete[key] = {**meant, **found}
    return complete


# Keys that a recipe may no longer state, and what says it now.
GONE = {
    "config.train.one_pass_microbatches": (
        "set config.train.residuals: 'recompute' for two passes, 'device' or 'host' for one, or 'auto', which takes "
        "the fastest that fits"
    ),
}


def as_written_now(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run folder of an earlier version, as this version would have written it."""
    complete = with_later_keys(stored)
    train = complete.get("train")
    if isinstance(train, Mapping) and "one_pass_microbatches" in train:
        train = dict(train)
        passes = "recompute" if train.pop("one_pass_microbatches") == 1 else "device"
        complete["train"] = {"residuals": passes, **train}
    return complete
