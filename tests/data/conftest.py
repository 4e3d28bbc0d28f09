"""Fixtures of the text tests: the golden tokenizer and arrays, and files of records."""

import json
from pathlib import Path

import pytest

from elbo_kto_jax.checkpoints.assets import read_assets
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from tests.golden import Golden


@pytest.fixture(scope="session")
def goldens(golden_dir):
    return Golden(golden_dir).arrays


@pytest.fixture(scope="session")
def tokenizer(golden_dir):
    return build_tokenizer(read_assets(golden_dir / "tokenizer"), "tokenizer")


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows (objects, or a line as str or bytes) to tmp_path/name and returns the path."""

    def write(rows, name="records.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else _dump(row) for row in rows
        ]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


def _dump(row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()
