"""Samples responses.

    python -m elbo_kto_jax.generate --checkpoint=DIR --prompts=FILE.jsonl --out=FILE.jsonl

Without --config the settings are those of the run to which the checkpoint belongs, or those that suit the model.

With --prompt="..." (repeatable) instead of --prompts the responses are printed, and --out may be left out. The options
of the sampler are config.sampler.* (docs/method.md 6). Per output line: id, prompt, prompt_ids, response_ids (all of
it) and response (its text up to the first end-of-text or end-of-turn token).

A command that was stopped goes on when it is started again: what it has lies in OUT.unfinished until OUT is written.

With --infill the records' completions are templates: their mask tokens ("<|mdm_mask|>") are filled, the rest stays.
With --html a page shows how the responses came about, step by step.
"""

from typing import Any

from elbo_kto_jax import cli
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.flags import refuse_existing
from elbo_kto_jax.sampling.responses import SHOWN, Request, write_responses


def main(argv: list[str]) -> dict[str, Any]:
    flags, config = _parser().parse(argv)
    if flags.prompts and not flags.out:
        raise UserError("--out: missing; name the file that the responses to --prompts go to")
    if flags.infill and not flags.prompts:
        raise UserError("--infill: needs --prompts, whose completions have the masked spans")
    for flag, path in (("--out", flags.out), ("--html", flags.html)):
        if path:
            refuse_existing(path, flags.overwrite, flag)
    if flags.out and flags.html and paths.place(flags.out) == paths.place(flags.html):
        raise UserError(f"--html={flags.html}: the file of --out, too; name another")
    request = Request(
        source=flags.checkpoint or config.model.path,
        flag="--checkpoint" if flags.checkpoint else "--config.model.path",
        prompts=flags.prompts or "",
        texts=flags.prompt or [],
        out=flags.out or "",
        html=flags.html or "",
        infill=flags.infill,
        skip_bad=flags.skip_bad_records,
        overwrite=flags.overwrite,
    )
    return write_responses(request, config)


_INFILL = (
    "fill the mask tokens of the records' completions, and keep the rest; a mask token is written as the tokenizer "
    "has it: <|mdm_mask|> for LLaDA, <|mask|> for Dream"
)


def _parser() -> cli.Flags:
    parser = cli.Flags("elbo_kto_jax.generate", "Samples responses to prompts.")
    parser.add_config_of_model()
    parser.add_argument("--checkpoint", metavar="DIR", help="model (default: config.model.path)")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompts", metavar="FILE.jsonl", help="records with a `prompt`")
    given.add_argument("--prompt", type=str, metavar="TEXT", action="append", help="one prompt; may be repeated")
    parser.add_argument("--out", metavar="FILE.jsonl", help="where the responses go")
    parser.add_argument("--infill", action="store_true", help=_INFILL)
    parser.add_argument("--html", metavar="FILE.html", help=f"page that shows how the first {SHOWN} came about")
    parser.add_argument("--overwrite", action="store_true", help="replace --out, --html and what was left unfinished")
    parser.add_argument("--skip-bad-records", action="store_true", help="list bad records instead of stopping")
    return parser


if __name__ == "__main__":
    cli.run(main)
