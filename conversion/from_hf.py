"""python -m conversion.from_hf --source=HF_FOLDER_OR_HUB_ID --out=DIR: published safetensors to our checkpoint.

Pieces of tensors go from file to file, so that memory does not grow with the model. DIR appears when it is whole: an
interrupted conversion leaves a folder DIR.orbax-checkpoint-tmp that nothing loads, and the same command starts again.
"""

import time

import jax

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoints.folders import check_destination, is_checkpoint
from elbo_kto_jax.checkpoints.load import open_source
from elbo_kto_jax.checkpoints.safetensors_file import DTYPE_NAMES
from elbo_kto_jax.checkpoints.save import save_model
from elbo_kto_jax.models import registry
from elbo_kto_jax.runtime import lock
from elbo_kto_jax.runtime.errors import UserError


def main(argv: list[str]) -> dict:
    """Converts and returns the summary: published tensors, bytes of parameters written, seconds."""
    known = ", ".join(known.example for known in registry.architectures().values())
    parser = cli.Flags(
        "conversion.from_hf",
        f"Converts a published model into a checkpoint. Its config.json says which it is: {known}.",
    )
    parser.add_argument(
        "--source", required=True, help="folder of safetensors, or a Hugging Face hub id (ORGANISATION/NAME)"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="dtype of every parameter (default: as stored)")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint at --out")
    flags, _ = parser.parse(argv)

    started = time.monotonic()
    jax.config.update("jax_platforms", "cpu")
    check_destination(flags.out, flags.overwrite, is_checkpoint)  # before minutes of reading
    with lock.beside(flags.out, "--out"):
        source = open_source(flags.source, dtype=flags.dtype, flag="--source")
        if flags.dtype and any(leaf.dtype.name != flags.dtype for leaf in source.leaves.values()):
            raise UserError(
                f"--dtype={flags.dtype}: --source={flags.source} is a converted checkpoint and is copied as it is "
                "stored; leave --dtype out, or give it to conversion.to_hf"
            )
        save_model(flags.out, source, flags.overwrite)
    return {"tensors": len(source.published()), "bytes": source.nbytes, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    cli.run(main)
