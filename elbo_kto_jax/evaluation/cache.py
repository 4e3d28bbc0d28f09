"""The judge's replies on disk, one file each, so that nothing is asked twice."""

import hashlib
import json
from pathlib import Path

from elbo_kto_jax.evaluation.connection import Connection
from elbo_kto_jax.evaluation.verdicts import without_reasoning
from elbo_kto_jax.runtime.files import atomic_write


class ReplyCache:
    """The replies of one model at one address and temperature, in a folder."""

    def __init__(self, folder: Path, connection: Connection):
        self._folder, self._connection = folder, connection

    def load(self, prompt: str) -> str | None:
        """The reply to a prompt; None: it was never asked, or its file is damaged or holds no verdict."""
        try:
            stored = json.loads(self._file(prompt).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # never asked, or a file that a crash of the machine left empty
            return None
        reply = stored.get("reply") if isinstance(stored, dict) and stored.get("prompt") == prompt else None
        return reply if isinstance(reply, str) and without_reasoning(reply).strip() else None

    def store(self, prompt: str, reply: str) -> None:
        """Keeps a reply."""
        asked = self._connection
        stored = {"url": asked.shown_url, "model": asked.model, "temperature": asked.temperature}
        content = json.dumps({**stored, "prompt": prompt, "reply": reply})
        atomic_write(self._file(prompt), content)

    def _file(self, prompt: str) -> Path:
        connection = self._connection
        asked = json.dumps([connection.shown_url, connection.model, connection.temperature, prompt])
        digest = hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()
        return self._folder / digest[:2] / f"{digest}.json"
