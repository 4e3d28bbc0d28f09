"""A client of OpenAI-compatible chat endpoints that asks nothing twice: retries, pace, threads, and a cache on disk.

The key comes from the environment and goes into one header, and nowhere else: it is cut out of every text that the
endpoint sends (some echo it), before anything is logged, raised or stored. Redirects are not followed, since they would
carry the key to another host. Standard library only.
"""

import concurrent.futures
import dataclasses
import email.utils
import hashlib
import http.client
import json
import logging
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from elbo_kto_jax.errors import UserError
from elbo_kto_jax.files import atomic_write

OPENAI_URL = "https://api.openai.com/v1"
_MAX_PAUSE = 60.0  # seconds between two attempts, where the endpoint does not say how long to wait
_MAX_REPLY = 16 * 2**20  # bytes
_PERMANENT = frozenset({400, 401, 403, 404, 405, 413, 422})  # statuses that asking again does not change
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A model behind POST `base_url`/chat/completions, and how to ask it.

    Attributes:
      base_url: without /chat/completions.
      model: its name there.
      key: the bearer token; "" sends none.
      temperature: of its answers.
      parallel: requests at once.
      requests_per_minute: over all threads; 0: as many as `parallel` allows.
      timeout: seconds that one request may take.
      retries: attempts after the first one that failed.
      backoff: seconds before the first retry, doubled each time; a Retry-After header takes precedence.
      cache: folder of the replies, one file each.
    """

    base_url: str
    model: str
    key: str = dataclasses.field(repr=False)
    temperature: float
    parallel: int
    requests_per_minute: float
    timeout: float
    retries: int
    backoff: float
    cache: Path

    @property
    def shown_url(self) -> str:
        """The address for messages and records: no user, password or query."""
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """The reply to each prompt; equal prompts are asked once, and what the cache has is not asked at all.

        Raises:
          UserError: the endpoint refuses the request, or fails `retries` times more. The replies so far are kept.
        """
        replies = {prompt: self._cached(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, reply in replies.items() if reply is None]
        if missing:
            log.info("judge %s: %d of %d replies are known", self.model, len(replies) - len(missing), len(replies))
            replies.update(self._ask_all(missing))
        return [replies[prompt] for prompt in prompts]

    def _ask_all(self, prompts: Sequence[str]) -> dict[str, str]:
        pace, found = Pace(self.requests_per_minute), {}
        with (
            concurrent.futures.ThreadPoolExecutor(self.parallel) as pool,
            tqdm(total=len(prompts), desc="judge", unit="request") as bar,
        ):
            asked = {pool.submit(self._ask_one, prompt, pace): prompt for prompt in prompts}
            try:
                for future in concurrent.futures.as_completed(asked):
                    found[asked[future]] = future.result()
                    bar.update()
            except BaseException:
                pace.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _ask_one(self, prompt: str, pace: "Pace") -> str:
        for attempt in range(self.retries + 1):
            pace.wait()
            try:
                reply = self._request(prompt)
            except _Transient as failure:
                if attempt == self.retries:
                    raise UserError(
                        f"the judge at {self.shown_url} failed {attempt + 1} times, the last time with: {failure};\n"
                        "its replies so far are kept, and the same command goes on from there"
                    ) from None
                # Threads that failed together must not come back together.
                pause = min(_MAX_PAUSE, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)
                pace.pause(pause if failure.retry_after is None else failure.retry_after, failure.retry_after is None)
            else:
                self._store(prompt, reply)
                return reply
        raise AssertionError("unreachable")

    def _request(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
        }
        request = urllib.request.Request(
            f"{self.base_url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "User-Agent": "elbo_kto_jax"},
            method="POST",
        )
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        deadline = time.monotonic() + self.timeout
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                return self._redacted(_content(_read(response, deadline)))
        except urllib.error.HTTPError as error:
            with error:
                said = self._redacted(_shorten(_read_error(error, deadline)))
            message = f"HTTP {error.code} {said}"
            if error.code in _PERMANENT or 300 <= error.code < 400:
                raise UserError(f"the judge at {self.shown_url} refuses the request: {message}") from None
            raise _Transient(message, _retry_after(error.headers.get("Retry-After"))) from None
        except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, cut off, too slow, no JSON
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise _Transient(self._redacted(_shorten(f"{type(reason).__name__}: {reason}"))) from None

    def _redacted(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self.key else text

    # The cache.

    def _file(self, prompt: str) -> Path:
        asked = json.dumps([self.shown_url, self.model, self.temperature, prompt])
        digest = hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()
        return self.cache / digest[:2] / f"{digest}.json"

    def _cached(self, prompt: str) -> str | None:
        try:
            stored = json.loads(self._file(prompt).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # never asked, or a file that a crash of the machine left empty
            return None
        reply = stored.get("reply") if isinstance(stored, dict) and stored.get("prompt") == prompt else None
        return reply if isinstance(reply, str) else None

    def _store(self, prompt: str, reply: str) -> None:
        stored = {"url": self.shown_url, "model": self.model, "temperature": self.temperature}
        content = json.dumps({**stored, "prompt": prompt, "reply": reply})
        atomic_write(self._file(prompt), content)


class Pace:
    """When the threads may send their next request.

    Args:
      requests_per_minute: 0: at any time.
      clock: seconds.
      sleep: waits so many seconds; returns whether it was told to stop.
    """

    def __init__(
        self,
        requests_per_minute: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], bool] | None = None,
    ):
        self._stopped = threading.Event()
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._clock, self._sleep = clock, sleep or self._stopped.wait
        self._lock = threading.Lock()
        self._next = clock()

    def wait(self) -> None:
        """Returns when the caller may send; requests are `60 / requests_per_minute` seconds apart."""
        while True:
            with self._lock:
                now = self._clock()
                if now >= self._next:
                    self._next = now + self._interval
                    break
                rest = self._next - now
            if self._sleep(rest):
                break
        if self._stopped.is_set():
            raise _Stopped

    def pause(self, seconds: float, own: bool) -> None:
        """A request failed: waits `seconds` before it is repeated; unless it is the caller's `own`, all threads do."""
        if own:
            self._sleep(seconds)
        else:
            with self._lock:
                self._next = max(self._next, self._clock() + seconds)

    def stop(self) -> None:
        """Ends all waiting; nothing more is sent."""
        self._stopped.set()


