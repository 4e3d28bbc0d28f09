"""A chat model as the judge, behind an endpoint that speaks OpenAI's protocol (OPENAI_BASE_URL, OPENAI_API_KEY)."""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax.evaluation.address import check_key, check_url
from elbo_kto_jax.evaluation.judges import Judge
from elbo_kto_jax.evaluation.kept import digest
from elbo_kto_jax.evaluation.prompts import Prompts, prompt_text
from elbo_kto_jax.evaluation.verdicts import read_verdict, without_reasoning
from elbo_kto_jax.evaluation.winrate import Opinion, Verdict
from elbo_kto_jax.runtime import config, paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.extras import import_extra
from elbo_kto_jax.runtime.messages import one_line

OPENAI_URL = "https://api.openai.com/v1"
_PROMPT = Path(__file__).resolve().parents[1] / "judge_prompt.txt"


def make(options: config.Judge, prompts: Prompts, cache: Path, stop_requested: Callable[[], bool] | None) -> Judge:
    """See judges/__init__.py."""
    template, endpoint = _template(options), endpoint_of(options, cache)
    if stop_requested is not None:
        endpoint = dataclasses.replace(endpoint, stop_requested=stop_requested)
    return chat([prompt_text(record.prompt) for record in prompts.records], endpoint.ask, template)


def describe(options: config.Judge) -> dict[str, Any]:
    """See judges/__init__.py."""
    endpoint, template = endpoint_of(options, Path()), digest(_template(options).encode())
    asked = {"url": endpoint.shown_url, "model": endpoint.model, "temperature": endpoint.temperature}
    return {**asked, "template": template}


def _template(options: config.Judge) -> str:
    path = options.prompt or str(_PROMPT)
    try:
        template = paths.at(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise UserError(f"--judge-prompt={one_line(path, 200)}: cannot be read ({reason})") from error
    check_template(template, f"--judge-prompt={one_line(path, 200)}")
    return template


def endpoint_of(options: config.Judge, cache: Path) -> Any:
    """The endpoint (`endpoint.Endpoint`) of the judge "chat".

    Raises:
      UserError: the extra is not installed, the model's name or the key is missing, or something cannot be what it
        should.
    """
    url = os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    model = options.model or os.environ.get("JUDGE_MODEL", "")
    if not model:
        raise UserError("--judge-model: missing; name the judge's model here or in JUDGE_MODEL")
    if not key and url == OPENAI_URL:
        raise UserError("OPENAI_API_KEY: not set; set it, or OPENAI_BASE_URL to an endpoint that needs no key")
    endpoint = import_extra("elbo_kto_jax.evaluation.endpoint", "--judge=chat", "the client of OpenAI", "judge")
    check_url(url, "OPENAI_BASE_URL")
    check_key(key, "OPENAI_API_KEY")
    return endpoint.Endpoint(
        base_url=url,
        model=model,
        key=key,
        temperature=options.temperature,
        parallel=options.parallel,
        requests_per_minute=options.requests_per_minute,
        timeout=options.timeout,
        retries=options.retries,
        cache=cache,
    )


def chat(prompts: Sequence[str], ask: Callable[[Sequence[str]], list[str]], template: str) -> Judge:
    """A chat model as the judge; each prompt is judged in both orders.

    Equal answers are a tie without being judged: the two orders would be the same question, and its one answer would
    count once for A and once for B. The reason of a verdict is what the reply says, verdict included: its "Answer A" is
    the one that the judge saw first.

    Args:
      prompts: the texts that were answered.
      ask: replies to a list of texts (endpoint.py); "" where there is none.
      template: what to ask, see `check_template`; the reply's verdict is [[A]], [[B]] or [[tie]].

    Raises:
      UserError: the template lacks a field.
    """
    check_template(template, "template")

    def judge(answers_a: Sequence[str], answers_b: Sequence[str]) -> list[tuple[Verdict | Opinion, ...]]:
        asked = [
            _fill(template, prompt=prompt, answer_a=first, answer_b=second)
            for prompt, a, b in zip(prompts, answers_a, answers_b, strict=True)
            if a != b
            for first, second in ((a, b), (b, a))
        ]
        replies = iter(ask(asked))
        verdicts: list[tuple[Verdict | Opinion, ...]] = []
        for a, b in zip(answers_a, answers_b, strict=True):
            if a == b:
                verdicts.append(("tie", "tie"))
            else:
                a_first, b_first = _opinion(next(replies)), _opinion(next(replies))
                verdicts.append((a_first, b_first._replace(verdict=_OTHER[b_first.verdict])))
        return verdicts

    return judge


_FIELDS = ("prompt", "answer_a", "answer_b")
_OTHER: dict[Verdict, Verdict] = {"A": "B", "B": "A", "tie": "tie", "unparsable": "unparsable"}


def _opinion(reply: str) -> Opinion:
    return Opinion(read_verdict(reply), without_reasoning(reply).strip())


def check_template(template: str, where: str) -> None:
    """Raises UserError where the judge prompt that `where` named lacks {prompt}, {answer_a} or {answer_b}."""
    missing = [f"{{{field}}}" for field in _FIELDS if f"{{{field}}}" not in template]
    if missing:
        raise UserError(f"{where}: the judge prompt lacks {', '.join(missing)}")


def _fill(template: str, **fields: str) -> str:
    """The template with its fields replaced, in one pass: an answer that contains "{prompt}" stays as it is."""
    return re.sub(r"\{(prompt|answer_a|answer_b)\}", lambda match: fields[match[1]], template)
