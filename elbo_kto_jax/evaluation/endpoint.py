"""A judge behind an OpenAI-compatible chat endpoint, asked through the official client, and nothing twice.

The official client (extra `judge`) repeats what fails and may pass, and waits as Retry-After says. Around it are a
cache on disk, a pace that all requests share, one deadline for the whole of an attempt (connection, headers and body),
patience with an endpoint that is busy while others get through, and a count of the prompts that get no reply. What an
endpoint refuses, filters, leaves empty or cuts off at its length limit has no verdict, is not kept, and ends nothing.
Requests run in a thread of their own, so that a signal is obeyed at once whatever they wait for.

Keys and passwords come from the environment and go into headers, and nowhere else: they are cut out of every text that
the endpoint sends (some echo them) before anything is logged, raised or stored. Redirects are not followed, since they
would carry the key to another host.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import email.utils
import hashlib
import json
import logging
import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import httpx2
import openai
from tqdm import tqdm

from elbo_kto_jax.evaluation.messages import Secrets, basic_credentials
from elbo_kto_jax.evaluation.replies import without_reasoning
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.runtime.files import atomic_write

_MAX_REPLY = 16 * 2**20  # bytes
_MAX_WAIT = 3600.0  # seconds that a Retry-After header may ask for
_REFUSED_IN_A_ROW = 10  # prompts that are refused with none answered between them: it is not the prompts
_CLIENT_WAITS = 120.0  # seconds that a Retry-After header may ask of the official client
_BUSY = frozenset({429, 503, 529})
_OF_ONE_PROMPT = frozenset({400, 403, 413, 422})  # refusals that other prompts need not meet
_FILTERED = re.compile(
    r"content.?filter|content_?policy|ResponsibleAIPolicy|moderation|flagged|safety|invalid_prompt", re.IGNORECASE
)
_NO_CREDIT = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
log = logging.getLogger(__name__)


def _never() -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Endpoint:
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
      cache: folder of the replies, one file each.
      stop_requested: asked again and again while replies are awaited; True ends the wait.
    """

    base_url: str = dataclasses.field(repr=False)
    model: str
    key: str = dataclasses.field(repr=False)
    temperature: float | None
    parallel: int
    requests_per_minute: float
    timeout: float
    retries: int
    cache: Path
    stop_requested: Callable[[], bool] = _never

    @property
    def shown_url(self) -> str:
        """The address for messages and records: no user, password or query."""
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """The reply to each prompt, "" where there is none; equal prompts are asked once, known ones not at all.

        Raises:
          UserError: the endpoint refuses all requests, or one fails `retries` times more. The replies so far are kept.
          Interrupted: by a signal or `stop_requested`. The replies so far are kept.
        """
        replies = {prompt: self._cached(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, reply in replies.items() if reply is None]
        if missing:
            log.info("judge %s: %d of %d replies are known", self.model, len(replies) - len(missing), len(replies))
            found = self._ask_all(missing)
            replies.update({prompt: reply.text for prompt, reply in found.items()})
            reasons = collections.Counter(reply.reason for reply in found.values() if not reply.text)
            for reason, count in reasons.items():
                log.warning(
                    "judge %s: no reply to %d of %d questions: %s; they have no verdict, and are asked again next time",
                    *(self.model, count, len(missing), reason),
                )
        return [replies[prompt] for prompt in prompts]

    def _ask_all(self, prompts: Sequence[str]) -> dict[str, "Reply"]:
        session = _Session(self, prompts)
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

    @property
    def secrets(self) -> Secrets:
        """What must not be shown of this endpoint, of the client's own headers and of the proxies on the way."""
        parts = urlsplit(self.base_url)
        found = [self.key, *_credentials(self.base_url)]
        found += [value for name, value in parse_qsl(parts.query) if "version" not in name.lower()]
        found += [line.partition(":")[2].strip() for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")]
        found += [secret for proxy in urllib.request.getproxies().values() for secret in _credentials(proxy)]
        return Secrets(found)

    # The cache.

    def _file(self, prompt: str) -> Path:
        asked = json.dumps([self.shown_url, self.model, self.temperature, prompt])
        digest = hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()
        return self.cache / digest[:2] / f"{digest}.json"

    def _cached(self, prompt: str) -> str | None:
        try:
            stored = json.loads(self._file(prompt).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # never asked, or a file that a crash of the machine left empty
            return None
        reply = stored.get("reply") if isinstance(stored, dict) and stored.get("prompt") == prompt else None
        return reply if isinstance(reply, str) and without_reasoning(reply).strip() else None

    def store(self, prompt: str, reply: str) -> None:
        stored = {"url": self.shown_url, "model": self.model, "temperature": self.temperature}
        content = json.dumps({**stored, "prompt": prompt, "reply": reply})
        atomic_write(self._file(prompt), content)


class Reply(NamedTuple):
    """What the judge said, or why it said nothing."""

    text: str
    reason: str = ""


class Failure(Exception):
    """An attempt that brought no completion.

    Attributes:
      status: of the HTTP response, or what its body states instead; 0: there was no response, or nonsense.
      codes: words that name the error and the parameter it is about, as OpenAI's API states them.
      said: what the endpoint says, as it came.
      retried: whether the official client repeated the request already.
      retry_after: seconds that the endpoint asks to wait.
    """

    def __init__(
        self,
        status: int,
        said: str,
        codes: Sequence[str] = (),
        *,
        retried: bool = False,
        retry_after: float | None = None,
    ):
        super().__init__(said)
        self.status, self.said, self.codes = status, said, codes
        self.retried, self.retry_after = retried, retry_after

    @property
    def is_filtered(self) -> bool:
        """Whether the endpoint found fault with what the prompt says."""
        return self.status in _OF_ONE_PROMPT and any(_FILTERED.search(code) for code in self.codes)

    @property
    def is_of_temperature(self) -> bool:
        """Whether the endpoint takes no temperature, or not this one."""
        named = re.search(r"['\"`]temperature['\"`]|\btemperature\b.*support", self.said[:1000])
        return self.status in (400, 422) and ("temperature" in self.codes or named is not None)


class _Session:
    """One run of requests in one event loop."""

    def __init__(self, endpoint: Endpoint, prompts: Sequence[str]):
        self.found: dict[str, Reply] = {}
        self._endpoint, self._prompts, self._secrets = endpoint, prompts, endpoint.secrets
        self._pace = Pace(endpoint.requests_per_minute)
        self._answered = 0  # prompts
        self._refused = 0  # prompts since the last one that was answered
        self._under_way = 0  # prompts
        self._busy: set[str] = set()  # prompts that were sent back as too many since the last reply
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task | None = None

    async def run(self) -> dict[str, Reply]:
        """Asks all prompts, `parallel` at once."""
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._loop.set_default_executor(_Lookups())
        waiting = iter(self._prompts)
        with tqdm(total=len(self._prompts), desc="judge", unit="request") as bar:
            async with self._client() as client:
                workers = min(self._endpoint.parallel, len(self._prompts))
                await asyncio.gather(*(self._work(client, waiting, bar) for _ in range(workers)))
        return self.found

    def stop(self) -> None:
        """Ends the run, from another thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    def _client(self) -> openai.AsyncOpenAI:
        endpoint, parts = self._endpoint, urlsplit(self._endpoint.base_url)
        for name in (
            "openai",
            "httpx2",
            "httpcore2",
        ):  # their logs have addresses and headers, whatever OPENAI_LOG says
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            return openai.AsyncOpenAI(
                base_url=endpoint.shown_url,
                api_key=endpoint.key or "none",
                default_query=dict(parse_qsl(parts.query, keep_blank_values=True)),
                timeout=endpoint.timeout,
                max_retries=endpoint.retries,
                http_client=_Wire(endpoint, self._pace),
            )
        except Exception as error:  # proxies and certificates that the environment names, of whatever kind is wrong
            said = self._secrets.one_line(f"{type(error).__name__}: {error}")
            raise UserError(
                f"the client for the judge cannot be set up ({said});\n"
                "check the variables HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and OPENAI_*"
            ) from None

    async def _work(self, client: openai.AsyncOpenAI, waiting: Iterator[str], bar: tqdm) -> None:
        for prompt in waiting:
            self._under_way += 1
            reply = await self._reply(client, prompt)
            self._under_way -= 1
            if reply.text:
                reply = Reply(self._secrets.cut_out(reply.text))
                self._endpoint.store(prompt, reply.text)
            self.found[prompt] = reply
            bar.update()

    async def _reply(self, client: openai.AsyncOpenAI, prompt: str) -> Reply:
        """The reply to one prompt, or why there is none.

        Raises:
          UserError: asking on has no sense, for this prompt and so for the others.
        """
        retries, repeated = self._endpoint.retries, 0
        while True:
            answered = self._answered
            try:
                reply = read_reply(await self._create(client, prompt))
                if reply.text or reply.reason or repeated >= retries:
                    self._answered, self._refused = self._answered + 1, 0
                    self._busy.clear()
                    return reply if reply.text or reply.reason else Reply("", "the reply is empty")
                pause = _backoff(repeated)  # empty, and no word why
            except Failure as failure:
                self._check(failure)
                if failure.status in _OF_ONE_PROMPT:
                    self._busy.clear()
                    return self._refusal(failure)
                pause = _backoff(repeated) if failure.retry_after is None else failure.retry_after
                was_repeated = failure.retried and pause <= _CLIENT_WAITS
                if (was_repeated or repeated >= retries) and not self._is_waiting(prompt, failure, answered):
                    raise self._failed(failure) from None
            repeated += 1
            await asyncio.sleep(pause)

    def _is_waiting(self, prompt: str, failure: Failure, answered: int) -> bool:
        """Whether the endpoint is only busy: it has replied to others while it sent this prompt back, or may yet.

        `answered` is how many prompts had their reply when this one was sent.
        """
        if failure.status not in _BUSY:
            return False
        self._busy.add(prompt)
        return self._answered > answered or len(self._busy) < self._under_way

    async def _create(self, client: openai.AsyncOpenAI, prompt: str) -> bytes:
        """The body of a response of status 200; raises Failure for all others."""
        endpoint = self._endpoint
        temperature = {} if endpoint.temperature is None else {"temperature": endpoint.temperature}
        text = re.sub("[\ud800-\udfff]", "\ufffd", prompt)  # halves of characters, which UTF-8 cannot carry
        try:
            response = await client.chat.completions.with_raw_response.create(
                model=endpoint.model, messages=[{"role": "user", "content": text}], **temperature
            )
        except openai.APIStatusError as error:
            said, codes = _said(error.body, error.response.text)
            wait = retry_after(error.response.headers)
            raise Failure(error.status_code, said, codes, retried=True, retry_after=wait) from None
        except openai.OpenAIError as error:
            reason = error.__cause__ or error
            raise Failure(0, f"{type(reason).__name__}: {reason}", retried=True) from None
        except (ValueError, TypeError, httpx2.InvalidURL) as error:  # headers that the environment names, say
            said = self._secrets.one_line(f"{type(error).__name__}: {error}")
            raise UserError(f"no request to the judge can be made ({said}); check the variables OPENAI_*") from None
        return response.content

    def _check(self, failure: Failure) -> None:
        """Raises UserError where every prompt would meet the failure."""
        endpoint, status = self._endpoint, failure.status
        where, said = endpoint.shown_url, self._words(failure)
        if status in (404, 405) or 300 <= status < 400:
            raise UserError(f"the judge at {where.rstrip('/')}/chat/completions: {said};\n{self._hint(failure)}")
        if not _NO_CREDIT.isdisjoint(failure.codes) or status == 402:
            raise UserError(f"the judge at {where} asks for payment: {said};\nits replies so far are kept")
        if not self._answered and failure.is_of_temperature:
            raise UserError(
                f"the judge at {where} refuses the temperature: {said};\n"
                "pass --judge-temperature=1, or --judge-temperature=none to send none"
            )
        if 400 <= status < 500 and status not in {*_OF_ONE_PROMPT, *_BUSY, 408, 409}:
            raise UserError(f"the judge at {where} refuses the request: {said}; check OPENAI_API_KEY and --judge-model")

    def _refusal(self, failure: Failure) -> Reply:
        """A prompt that is refused; raises UserError where that is so for too many, or for all."""
        if failure.is_filtered:
            return Reply("", "the endpoint's filter refuses the prompt")
        self._refused += 1
        if self._refused >= _REFUSED_IN_A_ROW or (self._refused == len(self._prompts) and not self._answered):
            raise UserError(
                f"the judge at {self._endpoint.shown_url} refuses the request: {self._words(failure)};\n"
                f"so it did with {self._refused} in a row; its replies so far are kept"
            )
        return Reply("", f"the endpoint refuses the prompt ({self._words(failure)})")

    def _failed(self, failure: Failure) -> UserError:
        hint = "" if failure.status or failure.retried else f"{self._hint(failure)}; "
        return UserError(
            f"the judge at {self._endpoint.shown_url} failed {self._endpoint.retries + 1} times, the last time with: "
            f"{self._words(failure)};\n{hint}its replies so far are kept, and the same command goes on from there"
        )

    def _words(self, failure: Failure) -> str:
        said = self._secrets.one_line(failure.said)
        return f"HTTP {failure.status} {said}".rstrip() if failure.status else said

    def _hint(self, failure: Failure) -> str:
        """What to look at where an address gives no completions."""
        path = urlsplit(self._endpoint.base_url).path.rstrip("/")
        if path.endswith("/chat/completions"):
            return "OPENAI_BASE_URL ends before /chat/completions, usually in /v1"
        if "model" in f"{failure.codes} {failure.said}".lower() and failure.status == 404:
            return (
                "check --judge-model, and that OPENAI_BASE_URL is the address it is served at (usually it ends in /v1)"
            )
        return "OPENAI_BASE_URL usually ends in /v1" + ("" if re.search(r"/v\d", path) else ", and this one does not")


class _Wire(openai.DefaultAsyncHttpxClient):
    """The HTTP below the official client: each attempt keeps the pace, and has a deadline and a bound on its size."""

    def __init__(self, endpoint: Endpoint, pace: "Pace"):
        super().__init__(follow_redirects=False, timeout=endpoint.timeout)
        self._authorization = f"Bearer {endpoint.key}" if endpoint.key else ""
        for credentials in _credentials(endpoint.base_url)[2:]:
            self._authorization = f"Basic {credentials}"
        self._pace, self._seconds = pace, endpoint.timeout

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        await self._pace.wait()
        request.headers.pop("Authorization", None)
        if self._authorization:
            request.headers["Authorization"] = self._authorization
        try:
            async with asyncio.timeout(self._seconds):
                response = await super().send(request, **{**options, "stream": True})
                try:
                    response = await _read(response)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise httpx2.ReadTimeout(f"no whole reply within {self._seconds:g} seconds", request=request) from error
        except httpx2.HTTPError:
            raise
        except Exception as error:  # whatever the layers below make of a hostile reply
            raise httpx2.ReadError(f"{type(error).__name__}: {error}", request=request) from error
        return response


async def _read(response: httpx2.Response) -> httpx2.Response:
    """The response with its whole body, unpacked."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > _MAX_REPLY:
            raise ValueError("the reply is too long")
    packing = ("content-encoding", "content-length", "transfer-encoding")
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in packing]
    return httpx2.Response(response.status_code, headers=headers, content=b"".join(parts), request=response.request)


class _Lookups(concurrent.futures.ThreadPoolExecutor):
    """The loop's helpers (they look up names), as daemons: one that hangs must not hold up the end of the program."""

    def submit(self, function: Callable, /, *arguments: Any, **options: Any) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments, **options))
                except BaseException as error:  # raised by whoever waits for the future
                    future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future


