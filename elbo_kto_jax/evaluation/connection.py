"""A model behind an OpenAI-compatible chat endpoint, how to ask it, and what must not be shown of it."""

import dataclasses
import os
import urllib.request
from urllib.parse import parse_qsl, urlsplit

from elbo_kto_jax.evaluation.address import credentials
from elbo_kto_jax.runtime.messages import Secrets


@dataclasses.dataclass(frozen=True)
class Connection:
    """A model behind POST `base_url`/chat/completions, and how to ask it.

    Attributes:
      base_url: without /chat/completions; a user and password in it are sent as such, a query goes with every request.
      model: its name there.
      key: the bearer token; "" sends none.
      temperature: of its answers; None sends none.
      parallel: requests at once.
      requests_per_minute: over all requests; 0: as many as `parallel` allows.
      timeout: seconds that one attempt may take, from the connection to the last byte.
      retries: attempts after the first one that failed.
    """

    base_url: str = dataclasses.field(repr=False)
    model: str
    key: str = dataclasses.field(repr=False)
    temperature: float | None
    parallel: int
    requests_per_minute: float
    timeout: float
    retries: int

    @property
    def shown_url(self) -> str:
        """The address for messages and records: no user, password or query."""
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def secrets(self) -> Secrets:
        """What must not be shown of this endpoint, of the client's own headers and of the proxies on the way."""
        parts = urlsplit(self.base_url)
        found = [self.key, *credentials(self.base_url)]
        found += [value for name, value in parse_qsl(parts.query) if "version" not in name.lower()]
        found += [line.partition(":")[2].strip() for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")]
        found += [secret for proxy in urllib.request.getproxies().values() for secret in credentials(proxy)]
        return Secrets(found)
