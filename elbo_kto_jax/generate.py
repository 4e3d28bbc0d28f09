"""Samples responses.

    python -m elbo_kto_jax.generate --config=FILE.py --checkpoint=DIR --prompts=FILE.jsonl --out=FILE.jsonl

With --prompt="..." (repeatable) instead of --prompts the responses are printed, and --out may be left out. The options
of the sampler are config.sampler.* (docs/method.md 6). Per output line: id, prompt_ids, response_ids (all of it) and
response (its text up to the first end-of-text or end-of-turn token).

With --infill the records' completions are templates: their mask tokens ("<|mdm_mask|>") are filled, the rest stays.
With --html a page shows how the responses came about, step by step.
"""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from elbo_kto_jax import cli
from elbo_kto_jax.data.reading import read_records
from elbo_kto_jax.data.records import Record
from elbo_kto_jax.reports.denoising import Trace, write_denoising_report
from elbo_kto_jax.runtime import processes, terminal
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, to_json
from elbo_kto_jax.sampling.respond import Answers, Checkpoint, open_checkpoint, respond
from elbo_kto_jax.sampling.stops import cut_response

_SHOWN = 20  # responses on a page
_LONGEST_CHARACTER = 8  # tokens; four bytes at most, and neighbours that share a token


def main(argv: list[str]) -> dict[str, Any]:
    flags, config = _parser().parse(argv)
    if flags.prompts and not flags.out:
        raise UserError("--out: missing; name the file that the responses to --prompts go to")
    if flags.infill and not flags.prompts:
        raise UserError("--infill: needs --prompts, whose completions have the masked spans")
    for flag, path in (("--out", flags.out), ("--html", flags.html)):
        if path:
            cli.refuse_existing(path, flags.overwrite, flag)
    if flags.out and flags.html and os.path.realpath(flags.out) == os.path.realpath(flags.html):
        raise UserError(f"--html={flags.html}: the file of --out, too; name another")
    flag = "--checkpoint" if flags.checkpoint else "--config.model.path"
    source = flags.checkpoint or config.model.path
    if flags.prompts:
        needs = ("prompt", "completion") if flags.infill else ("prompt",)
        found = read_records(flags.prompts, needs=needs, skip_bad=flags.skip_bad_records, flag="--prompts")
        for message in found.skipped:
            cli.log.warning("skipped %s", message)
        records = found.records
    checkpoint = open_checkpoint(source, config, flag=flag)
    if flags.prompt:
        records = _records_of_flags(flags.prompt, as_messages=checkpoint.tokenizer.chat_template is not None)

    answers = respond(checkpoint, records, config, infill=flags.infill)
    summary = {
        "prompts": len(records),
        "tokens_per_second": int((answers.responses.written_at >= 0).sum()) / answers.seconds,
        "forward_passes": answers.responses.forward_passes,
        "forward_tokens": answers.responses.forward_tokens,
        "seconds": answers.seconds,
        "out": flags.out,
    }
    if flags.out and processes.is_first():
        _write(flags.out, records, answers)
    if flags.html:
        summary["html"] = flags.html
    if flags.html and processes.is_first():
        write_denoising_report(
            flags.html,
            title=f"Responses of {source}",
            traces=[_trace(checkpoint, record, answers, i) for i, record in enumerate(records[:_SHOWN])],
            summary=summary,
            settings=dataclasses.asdict(config.sampler),
        )
        cli.log.info("page: %s", flags.html)
    if flags.prompt and processes.is_first():
        terminal.say("\n\n".join(answers.texts))
    return summary


def _parser() -> cli.Flags:
    parser = cli.Flags("elbo_kto_jax.generate", "Samples responses to prompts.")
    parser.add_config()
    parser.add_argument("--checkpoint", metavar="DIR", help="model (default: config.model.path)")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompts", metavar="FILE.jsonl", help="records with a `prompt`")
    given.add_argument("--prompt", type=str, metavar="TEXT", action="append", help="one prompt; may be repeated")
    parser.add_argument("--out", metavar="FILE.jsonl", help="where the responses go")
    parser.add_argument("--infill", action="store_true", help="fill the mask tokens of the records' completions")
    parser.add_argument("--html", metavar="FILE.html", help=f"page that shows how the first {_SHOWN} came about")
    parser.add_argument("--overwrite", action="store_true", help="replace --out and --html")
    parser.add_argument("--skip-bad-records", action="store_true", help="list bad records instead of stopping")
    return parser


def _records_of_flags(texts: Sequence[str], as_messages: bool) -> list[Record]:
    """Records of --prompt flags, named by their content as records without an id are."""
    copies = collections.Counter()
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
        tokens=token_texts(tokens[:end].tolist(), checkpoint.tokenizer.decode),
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


if __name__ == "__main__":
    cli.run(main)
