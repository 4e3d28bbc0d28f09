"""A judge behind an OpenAI-compatible chat endpoint, asked through the official client, and nothing twice.

The official client (extra `judge`) repeats what fails and may pass, and waits as Retry-After says (client.py). Around
it are a cache on disk (cache.py), a pace that all requests share (pace.py), one deadline for the whole of an attempt,
patience with an endpoint that is busy while others get through, and a count of the prompts that get no reply
(session.py). What an endpoint refuses, filters, leaves empty or cuts off at its length limit has no verdict
(replies.py), is not kept, and ends nothing. Requests run in a thread of their own, so that a signal is obeyed at once
whatever they wait for.

Keys and passwords come from the environment and go into headers, and nowhere else: they are cut out of every text that
the endpoint sends (some echo them) before anything is logged, raised or stored (messages.py).
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from elbo_kto_jax.evaluation.cache import ReplyCache
from elbo_kto_jax.evaluation.connection import Connection
from elbo_kto_jax.evaluation.replies import Reply
from elbo_kto_jax.evaluation.session import Session
from elbo_kto_jax.runtime.errors import Interrupted

log = logging.getLogger(__name__)


def _never() -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Endpoint(Connection):
    """A connection with a memory.

    Attributes:
      cache: folder of the replies, one file each.
      stop_requested: asked again and again while replies are awaited; True ends the wait.
    """

    cache: Path
    stop_requested: Callable[[], bool] = _never

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """The reply to each prompt, "" where there is none; equal prompts are asked once, known ones not at all.

        Raises:
          UserError: the endpoint refuses all requests, or one fails `retries` times more. The replies so far are kept.
          Interrupted: by a signal or `stop_requested`. The replies so far are kept.
        """
        cache = ReplyCache(self.cache, self)
        replies = {prompt: cache.load(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, reply in replies.items() if reply is None]
        if missing:
            log.info("judge %s: %d of %d replies are known", self.model, len(replies) - len(missing), len(replies))
            found = self._ask_all(missing, cache)
            replies.update({prompt: reply.text for prompt, reply in found.items()})
            reasons = collections.Counter(reply.reason for reply in found.values() if not reply.text)
            for reason, count in reasons.items():
                log.warning(
                    "judge %s: no reply to %d of %d questions: %s; they have no verdict, and are asked again next time",
                    *(self.model, count, len(missing), reason),
                )
        return [replies[prompt] or "" for prompt in prompts]

    def _ask_all(self, prompts: Sequence[str], cache: ReplyCache) -> dict[str, Reply]:
        """What became of each prompt; replies go into the cache as they come."""
        session = Session(self, prompts, cache.store)
        outcome: concurrent.futures.Future[dict[str, Reply]] = concurrent.futures.Future()

        def work() -> None:
            try:
                outcome.set_result(asyncio.run(session.run()))
            except BaseException as error:  # CancelledError among them; raised below, in the thread that waits
                outcome.set_exception(error)

        thread = threading.Thread(target=work, name="judge", daemon=True)
        thread.start()
        try:
            while not concurrent.futures.wait([outcome], timeout=0.1).done:
                if self.stop_requested():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            session.stop()
            thread.join(1.0)  # for the connections to be closed; a lookup that hangs does not end
            raise Interrupted(
                f"{len(session.found)} of {len(prompts)} replies of the judge are kept; the same command goes on"
            ) from None
        return outcome.result()
