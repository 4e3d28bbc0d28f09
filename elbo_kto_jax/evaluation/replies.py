"""Reads what an endpoint sends: the text of a chat completion, or why there is none."""

import email.utils
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from elbo_kto_jax.evaluation.verdicts import without_reasoning

_MAX_WAIT = 3600.0  # seconds that a Retry-After header may ask for
OF_ONE_PROMPT = frozenset({400, 403, 413, 422})  # refusals that other prompts need not meet
_FILTERED = re.compile(
    r"content.?filter|content_?policy|ResponsibleAIPolicy|moderation|flagged|safety|invalid_prompt", re.IGNORECASE
)


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
        return self.status in OF_ONE_PROMPT and any(_FILTERED.search(code) for code in self.codes)

    @property
    def is_of_temperature(self) -> bool:
        """Whether the endpoint takes no temperature, or not this one."""
        named = re.search(r"['\"`]temperature['\"`]|\btemperature\b.*support", self.said[:1000])
        return self.status in (400, 422) and ("temperature" in self.codes or named is not None)


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
    said, codes = stated_error(body, json.dumps(body))
    statuses = [int(code) for code in codes if re.fullmatch("[45][0-9][0-9]", code)]
    return Failure(statuses[0] if statuses else 0, said, codes)


def stated_error(body: Any, text: str) -> tuple[str, list[str]]:
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
