"""python -m conversion.from_hf --source=HF_FOLDER_OR_HUB_ID --out=DIR: published safetensors to our checkpoint.

Pieces of tensors go from file to file, so that memory does not grow with the model. DIR appears when it is whole: an
interrupted conversion leaves a folder DIR.orbax-checkpoint-tmp that nothing loads, and the same command starts again.
"""

import jax

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoints.conversion import from_published
from elbo_kto_jax.checkpoints.safetensors_file import DTYPE_NAMES
from elbo_kto_jax.models import registry


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
    flags = parser.parse_flags(argv)
    jax.config.update("jax_platforms", "cpu")
    return from_published(flags.source, flags.out, dtype=flags.dtype, overwrite=flags.overwrite)


if __name__ == "__main__":
    cli.run(main)