class Pace:
    """When the next request may be sent.

    Args:
      requests_per_minute: 0: at any time.
      clock: seconds.
    """

    def __init__(self, requests_per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._clock, self._next = clock, clock()

    async def wait(self) -> None:
        """Returns when the caller may send; requests are `60 / requests_per_minute` seconds apart."""
        while (rest := self._next - self._clock()) > 0:
            await asyncio.sleep(rest)
        self._next = self._clock() + self._interval


# Reading what an endpoint sends.


def read_reply(body: bytes) -> Reply:
    """The text of a chat completion, or why it has none; both empty: it has none, and does not say why.

    Raises:
      Failure: `body` is something else.
    """
    text = body.decode("utf-8-sig", errors="replace").strip()
    try:
        completion = _of_stream(text) if text.startswith(("data:", "event:", ":")) else json.loads(text)
        if isinstance(completion, dict) and completion.get("error") and not completion.get("choices"):
            raise _stated_failure(completion)
        choice = completion["choices"][0]
        if choice.get("error"):
            raise _stated_failure(choice)
        message, ended = choice["message"], choice.get("finish_reason")
        content = _text_of(message.get("content"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Failure(0, f"not a chat completion: {text[:1000]!r}") from None
    if ended in ("length", "max_tokens"):
        return Reply("", "the reply is cut off at the endpoint's limit on its length")
    if ended == "content_filter" or (message.get("refusal") and not content.strip()):
        return Reply("", "the model refuses, or a filter does")
    if without_reasoning(content).strip():
        return Reply(content)
    reasons = content.strip() or message.get("reasoning_content") or message.get("reasoning")
    return Reply("", "the reply is reasoning only" if reasons else "")


def _text_of(content: Any) -> str:
    """A message's content, or the text among its parts (beside them: reasoning, images)."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text") for part in content if part.get("type") in ("text", "output_text")]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a part without its text")
    return "".join(texts)


def _of_stream(text: str) -> dict[str, Any]:
    """The completion that server-sent events make up; some endpoints stream whatever is asked."""
    content, ended, refusal = "", None, None
    for line in text.splitlines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        if event.get("error"):
            return event
        for choice in event["choices"][:1]:
            delta = choice.get("delta") or choice.get("message") or {}
            content += _text_of(delta.get("content"))
            refusal = refusal or delta.get("refusal")
            ended = choice.get("finish_reason") or ended
    return {"choices": [{"message": {"content": content, "refusal": refusal}, "finish_reason": ended}]}


def _stated_failure(body: Mapping[str, Any]) -> Failure:
    """The failure that a body of status 200 states; some gateways have begun their answer when they learn of it."""
    said, codes = _said(body, json.dumps(body))
    statuses = [int(code) for code in codes if re.fullmatch("[45][0-9][0-9]", code)]
    return Failure(statuses[0] if statuses else 0, said, codes)


def _said(body: Any, text: str) -> tuple[str, list[str]]:
    """(message, codes) of an error as OpenAI's API states it, else the text as it came."""
    error = body.get("error", body) if isinstance(body, Mapping) else None
    if isinstance(error, str):
        return error, []
    if not isinstance(error, Mapping) or not isinstance(error.get("message"), str):
        return text, []
    inner = error.get("innererror")
    words = [error.get("code"), error.get("param"), inner.get("code") if isinstance(inner, Mapping) else None]
    return error["message"], [str(word) for word in words if word is not None]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds, at most an hour, that a Retry-After header (a number or a date) asks for."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if 0 <= seconds <= _MAX_WAIT else None


def _backoff(repeated: int) -> float:
    """Seconds before the next attempt, as the official client counts them."""
    return min(8.0, 0.5 * 2**repeated) * random.uniform(0.75, 1.0)


# Checking what the environment gives.


def _credentials(url: str) -> tuple[str, ...]:
    """(user, password, both as the header Authorization has them) of an address; nothing where it has none."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ()
    if parts.username is None and parts.password is None:
        return ()
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return user, password, basic_credentials(user, password)


def check_url(url: str, where: str) -> None:
    """Raises UserError, which does not show it, where `url`, which `where` named, is no http or https address."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or any(ord(character) <= 32 or ord(character) > 126 for character in url):
        raise UserError(f"{where}: expected an address such as https://api.openai.com/v1")
    if parts.fragment or "@" in f"{parts.path}{parts.query}":
        raise UserError(
            f"{where}: has an @ or # after the host; in a user or password, write / ? # @ as %2F %3F %23 %40"
        )


def check_key(key: str, where: str) -> None:
    """Raises UserError, which does not show it, where `key` cannot be sent in a header."""
    if any(ord(character) <= 32 or ord(character) > 126 for character in key):
        raise UserError(f"{where}: contains white space or characters that no key has; copy the key again")
