"""python -m conversion.to_hf --source=CHECKPOINT --out=DIR [--push=ORG/NAME]: our checkpoint to published safetensors.

Tensors keep the dtype in which they are stored, so that nothing is lost, or get that of --dtype; where the config.json
of the model that was converted or trained says another one, DIR's says what its tensors are. It also says with which
mask token the model was trained, where that of the published model did not.
Pieces of tensors go from file to file, so that memory does not grow with the model. DIR appears when it is whole: an
interrupted conversion leaves a folder .DIR.*.partial without a config.json, and the same command starts again.
README.md in it is the model's card, written from the run. --push then uploads DIR to the Hugging Face hub, into a
private repository unless --public says otherwise; the token is that of HF_TOKEN or of `hf auth login`.
With --adapter, a checkpoint of adapters becomes a folder for the library PEFT, and the base stays where it is.
"""

import jax

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoints.conversion import shard_size
from elbo_kto_jax.checkpoints.safetensors_file import DTYPE_NAMES
from elbo_kto_jax.publishing.hub import Place
from elbo_kto_jax.publishing.publish import Request, publish
from elbo_kto_jax.runtime import paths


def main(argv: list[str]) -> dict:
    """Converts, pushes, and returns the summary: published tensors, bytes of tensors written, seconds, the card."""
    parser = cli.Flags("conversion.to_hf", "Converts a checkpoint into the published form of its model.")
    parser.add_argument("--source", required=True, help="converted checkpoint, step of a training run or its workdir")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of every tensor (default: as stored)")
    parser.add_argument(
        "--shard-size", type=shard_size, default="5GB", help="bytes per file: a number and KB, MB or GB (default: 5GB)"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="write the adapters alone, for PEFT, and no merged model"
    )
    parser.add_argument(
        "--base",
        metavar="ORG/NAME",
        help="the published model that was trained, for the card; with --adapter a folder, too (default: the run's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what was published at --out")
    card = parser.add_argument_group("the card README.md", "what is not given is taken from the run, or left out")
    card.add_argument("--evaluation", help="folder of `evaluate` with the win rate (default: the run's, if found)")
    card.add_argument("--license", type=str, metavar="ID", help="of the model, such as mit (default: that of the base)")
    hub = parser.add_argument_group("the Hugging Face hub", "token: HF_TOKEN, or `hf auth login`")
    hub.add_argument(
        "--push", type=str, metavar="ORG/NAME", help="upload --out to this repository, by default a private one"
    )
    hub.add_argument("--revision", type=str, metavar="BRANCH", help="branch to push to (default: main)")
    hub.add_argument("--public", action="store_true", help="make a new repository public")
    flags = parser.parse_flags(argv)
    if flags.push is None and (flags.revision is not None or flags.public):
        parser.error("--revision and --public say how to push: add --push=ORG/NAME")
    jax.config.update("jax_platforms", "cpu")
    request = Request(
        flags.source,
        paths.here(flags.out, "--out, with --push") if flags.push else paths.at(flags.out),
        dtype=flags.dtype,
        shard_size=flags.shard_size,
        overwrite=flags.overwrite,
        evaluation=flags.evaluation,
        base=flags.base,
        adapter=flags.adapter,
        licence=flags.license,
        push=None if flags.push is None else Place(flags.push, flags.revision or "main", flags.public),
    )
    return publish(request)


if __name__ == "__main__":
    cli.run(main)
