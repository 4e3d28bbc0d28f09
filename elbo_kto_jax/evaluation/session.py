"""One run of requests in one event loop: who is asked next, what is repeated, and when to give up.

The official client repeats what fails and may pass, and waits as Retry-After says. Beyond that there is patience with
an endpoint that is busy while others get through, and a count of the prompts that get no reply.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence

import openai
from tqdm import tqdm

from elbo_kto_jax.evaluation.client import Lookups, build_client, request_completion
from elbo_kto_jax.evaluation.connection import Connection
from elbo_kto_jax.evaluation.pace import Pace, backoff
from elbo_kto_jax.evaluation.refusals import BUSY, Refusals
from elbo_kto_jax.evaluation.replies import OF_ONE_PROMPT, Failure, Reply, read_reply

_REFUSED_IN_A_ROW = 10  # prompts that are refused with none answered between them: it is not the prompts
_CLIENT_WAITS = 120.0  # seconds that a Retry-After header may ask of the official client


class Session:
    """One run of requests in one event loop."""

    def __init__(self, connection: Connection, prompts: Sequence[str], keep: Callable[[str, str], None]):
        """`keep` is called with each prompt and its reply."""
        self.found: dict[str, Reply] = {}
        self._connection, self._prompts, self._keep, self._secrets = connection, prompts, keep, connection.secrets
        self._refusals = Refusals(connection, self._secrets)
        self._answered = 0  # prompts
        self._refused = 0  # prompts since the last one that was answered
        self._under_way = 0  # prompts
        self._busy: set[str] = set()  # prompts that were sent back as too many since the last reply
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task | None = None

    async def run(self) -> dict[str, Reply]:
        """Asks all prompts, `parallel` at once."""
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._loop.set_default_executor(Lookups())
        waiting = iter(self._prompts)
        with tqdm(total=len(self._prompts), desc="judge", unit="request") as bar:
            pace = Pace(self._connection.requests_per_minute)
            async with build_client(self._connection, pace, self._secrets) as client:
                workers = min(self._connection.parallel, len(self._prompts))
                await asyncio.gather(*(self._work(client, waiting, bar) for _ in range(workers)))
        return self.found

    def stop(self) -> None:
        """Ends the run, from another thread."""
        if self._loop is not None and self._task is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def _work(self, client: openai.AsyncOpenAI, waiting: Iterator[str], bar: tqdm) -> None:
        """Asks one prompt after another."""
        for prompt in waiting:
            self._under_way += 1
            reply = await self._reply(client, prompt)
            self._under_way -= 1
            if reply.text:
                reply = Reply(self._secrets.cut_out(reply.text))
                self._keep(prompt, reply.text)
            self.found[prompt] = reply
            bar.update()

    async def _reply(self, client: openai.AsyncOpenAI, prompt: str) -> Reply:
        """The reply to one prompt, or why there is none.

        Raises:
          UserError: asking on has no sense, for this prompt and so for the others.
        """
        retries, repeated = self._connection.retries, 0
        while True:
            answered = self._answered
            try:
                reply = read_reply(await request_completion(client, self._connection, prompt, self._secrets))
                if reply.text or reply.reason or repeated >= retries:
                    self._answered, self._refused = self._answered + 1, 0
                    self._busy.clear()
                    return reply if reply.text or reply.reason else Reply("", "the reply is empty")
                pause = backoff(repeated)  # empty, and no word why
            except Failure as failure:
                self._refusals.check(failure, self._answered)
                if failure.status in OF_ONE_PROMPT:
                    self._busy.clear()
                    return self._refusal(failure)
                pause = backoff(repeated) if failure.retry_after is None else failure.retry_after
                was_repeated = failure.retried and pause <= _CLIENT_WAITS
                if (was_repeated or repeated >= retries) and not self._is_waiting(prompt, failure, answered):
                    raise self._refusals.of_attempts(failure) from None
            repeated += 1
            await asyncio.sleep(pause)

    def _is_waiting(self, prompt: str, failure: Failure, answered: int) -> bool:
        """Whether the endpoint is only busy: it has replied to others while it sent this prompt back, or may yet.

        `answered` is how many prompts had their reply when this one was sent.
        """
        if failure.status not in BUSY:
            return False
        self._busy.add(prompt)
        return self._answered > answered or len(self._busy) < self._under_way

    def _refusal(self, failure: Failure) -> Reply:
        """A prompt that is refused; raises UserError where that is so for too many, or for all."""
        if failure.is_filtered:
            return Reply("", "the endpoint's filter refuses the prompt")
        self._refused += 1
        if self._refused >= _REFUSED_IN_A_ROW or (self._refused == len(self._prompts) and not self._answered):
            raise self._refusals.of_all(failure, self._refused)
        return Reply("", f"the endpoint refuses the prompt ({self._refusals.words(failure)})")