class _Stopped(Exception):
    """Another thread's request failed for good, and this one is not needed any more."""


class _Transient(Exception):
    """A failure that may not happen again."""

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def check_url(url: str, where: str) -> None:
    """Raises UserError where `url`, which `where` named, is no http or https address."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or any(ord(character) <= 32 or ord(character) > 126 for character in url):
        raise UserError(f"{where}: expected an address such as {OPENAI_URL}")


def check_key(key: str, where: str) -> None:
    """Raises UserError, which does not show it, where `key` cannot be sent in a header."""
    if any(ord(character) <= 32 or ord(character) > 126 for character in key):
        raise UserError(f"{where}: contains white space or characters that no key has; copy the key again")


def _read(response: Any, deadline: float) -> bytes:
    """The body of a response that must have arrived by `deadline`, however slowly it trickles in."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the reply takes too long")
        if size > _MAX_REPLY:
            raise ValueError("the reply is too long")
    return b"".join(parts)  # perhaps broken off, and then no JSON


def _read_error(error: urllib.error.HTTPError, deadline: float) -> str:
    """What an error's body says, as far as it can be read: the "message" of an OpenAI error, or the text."""
    try:
        text = _read(error.fp, deadline).decode(errors="replace")
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        return ""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text


def _content(body: bytes) -> str:
    """The text of a chat completion.

    Raises:
      ValueError: `body` is something else.
    """
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"not a chat completion: {body[:200].decode(errors='replace')!r}")
    return text


def _retry_after(value: str | None) -> float | None:
    """The seconds that a Retry-After header (a number or a date) asks for."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return seconds if 0 <= seconds < 3600 else None


def _shorten(text: str) -> str:
    """At most 300 characters on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:299]}…"
