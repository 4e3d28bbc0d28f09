"""What a run may change when it goes on: keys on which nothing depends that it has computed."""

from collections.abc import Mapping
from typing import Any

from elbo_kto_jax.runtime import growth
from elbo_kto_jax.runtime.config import differences
from elbo_kto_jax.runtime.older_configs import as_written_now

_LONGER = ("train.steps", "train.epochs")  # these may grow
_BETWEEN = ("eval_every", "log_every", "checkpoint_every", "keep_checkpoints", "keep_best", "patience")
# Keys and whole groups. With other devices sums round differently in the last digits, as with `mesh.fsdp=-1`, which
# means whatever devices there are; and with residuals that are kept elsewhere or computed again.
_FREE = (
    *(f"train.{key}" for key in _BETWEEN),
    *("train.residuals", "data.cache", "mesh", "tasks", "benchmarks", "judge", "trackers"),
)
MAY_CHANGE = f"{' or '.join(_LONGER)} (upward), train.{{{', '.join(_BETWEEN)}}}, {', '.join(_FREE[len(_BETWEEN) :])}"


def changes_of_a_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The `differences` that matter between the config with which a run began and the one to go on with."""
    old = as_written_now(old)

    def is_free(line: str) -> bool:
        key = _key(line)
        if key in _LONGER:
            return _is_longer(old, new, key)
        return any(key == free or key.startswith(f"{free}.") for free in _FREE)

    if "sweep" in old and "sweep" in new:
        old["sweep"] = growth.grown(old["sweep"], new["sweep"])
    return [line for line in differences(old, new) if not is_free(line)]


def longer(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """How much longer the run is to become, in words; "" if it is not."""
    return "; ".join(line for line in differences(old, new) if _key(line) in _LONGER)


def _key(difference: str) -> str:
    return difference.partition(":")[0].removeprefix("config.")


def _is_longer(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> bool:
    """Whether `key` grows; from or to 0 the other key counts, and steps cannot be compared with epochs."""
    group, _, name = key.partition(".")
    return 0 < old[group][name] < new[group][name]
