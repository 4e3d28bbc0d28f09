"""Responses to prompts, written down: records or texts in, JSON lines and a page of how they came about out.

A long job keeps what it has after every few batches (unfinished.py). Which prompts share a batch depends on the prompts
and the sampler alone, so that a job that was stopped and goes on writes the same as one that was not.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from elbo_kto_jax.checkpoints.content import content_of
from elbo_kto_jax.checkpoints.folders import locate
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.reports.denoising import Trace, write_denoising_report
from elbo_kto_jax.runtime import lock, processes, terminal
from elbo_kto_jax.runtime.config import Config, Sampler
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.sampling.respond import Answers, Checkpoint, encode, open_checkpoint, respond
from elbo_kto_jax.sampling.stops import cut_response, decoded
from elbo_kto_jax.sampling.unfinished import Unfinished, folder_of, settings_of_answers

log = logging.getLogger(__name__)
SHOWN = 20  # responses on a page
_BATCHES = 8  # kept together with early_stop, where rows of several batches take each other's places
_LONGEST_CHARACTER = 8  # tokens; four bytes at most, and neighbours that share a token


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be answered.

    Attributes:
      source: the checkpoint.
      flag: the flag or config key that named it, for messages.
      prompts: a file of records; "": `texts` instead.
      texts: prompts, of which the responses are printed.
      out: file of the responses; "": none.
      html: page that shows how the first SHOWN came about; "": none.
      infill: fill the mask tokens of the records' completions.
      skip_bad: list bad records instead of stopping.
      overwrite: whether answers that were kept under other settings are dropped.
    """

    source: str
    flag: str
    prompts: str = ""
    texts: Sequence[str] = ()
    out: str = ""
    html: str = ""
    infill: bool = False
    skip_bad: bool = False
    overwrite: bool = False


def write_responses(request: Request, config: Config) -> dict[str, Any]:
    """Answers the prompts with the options config.sampler, and writes or prints the responses; the summary.

    Raises:
      UserError: something about the checkpoint, the prompts or the sampler has to be mended.
      Interrupted: by a signal. The responses so far are kept.
    """
    with lock.beside(request.out, "--out") if request.out else contextlib.nullcontext():
        records = _read(request) if request.prompts else []
        checkpoint = open_checkpoint(request.source, config, flag=request.flag)
        if not request.prompts:
            records = _records_of_texts(request.texts, as_messages=checkpoint.tokenizer.chat_template is not None)
        job = _Job(request, config, checkpoint, records)
        job.run()
        summary = job.summary
        if processes.is_first():
            _write(job, summary)
        job.finish()
    return summary


