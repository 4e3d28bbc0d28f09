"""The report of how responses came about: which token was filled when, and with what confidence."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np

from elbo_kto_jax.reports import page
from elbo_kto_jax.reports.markup import Html, format_number, join, tag
from elbo_kto_jax.reports.svg import Series, line_chart
from elbo_kto_jax.runtime.files import atomic_write

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
    parts = [page.tiles(_key_figures(traces, summary))]
    if summary.get("prompts") and summary["prompts"] > len(traces):
        parts.append(page.notice("Not all are here.", f"The first {len(traces)} of {summary['prompts']} are shown."))
    if traces:
        parts.append(page.section("Over the steps", page.figures(_charts(traces))))
        shown = page.sample_list([_response(trace, unfolded=i == 0) for i, trace in enumerate(traces)])
        parts.append(page.section("Responses", _legend(), shown, intro=_INTRO))
    parts.append(page.section("Settings", page.settings_table({"sampler": settings})))
    atomic_write(path, page.render_page(title=title, summary=_in_one_sentence(traces), parts=parts))


_INTRO = (
    "The number below a token is the step that wrote it, and its shade is the probability that the model gave it then. "
    f"Tokens without a number were given. Of a character that several tokens make, {_CONTINUED} are the further ones."
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


def _key_figures(traces: Sequence[Trace], summary: Mapping) -> list[tuple[str, str, str]]:
    confidence = [c for t in traces for c, step in zip(t.confidence, t.written_at, strict=True) if step >= 0]
    return [
        ("Responses", format_number(summary.get("prompts")), ""),
        ("Confidence", format_number(np.mean(confidence) if confidence else None), "mean when written"),
        ("Speed", format_number(summary.get("tokens_per_second")), "tokens a second, compilation included"),
        ("Forward passes", format_number(summary.get("forward_passes")), "of a whole batch"),
        ("Forward-pass tokens", format_number(summary.get("forward_tokens")), "positions through the layers"),
    ]


def _charts(traces: Sequence[Trace]) -> list[tuple[str, Html, str]]:
    steps = np.concatenate([np.asarray(trace.written_at, int) for trace in traces])
    confidence = np.concatenate([np.asarray(trace.confidence, float) for trace in traces])
    last = int(steps.max(initial=-1))
    counts = np.bincount(steps[steps >= 0], minlength=last + 1)
    sums = np.bincount(steps[steps >= 0], confidence[steps >= 0], minlength=last + 1)
    means = np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    x = np.arange(1, last + 2)
    sure = line_chart(
        "Confidence", [Series("mean", x, means)], x_label="step", y_label="probability of what is written"
    )
    many = line_chart(
        "Tokens written",
        [Series("mean", x, counts / len(traces))],
        x_label="step",
        y_label="tokens per response",
        y_from_zero=True,
    )
    return [
        ("Confidence", sure, "Mean over the tokens that a step wrote, of all responses below."),
        ("Tokens written", many, "A response that is done writes none."),
    ]


def _response(trace: Trace, *, unfolded: bool) -> Html:
    asked = tag("div", tag("h3", "Prompt"), page.conversation(trace.prompt))
    tokens = [_token(*one) for one in zip(trace.tokens, trace.written_at, trace.confidence, strict=True)]
    answered = tag("div", tag("h3", "Response"), tag("div", *tokens, class_="tokens"), class_="answer")
    return tag("article", asked, answered, _frames(trace, unfolded=unfolded), class_="sample")


def _token(text: str | None, step: int, confidence: float) -> Html:
    """A token with the step that wrote it below, shaded by its confidence."""
    text = _CONTINUED if text is None else text
    visible = text.replace("\n", "↵") if text.strip(" ") else "␣" * max(len(text), 1)
    if step < 0:
        return tag("span", visible, class_="token given")
    level = sum(confidence >= bound for bound in _LEVELS)
    said = f"step {step + 1}, confidence {confidence:.3f}"
    return tag("span", visible, tag("small", step + 1), class_=f"token l{level}", title=said)


def _legend() -> Html:
    bounds = ("0", *map(str, _LEVELS), "1")
    names = [f"{low} to {high}" for low, high in itertools.pairwise(bounds)]
    return tag(
        "p",
        "Confidence: ",
        *[tag("span", name, class_=f"token l{level}") for level, name in enumerate(names)],
        class_="tokens key",
    )


def _frames(trace: Trace, *, unfolded: bool) -> Html:
    """The response after each step: what is masked, what is new, what was there."""
    steps = max(trace.written_at, default=-1) + 1
    shown = np.unique(np.linspace(1, steps, min(steps, _FRAMES)).round().astype(int)).tolist() if steps else []
    frames, before = [], 0
    for done in shown:
        new = [i for i, step in enumerate(trace.written_at) if before <= step < done]
        span = f"Step {done}" if done - before == 1 else f"Steps {before + 1} to {done}"
        sure = np.mean([trace.confidence[i] for i in new]) if new else None
        heading = f"{span}: {len(new)} {'token' if len(new) == 1 else 'tokens'}, confidence {format_number(sure)}"
        text = [part for start, stop in _characters(trace) for part in _shown(trace, start, stop, before, done)]
        frames.append(tag("li", tag("h3", heading), tag("div", join(*text), class_="text", dir="auto")))
        before = done
    heading, content = tag("summary", f"Step by step ({steps})"), tag("ol", *frames, class_="frames")
    return tag("details", heading, content, open=unfolded or None)


def _characters(trace: Trace) -> list[tuple[int, int]]:
    """The tokens [start, stop) that make whole characters together, in order."""
    starts = [i for i, token in enumerate(trace.tokens) if token is not None]
    return list(itertools.pairwise([*starts, len(trace.tokens)]))


def _shown(trace: Trace, start: int, stop: int, before: int, done: int) -> list[Html | str]:
    """Tokens that make whole characters, after the step `done`; what is new since the step `before` is marked."""
    steps = trace.written_at[start:stop]
    if max(steps) < done:
        return [tag("mark", trace.tokens[start]) if max(steps) >= before else trace.tokens[start]]
    return [MASK if step >= done else tag("mark", _PART) if step >= before else _PART for step in steps]
