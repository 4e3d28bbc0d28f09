"""What may be added to the grid of a sweep that has begun: nothing on which the results of its cells depend."""

from collections.abc import Mapping
from typing import Any


def grown(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The group `sweep` of an old config, with what `new` adds to it.

    A list may get more values. Where it had none (`draws`: each task's own number), they would take the place of cells
    that are done. A location that was left empty may be named, for the tasks that need it.
    """

    def only_adds(before: Any, now: Any) -> bool:
        if isinstance(before, list):
            return bool(before) and all(value in now for value in before)
        return before == ""

    return {**old, **{key: now for key, now in new.items() if key in old and only_adds(old[key], now)}}