class _Job:
    """The prompts in lots, each answered by itself, and the parts that came of them.

    A part has the numbers of its lot, the rows of the output and, for responses that a page can show, their traces; and
    how many tokens were written, the forward passes and their tokens, and seconds.
    """

    def __init__(self, request: Request, config: Config, checkpoint: Checkpoint, records: Sequence[Record]):
        self.request, self.config, self.checkpoint, self.records = request, config, checkpoint, records
        # What does not fit is refused before anything is answered.
        self._questions = encode(checkpoint, records, config, infill=request.infill)
        self._lots = _lots(records, config.sampler)
        self._kept = self._open_kept()
        self._parts: dict[int, Any] = dict(self._kept.parts) if self._kept else {}

    def run(self) -> None:
        """Answers what has no answer yet."""
        done = sum(len(self._lots[number]) for number in self._parts)
        if done:
            log.info("going on: %d of %d responses are kept", done, len(self.records))
        try:
            with tqdm(total=len(self.records), initial=done, desc="generate", unit="prompt") as bar:
                for number, lot in enumerate(self._lots):
                    if number not in self._parts:
                        self._answer(number, lot, bar.update)
                        done += len(lot)
        except KeyboardInterrupt:
            if self._kept is None:
                raise
            raise Interrupted(f"{done} of {len(self.records)} responses are kept; the same command goes on") from None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What stands on the lines of the output, in the order of the records."""
        return [row for _, row in sorted(self._each("rows").items())]

    @property
    def traces(self) -> list[Trace]:
        """How the first responses came about."""
        rows, traces = self.rows, self._each("traces")
        return [_trace(self.checkpoint, rows[i], *traces[i]) for i in range(min(SHOWN, len(rows)))]

    @property
    def summary(self) -> dict[str, Any]:
        parts = [part for part in self._parts.values() if part is not None]
        total = {key: sum(part[key] for part in parts) for key in ("written", "forward_passes", "forward_tokens")}
        seconds = sum(part["seconds"] for part in parts)
        return {
            "prompts": len(self.records),
            "tokens_per_second": total.pop("written") / seconds if seconds else None,
            **total,
            "seconds": seconds,
            "out": self.request.out or None,
            **({"html": self.request.html} if self.request.html else {}),
        }

    def finish(self) -> None:
        """The output is written, and what was kept for it is not needed any more."""
        if self._kept is not None:
            self._kept.finish()

    def _open_kept(self) -> Unfinished | None:
        """What was kept of this job; None: it is a short one, of which nothing has to be."""
        request = self.request
        if not request.out:
            return None
        if len(self._lots) == 1 and not processes.json_of_first(folder_of(request.out).exists()):
            return None
        folder = locate(request.source, request.flag, weights=True)
        self.checkpoint = dataclasses.replace(self.checkpoint, source=str(folder))  # whatever a run saves meanwhile
        settings = settings_of_answers(content_of(folder), self.records, request.infill, self.config)
        return Unfinished(request.out, settings, request.overwrite)

    def _answer(self, number: int, lot: Sequence[int], progress: Callable[[int], Any]) -> None:
        records, questions = [self.records[i] for i in lot], self._questions.of(lot)
        answers = respond(self.checkpoint, records, self.config, questions=questions, progress=progress)
        part = _part(lot, records, answers)
        if self._kept is not None:
            self._kept.keep(number, part)
        self._parts[number] = part

    def _each(self, key: str) -> dict[int, Any]:
        """One of the lists of all parts, by the number of the record."""
        parts = [part for part in self._parts.values() if part is not None]
        return {i: value for part in parts for i, value in zip(part["numbers"], part[key], strict=True)}


def _lots(records: Sequence[Record], sampler: Sampler) -> list[list[int]]:
    """The numbers of the prompts that are answered together; no lot is smaller than a batch.

    Prompts of like lengths share one. They are counted in characters, since a template that asks for the time gives
    other tokens later.
    """
    size = sampler.batch_size * (_BATCHES if sampler.early_stop else 1)
    order = sorted(range(len(records)), key=lambda i: -len(str(records[i].prompt)))
    starts = [size * k for k in range(max(1, len(order) // size))]
    return [order[start:stop] for start, stop in zip(starts, [*starts[1:], len(order)], strict=True)]


def _part(lot: Sequence[int], records: Sequence[Record], answers: Answers) -> dict[str, Any]:
    """See `_Job`."""
    made = answers.responses
    rows = zip(records, answers.prompts, made.tokens, answers.texts, strict=True)
    return {
        "numbers": list(lot),
        "rows": [
            {
                "id": record.id,
                "prompt": record.prompt,
                "prompt_ids": prompt.tolist(),
                "response_ids": response.tolist(),
                "response": text,
            }
            for record, prompt, response, text in rows
        ],
        "traces": [
            [made.written_at[k].tolist(), made.confidence[k].tolist()] if i < SHOWN else None for k, i in enumerate(lot)
        ],
        "written": int((made.written_at >= 0).sum()),
        "forward_passes": made.forward_passes,
        "forward_tokens": made.forward_tokens,
        "seconds": answers.seconds,
    }


def _write(job: _Job, summary: Mapping[str, Any]) -> None:
    """The file, the page and what is printed."""
    request, rows = job.request, job.rows
    if request.out:
        atomic_write(request.out, "".join(f"{to_json(row)}\n" for row in rows))
    if request.html:
        write_denoising_report(
            request.html,
            title=f"Responses of {request.source}",
            traces=job.traces,
            summary=summary,
            settings=dataclasses.asdict(job.config.sampler),
        )
        log.info("page: %s", request.html)
    if request.texts:
        terminal.say("\n\n".join(row["response"] for row in rows))


def _read(request: Request) -> list[Record]:
    needs = ("prompt", "completion") if request.infill else ("prompt",)
    found = read_records(request.prompts, needs=needs, skip_bad=request.skip_bad, flag="--prompts")
    for message in found.skipped:
        log.warning("skipped %s", message)
    return found.records


def _records_of_texts(texts: Sequence[str], as_messages: bool) -> list[Record]:
    """Records of --prompt flags, named by their content as records without an id are."""
    copies: collections.Counter[str] = collections.Counter()
    records = []
    for number, text in enumerate(texts, start=1):
        if not text:
            raise UserError("--prompt: empty; write the text of the prompt")
        copies[text] += 1
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        name = name if copies[text] == 1 else f"{name}#{copies[text]}"
        prompt = [{"role": "user", "content": text}] if as_messages else text
        records.append(Record(name, prompt, None, None, f"--prompt {number}"))
    return records


def _trace(
    checkpoint: Checkpoint, row: Mapping[str, Any], written_at: Sequence[int], confidence: Sequence[float]
) -> Trace:
    """How a response came about, up to its first stop token."""
    tokens = np.asarray(row["response_ids"], np.int32)
    end = len(cut_response(tokens, checkpoint.stop_ids)) + 1
    return Trace(
        prompt=row["prompt"],
        tokens=token_texts(tokens[:end].tolist(), functools.partial(decoded, checkpoint.tokenizer)),
        written_at=written_at[:end],
        confidence=confidence[:end],
    )


def token_texts(tokens: list[int], decode: Callable[[list[int]], str]) -> list[str | None]:
    """The text of each token, as in the text of them all; None: it continues a character of the token before.

    Tokens hold bytes, and several can make one character: its text stands with the first of them.
    """
    texts: list[str | None] = []
    start = before = 0  # of this character and of the one before, which some tokenizers need to tell a space
    while start < len(tokens):
        left = decode(tokens[before:start])
        for stop in range(start + 1, min(start + _LONGEST_CHARACTER, len(tokens)) + 1):
            text = decode(tokens[before:stop])
            text = text[len(left) :] if text.startswith(left) else decode(tokens[start:stop])
            if "\ufffd" not in text:
                break
        else:  # bytes that are no character whatever follows
            stop, text = start + 1, decode(tokens[start : start + 1])
        texts += [text, *[None] * (stop - start - 1)]
        start, before = stop, start
    return texts
