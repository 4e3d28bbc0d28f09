"""Samples responses.

    python -m elbo_kto_jax.generate --config=FILE.py --checkpoint=DIR --prompts=FILE.jsonl --out=FILE.jsonl

With --prompt="..." (repeatable) instead of --prompts the responses are printed, and --out may be left out. The options
of the sampler are config.sampler.* (METHOD 6). Per output line: id, prompt_ids, response_ids (the whole response) and
response (its text up to the first end-of-text or end-of-turn token).
"""

import collections
import hashlib
from collections.abc import Sequence
from typing import Any

from elbo_kto_jax import cli, processes
from elbo_kto_jax.checkpoint import store
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.files import atomic_write, to_json
from elbo_kto_jax.sampling.respond import Answers, answer
from elbo_kto_jax.text.records import Record, read_records


def main(argv: list[str]) -> dict[str, Any]:
    flags, config = _parser().parse(argv)
    if flags.prompts and not flags.out:
        raise UserError("--out: missing; name the file that the responses to --prompts go to")
    if flags.out:
        cli.refuse_existing(flags.out, flags.overwrite)
    flag = "--checkpoint" if flags.checkpoint else "--config.model.path"
    source = flags.checkpoint or config.model.path
    if flags.prompts:
        found = read_records(flags.prompts, needs=("prompt",), skip_bad=flags.skip_bad_records, flag="--prompts")
        for message in found.skipped:
            cli.log.warning("skipped %s", message)
        records = found.records
    else:
        tokenizer = store.build_tokenizer(store.load_config(source, flag)[1], source)
        records = _records_of_flags(flags.prompt, as_messages=tokenizer.chat_template is not None)

    answers = answer(source, records, config, flag=flag)
    if flags.out and processes.is_first():
        _write(flags.out, records, answers)
    if flags.prompt and processes.is_first():
        print("\n\n".join(answers.texts))
    return {
        "prompts": len(records),
        "tokens_per_second": answers.responses.tokens.size / answers.seconds,
        "forward_passes": answers.responses.forward_passes,
        "seconds": answers.seconds,
        "out": flags.out,
    }


def _parser() -> cli.Flags:
    parser = cli.Flags("elbo_kto_jax.generate", "Samples responses to prompts.")
    parser.add_config()
    parser.add_argument("--checkpoint", metavar="DIR", help="model (default: config.model.path)")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompts", metavar="FILE.jsonl", help="records with a `prompt`")
    given.add_argument("--prompt", metavar="TEXT", action="append", help="one prompt; may be repeated")
    parser.add_argument("--out", metavar="FILE.jsonl", help="where the responses go")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
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


def _write(path: str, records: Sequence[Record], answers: Answers) -> None:
    rows = zip(records, answers.prompts, answers.responses.tokens, answers.texts, strict=True)
    lines = [
        to_json({"id": record.id, "prompt_ids": prompt.tolist(), "response_ids": response.tolist(), "response": text})
        for record, prompt, response, text in rows
    ]
    atomic_write(path, "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    cli.run(main)
