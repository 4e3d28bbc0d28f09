"""What a run may change when it goes on: keys of which nothing that it has computed depends."""

from collections.abc import Mapping
from typing import Any

from elbo_kto_jax.runtime import growth
from elbo_kto_jax.runtime.config import differences, with_later_keys

# Keys and whole groups.
_FREE = (
    *(f"train.{key}" for key in ("eval_every", "log_every", "checkpoint_every", "keep_checkpoints", "keep_best")),
    *("tasks", "benchmarks", "judge", "trackers"),
)


def changes_of_a_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The `differences` that matter between the config with which a run began and the one to go on with."""

    def is_free(line: str) -> bool:
        key = line.partition(":")[0].removeprefix("config.")
        return any(key == free or key.startswith(f"{free}.") for free in _FREE)

    old = with_later_keys(old)
    if "sweep" in old and "sweep" in new:
        old["sweep"] = growth.grown(old["sweep"], new["sweep"])
    return [line for line in differences(old, new) if not is_free(line)]
