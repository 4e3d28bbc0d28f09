"""The official client of OpenAI, and the HTTP below it.

Each attempt keeps the pace, and has one deadline for the whole of it (connection, headers and body) and a bound on its
size. Redirects are not followed, since they would carry the key to another host.
"""

import asyncio
import concurrent.futures
import logging
import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx2
import openai

from elbo_kto_jax.evaluation.address import credentials
from elbo_kto_jax.evaluation.connection import Connection
from elbo_kto_jax.evaluation.pace import Pace
from elbo_kto_jax.evaluation.replies import Failure, retry_after, stated_error
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.messages import Secrets

_MAX_REPLY = 16 * 2**20  # bytes
_LOGGERS = ("openai", "httpx2", "httpcore2")


def build_client(connection: Connection, pace: Pace, secrets: Secrets) -> openai.AsyncOpenAI:
    """The official client for an endpoint.

    Raises:
      UserError: the environment names proxies or certificates that cannot be used.
    """
    for name in _LOGGERS:  # their logs have addresses and headers, whatever OPENAI_LOG says
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return openai.AsyncOpenAI(
            base_url=connection.shown_url,
            api_key=connection.key or "none",
            default_query=dict(parse_qsl(urlsplit(connection.base_url).query, keep_blank_values=True)),
            timeout=connection.timeout,
            max_retries=connection.retries,
            http_client=_Wire(connection, pace),
        )
    except Exception as error:  # proxies and certificates that the environment names, of whatever kind is wrong
        said = secrets.one_line(f"{type(error).__name__}: {error}")
        raise UserError(
            f"the client for the judge cannot be set up ({said});\n"
            "check the variables HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and OPENAI_*"
        ) from None


async def request_completion(
    client: openai.AsyncOpenAI, connection: Connection, prompt: str, secrets: Secrets
) -> bytes:
    """The body of a response of status 200.

    Raises:
      Failure: the response is another one, or there is none.
      UserError: no request can be made.
    """
    temperature: dict[str, Any] = {} if connection.temperature is None else {"temperature": connection.temperature}
    text = re.sub("[\ud800-\udfff]", "\ufffd", prompt)  # halves of characters, which UTF-8 cannot carry
    try:
        response = await client.chat.completions.with_raw_response.create(
            model=connection.model, messages=[{"role": "user", "content": text}], **temperature
        )
    except openai.APIStatusError as error:
        said, codes = stated_error(error.body, error.response.text)
        wait = retry_after(error.response.headers)
        raise Failure(error.status_code, said, codes, retried=True, retry_after=wait) from None
    except openai.OpenAIError as error:
        reason = error.__cause__ or error
        raise Failure(0, f"{type(reason).__name__}: {reason}", retried=True) from None
    except (ValueError, TypeError, httpx2.InvalidURL) as error:  # headers that the environment names, say
        said = secrets.one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"no request to the judge can be made ({said}); check the variables OPENAI_*") from None
    return response.content


class _Wire(openai.DefaultAsyncHttpxClient):
    """The HTTP below the official client: each attempt keeps the pace, and has a deadline and a bound on its size."""

    def __init__(self, connection: Connection, pace: Pace):
        super().__init__(follow_redirects=False, timeout=connection.timeout)
        self._authorization = f"Bearer {connection.key}" if connection.key else ""
        for encoded in credentials(connection.base_url)[2:]:
            self._authorization = f"Basic {encoded}"
        self._pace, self._seconds = pace, connection.timeout

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


class Lookups(concurrent.futures.ThreadPoolExecutor):
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
