"""Writing files so that no reader ever sees a part of one, reading ahead, and strict JSON."""

import concurrent.futures
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")


def to_json(value: Any) -> str:
    """One line of strict JSON; NaN and infinities become null, since JSON has no word for them."""

    def clean(x):
        if isinstance(x, dict):
            return {str(k): clean(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [clean(v) for v in x]
        if isinstance(x, float) and not math.isfinite(x):
            return None
        return clean(x.item()) if hasattr(x, "item") else x

    return json.dumps(clean(value), ensure_ascii=False)


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; the next one is made in a thread while the present one is used."""
    end = object()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item


def atomic_write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file under a temporary name beside it and renames it, so that no reader ever sees a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
