"""The report of how responses came about: which token was filled when, and with what confidence."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from elbo_kto_jax.reports.charts import Chart, Series, line_chart
from elbo_kto_jax.reports.formatting import format_number
from elbo_kto_jax.reports.page import KeyNumber, Notice, conversation, flattened, write_page

MASK = "░"  # stands for a token that is still masked
_PART = "▒"  # for one that is written, of a character that is not whole yet
_CONTINUED = "⋯"  # for one that continues the character before it
_FRAMES = 24  # of a response; of more steps, some are left out
_LEVELS = (0.5, 0.8, 0.95, 0.99)  # confidences at which a token's shade changes


@dataclasses.dataclass(frozen=True)
class Trace:
    """A response and its history; the sequences have one entry per token.

    Attributes:
      prompt: what was asked: messages, or text.
      tokens: the text of each token of the response; None where it continues a character of the token before, with
        which the whole text stands.
      written_at: the step, from 0, in which each was written; -1: it was given.
      confidence: the probability of each in that step.
    """

    prompt: Sequence[Mapping[str, str]] | str
    tokens: Sequence[str | None]
    written_at: Sequence[int]
    confidence: Sequence[float]


class _Token(NamedTuple):
    """What is seen of a token, the step that wrote it (from 1; 0: it was given) and how sure the model was."""

    text: str
    step: int
    confidence: str
    level: int  # of its shade


class _Frame(NamedTuple):
    """The response after a step: texts, each with whether the step wrote it."""

    heading: str
    text: list[tuple[str, bool]]


class _Response(NamedTuple):
    prompt: list[tuple[object, object]]
    tokens: list[_Token]
    steps: int
    frames: list[_Frame]


def write_denoising_report(
    path: str | os.PathLike, *, title: str, traces: Sequence[Trace], summary: Mapping, settings: Mapping
) -> None:
    """Write the page to `path`, atomically; an earlier page there is replaced.

    Args:
        title: heading of the page.
        traces: the responses to show.
        summary: `prompts`, `tokens_per_second`, `forward_passes` and `forward_tokens` of the whole run; missing numbers
            are shown as such.
        settings: the sampler's options.
    """
    shown = f"The first {len(traces)} of {summary.get('prompts')} are shown."
    write_page(
        path,
        "denoising.html.j2",
        title=title,
        summary=_in_one_sentence(traces),
        key_numbers=_key_numbers(traces, summary),
        notices=[Notice("Not all are here.", shown)] if (summary.get("prompts") or 0) > len(traces) else [],
        charts=_charts(traces) if traces else None,
        bounds=("0", *map(str, _LEVELS), "1"),
        continued=_CONTINUED,
        responses=[_response(trace) for trace in traces],
        settings=flattened({"sampler": settings}),
    )


def _in_one_sentence(traces: Sequence[Trace]) -> str:
    if not traces:
        return "No response was written."
    written = [step for trace in traces for step in trace.written_at if step >= 0]
    steps = sum(max(trace.written_at, default=-1) + 1 for trace in traces)
    per_step = len(written) / steps if steps else float("nan")
    return (
        f"{len(traces)} responses of {format_number(len(written))} written tokens in all, "
        f"{format_number(per_step)} a step on average."
    )


def _key_numbers(traces: Sequence[Trace], summary: Mapping) -> list[KeyNumber]:
    confidence = [c for t in traces for c, step in zip(t.confidence, t.written_at, strict=True) if step >= 0]
    return [
        KeyNumber("Responses", format_number(summary.get("prompts"))),
        KeyNumber("Confidence", format_number(np.mean(confidence) if confidence else None), "mean when written"),
        KeyNumber("Speed", format_number(summary.get("tokens_per_second")), "tokens a second, compilation included"),
        KeyNumber("Forward passes", format_number(summary.get("forward_passes")), "of a whole batch"),
        KeyNumber("Forward-pass tokens", format_number(summary.get("forward_tokens")), "positions through the layers"),
    ]


def _charts(traces: Sequence[Trace]) -> dict[str, Chart]:
    """Over the steps: mean confidence of what is written, and how many tokens of a response are."""
    steps = np.concatenate([np.asarray(trace.written_at, int) for trace in traces])
    confidence = np.concatenate([np.asarray(trace.confidence, float) for trace in traces])
    last = int(steps.max(initial=-1))
    counts = np.bincount(steps[steps >= 0], minlength=last + 1)
    sums = np.bincount(steps[steps >= 0], confidence[steps >= 0], minlength=last + 1)
    means = np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    x = np.arange(1, last + 2)
    written = Series("mean", x, counts / len(traces))
    return {
        "confidence": line_chart([Series("mean", x, means)], x_label="step", y_label="probability of what is written"),
        "written": line_chart([written], x_label="step", y_label="tokens per response", y_from_zero=True),
    }


def _response(trace: Trace) -> _Response:
    tokens = [_token(*one) for one in zip(trace.tokens, trace.written_at, trace.confidence, strict=True)]
    steps = max(trace.written_at, default=-1) + 1
    return _Response(conversation(trace.prompt), tokens, steps, _frames(trace, steps))


def _token(text: str | None, step: int, confidence: float) -> _Token:
    text = _CONTINUED if text is None else text
    visible = text.replace("\n", "↵") if text.strip(" ") else "␣" * max(len(text), 1)
    level = sum(confidence >= bound for bound in _LEVELS)
    return _Token(visible, step + 1, f"{confidence:.3f}", level)


def _frames(trace: Trace, steps: int) -> list[_Frame]:
    """The response after each step, or after some of many."""
    shown = np.unique(np.linspace(1, steps, min(steps, _FRAMES)).round().astype(int)).tolist() if steps else []
    frames, before = [], 0
    for done in shown:
        new = [i for i, step in enumerate(trace.written_at) if before <= step < done]
        span = f"Step {done}" if done - before == 1 else f"Steps {before + 1} to {done}"
        sure = np.mean([trace.confidence[i] for i in new]) if new else None
        heading = f"{span}: {len(new)} {'token' if len(new) == 1 else 'tokens'}, confidence {format_number(sure)}"
        text = [part for start, stop in _characters(trace) for part in _shown(trace, start, stop, before, done)]
        frames.append(_Frame(heading, text))
        before = done
    return frames


def _characters(trace: Trace) -> list[tuple[int, int]]:
    """The tokens [start, stop) that make whole characters together, in order."""
    starts = [i for i, token in enumerate(trace.tokens) if token is not None]
    return list(itertools.pairwise([*starts, len(trace.tokens)]))


def _shown(trace: Trace, start: int, stop: int, before: int, done: int) -> list[tuple[str, bool]]:
    """Texts of tokens that make whole characters, after the step `done`, and whether new since the step `before`."""
    steps = trace.written_at[start:stop]
    if max(steps) < done:
        return [(trace.tokens[start] or "", max(steps) >= before)]
    return [(MASK if step >= done else _PART, before <= step < done) for step in steps]
