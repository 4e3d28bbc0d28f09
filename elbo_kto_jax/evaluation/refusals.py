"""What to tell the user of requests that fail, and which failures every prompt would meet."""

import re
from urllib.parse import urlsplit

from elbo_kto_jax.evaluation.connection import Connection
from elbo_kto_jax.evaluation.replies import OF_ONE_PROMPT, Failure
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.messages import Secrets

BUSY = frozenset({429, 503, 529})  # too many requests at once, for now
_NO_CREDIT = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})


class Refusals:
    """Words for the failures of one endpoint, without its secrets."""

    def __init__(self, connection: Connection, secrets: Secrets):
        self._connection, self._secrets = connection, secrets

    def check(self, failure: Failure, answered: int) -> None:
        """Raises UserError where every prompt would meet the failure; `answered` prompts had their reply so far."""
        status, where, said = failure.status, self._connection.shown_url, self.words(failure)
        if status in (404, 405) or 300 <= status < 400:
            raise UserError(f"the judge at {where.rstrip('/')}/chat/completions: {said};\n{self._hint(failure)}")
        if not _NO_CREDIT.isdisjoint(failure.codes) or status == 402:
            raise UserError(f"the judge at {where} asks for payment: {said};\nits replies so far are kept")
        if not answered and failure.is_of_temperature:
            raise UserError(
                f"the judge at {where} refuses the temperature: {said};\n"
                "pass --judge-temperature=1, or --judge-temperature=none to send none"
            )
        if 400 <= status < 500 and status not in {*OF_ONE_PROMPT, *BUSY, 408, 409}:
            raise UserError(f"the judge at {where} refuses the request: {said}; check OPENAI_API_KEY and --judge-model")

    def of_all(self, failure: Failure, refused: int) -> UserError:
        """The error about an endpoint that refused so many prompts in a row."""
        return UserError(
            f"the judge at {self._connection.shown_url} refuses the request: {self.words(failure)};\n"
            f"so it did with {refused} in a row; its replies so far are kept"
        )

    def of_attempts(self, failure: Failure) -> UserError:
        """The error about a prompt whose attempts failed all."""
        hint = "" if failure.status or failure.retried else f"{self._hint(failure)}; "
        where, attempts = self._connection.shown_url, self._connection.retries + 1
        return UserError(
            f"the judge at {where} failed {attempts} times, the last time with: "
            f"{self.words(failure)};\n{hint}its replies so far are kept, and the same command goes on from there"
        )

    def words(self, failure: Failure) -> str:
        """The failure on one line."""
        said = self._secrets.one_line(failure.said)
        return f"HTTP {failure.status} {said}".rstrip() if failure.status else said

    def _hint(self, failure: Failure) -> str:
        """What to look at where an address gives no completions."""
        path = urlsplit(self._connection.base_url).path.rstrip("/")
        if path.endswith("/chat/completions"):
            return "OPENAI_BASE_URL ends before /chat/completions, usually in /v1"
        if "model" in f"{failure.codes} {failure.said}".lower() and failure.status == 404:
            return (
                "check --judge-model, and that OPENAI_BASE_URL is the address it is served at (usually it ends in /v1)"
            )
        return "OPENAI_BASE_URL usually ends in /v1" + ("" if re.search(r"/v\d", path) else ", and this one does not")
