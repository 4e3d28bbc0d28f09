"""Samples responses.

    python -m elbo_kto_jax.generate --config=FILE.py --checkpoint=DIR --prompts=FILE.jsonl --out=FILE.jsonl

With --prompt="..." (repeatable) instead of --prompts the responses are printed, and --out may be left out. The options
of the sampler are config.sampler.* (METHOD 6). Per output line: id, prompt_ids, response_ids (the whole response) and
response (its text up to the first end-of-text or end-of-turn token).
"""

import argparse
import collections
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoint import store
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.files import atomic_write, to_json
from elbo_kto_jax.model.llada import LLaDA, abstract_params
from elbo_kto_jax.sampling import decode
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.text import chat
from elbo_kto_jax.text.records import Record, read_records


def main(argv: list[str]) -> dict[str, Any]:
    flags, config = _parser().parse(argv)
    if flags.prompts and not flags.out:
        raise UserError("--out: missing; name the file that the responses to --prompts go to")
    if flags.out:
        cli.refuse_existing(flags.out, flags.overwrite)
    source, flag = (
        (flags.checkpoint, "--checkpoint") if flags.checkpoint else (config.model.path, "--config.model.path")
    )
    model_config, assets = store.load_config(source, flag)
    tokenizer = store.build_tokenizer(assets, source)
    chat.check_tokenizer(tokenizer, model_config, source)
    needs_eot = config.sampler.confidence_eos_eot_inf or chat.EOT_TOKEN in tokenizer.get_added_vocab()
    eot_id = chat.find_eot_id(tokenizer, source) if needs_eot else None

    if flags.prompts:
        found = read_records(flags.prompts, needs=("prompt",), skip_bad=flags.skip_bad_records, flag="--prompts")
        for message in found.skipped:
            cli.log.warning("skipped %s", message)
        records = found.records
    else:
        records = _records_of_flags(flags.prompt, as_message=tokenizer.chat_template is not None)
    longest = model_config.max_sequence_length - config.sampler.gen_length
    prompts = [_encode(tokenizer, record, longest) for record in records]

    mesh = rules.make_mesh(config.mesh)
    rules.check_heads(model_config, mesh)
    dtype = jnp.dtype(config.model.dtype)
    model = LLaDA(model_config, dtype=dtype, param_dtype=dtype)  # what it computes in is all that it has to keep
    shardings = rules.param_shardings(abstract_params(model), mesh)
    params = store.load_model(source, param_dtype=dtype, shardings=shardings, flag=flag).params

    start = time.perf_counter()
    with tqdm.tqdm(total=len(prompts), desc="generate", unit="prompt") as bar:
        responses = decode.generate(
            model,
            params,
            prompts,
            config.sampler,
            seed=config.seed,
            prompt_ids=[record.id for record in records],
            eot_id=eot_id,
            mesh=mesh,
            progress=bar.update,
        )
    seconds = time.perf_counter() - start

    stop_ids = [model_config.eos_token_id] + ([] if eot_id is None else [eot_id])
    texts = [decode.to_text(response, tokenizer, stop_ids) for response in responses.tokens]
    if flags.out:
        _write(flags.out, records, prompts, responses.tokens, texts)
    if flags.prompt:
        print("\n\n".join(texts))
    return {
        "prompts": len(prompts),
        "tokens_per_second": responses.tokens.size / seconds,
        "forward_passes": responses.forward_passes,
        "seconds": seconds,
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
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="replace --out")
    parser.add_argument("--skip-bad-records", action="store_true", help="list bad records instead of stopping")
    return parser


def _records_of_flags(texts: Sequence[str], as_message: bool) -> list[Record]:
    """Records of --prompt flags, named by their content as records without an id are."""
    copies = collections.Counter()
    records = []
    for number, text in enumerate(texts, start=1):
        if not text:
            raise UserError("--prompt: empty; write the text of the prompt")
        copies[text] += 1
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        name = name if copies[text] == 1 else f"{name}#{copies[text]}"
        prompt = [{"role": "user", "content": text}] if as_message else text
        records.append(Record(name, prompt, None, None, f"--prompt {number}"))
    return records


def _encode(tokenizer, record: Record, longest: int) -> np.ndarray:
    """int32[p], the tokens of a record's prompt.

    Raises:
      UserError: there are more than `longest`, or the chat template refuses the record.
    """
    try:
        tokens = chat.encode_prompt(tokenizer, record.prompt)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from error
    if len(tokens) > longest:
        raise UserError(
            f"{record.where}: field `prompt`: {len(tokens)} tokens, but at most {longest} leave room for the response; "
            "shorten it or lower config.sampler.gen_length"
        )
    return np.asarray(tokens, np.int32)


def _write(
    path: str, records: Sequence[Record], prompts: Sequence[np.ndarray], responses: np.ndarray, texts: Sequence[str]
) -> None:
    lines = [
        to_json({"id": record.id, "prompt_ids": prompt.tolist(), "response_ids": response.tolist(), "response": text})
        for record, prompt, response, text in zip(records, prompts, responses, texts, strict=True)
    ]
    atomic_write(path, "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    cli.run(main)
