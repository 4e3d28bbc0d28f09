"""Writing files so that no reader ever sees a part of one, and strict JSON."""

import json
import math
import os
from pathlib import Path
from typing import Any


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


def atomic_write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file under a temporary name beside it and renames it, so that no reader ever sees a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
