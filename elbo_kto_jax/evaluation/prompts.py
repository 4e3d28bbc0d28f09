"""The prompts of a win rate."""

import json
from typing import Any, NamedTuple

from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.data.records import Message, Record
from elbo_kto_jax.evaluation.kept import digest
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.messages import one_line


class Prompts(NamedTuple):
    """The prompts of a win rate."""

    records: list[Record]
    rows: list[dict[str, Any]]  # the same with all their fields, for the judge
    digest: str  # of their file, and of how many of it they are


def read_prompts(path: str, flag: str = "--prompts", limit: int = 0) -> Prompts:
    """The prompt records of a JSONL file; with a `limit`, the first so many.

    Raises:
      UserError: the file is missing or of another kind, or a record is bad.
    """
    if not path.endswith(".jsonl"):
        raise UserError(f"{flag}={one_line(path, 200)}: expected a file that ends in .jsonl")
    records = read_records(path, needs=("prompt",), flag=flag, limit=limit).records
    content = paths.at(path).read_bytes()
    lines = content.split(b"\n")
    rows = [json.loads(lines[int(record.where.rpartition(":")[2]) - 1]) for record in records]
    return Prompts(records, rows, digest(content + (f"\0the first {limit}".encode() if limit else b"")))


def prompt_text(prompt: list[Message] | str) -> str:
    """A prompt for the reader: a single user message without its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
