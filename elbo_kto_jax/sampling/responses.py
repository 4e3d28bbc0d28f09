"""Responses to prompts, written down: records or texts in, JSON lines and a page of how they came about out."""

import collections
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.reports.denoising import Trace, write_denoising_report
from elbo_kto_jax.runtime import processes, terminal
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.sampling.respond import Answers, Checkpoint, open_checkpoint, respond
from elbo_kto_jax.sampling.stops import cut_response, decoded

log = logging.getLogger(__name__)
SHOWN = 20  # responses on a page
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
    """

    source: str
    flag: str
    prompts: str = ""
    texts: Sequence[str] = ()
    out: str = ""
    html: str = ""
    infill: bool = False
    skip_bad: bool = False


def write_responses(request: Request, config: Config) -> dict[str, Any]:
    """Answers the prompts with the options config.sampler, and writes or prints the responses; the summary.

    Raises:
      UserError: something about the checkpoint, the prompts or the sampler has to be mended.
    """
    records = _read(request) if request.prompts else []
    checkpoint = open_checkpoint(request.source, config, flag=request.flag)
    if not request.prompts:
        records = _records_of_texts(request.texts, as_messages=checkpoint.tokenizer.chat_template is not None)
    answers = respond(checkpoint, records, config, infill=request.infill)
    summary = {
        "prompts": len(records),
        "tokens_per_second": int((answers.responses.written_at >= 0).sum()) / answers.seconds,
        "forward_passes": answers.responses.forward_passes,
        "forward_tokens": answers.responses.forward_tokens,
        "seconds": answers.seconds,
        "out": request.out or None,
        **({"html": request.html} if request.html else {}),
    }
    if processes.is_first():
        if request.out:
            _write(request.out, records, answers)
        if request.html:
            write_denoising_report(
                request.html,
                title=f"Responses of {request.source}",
                traces=[_trace(checkpoint, record, answers, i) for i, record in enumerate(records[:SHOWN])],
                summary=summary,
                settings=dataclasses.asdict(config.sampler),
            )
            log.info("page: %s", request.html)
        if request.texts:
            terminal.say("\n\n".join(answers.texts))
    return summary


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


def _trace(checkpoint: Checkpoint, record: Record, answers: Answers, i: int) -> Trace:
    """How response i, that to `record`, came about, up to its first stop token."""
    responses, tokens = answers.responses, answers.responses.tokens[i]
    end = len(cut_response(tokens, checkpoint.stop_ids)) + 1
    return Trace(
        prompt=record.prompt,
        tokens=token_texts(tokens[:end].tolist(), functools.partial(decoded, checkpoint.tokenizer)),
        written_at=responses.written_at[i, :end].tolist(),
        confidence=responses.confidence[i, :end].tolist(),
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


def _write(path: str, records: Sequence[Record], answers: Answers) -> None:
    rows = zip(records, answers.prompts, answers.responses.tokens, answers.texts, strict=True)
    lines = [
        to_json({"id": record.id, "prompt_ids": prompt.tolist(), "response_ids": response.tolist(), "response": text})
        for record, prompt, response, text in rows
    ]
    atomic_write(path, "".join(f"{line}\n" for line in lines))
