"""python -m conversion.from_hf --source=HF_FOLDER_OR_HUB_ID --out=DIR: published safetensors to our checkpoint."""

import time

import jax

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoint import names, store


def main(argv: list[str]) -> dict:
    """Converts and returns the summary: published tensors, bytes of parameters written, seconds."""
    parser = cli.Flags("conversion.from_hf", "Converts a published LLaDA checkpoint into ours.")
    parser.add_argument("--source", required=True, help="folder of safetensors, or a Hugging Face hub id")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of every parameter (default: as stored)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint at --out")
    flags, _ = parser.parse(argv)

    started = time.monotonic()
    jax.config.update("jax_platforms", "cpu")
    store.check_destination(flags.out, flags.overwrite, store.is_checkpoint)  # before minutes of reading
    model = store.load_model(flags.source, param_dtype=flags.dtype, flag="--source")
    store.save_model(flags.out, model, flags.overwrite)
    return {
        "tensors": len(names.published_tensors(model.config)),
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "seconds": time.monotonic() - started,
    }


if __name__ == "__main__":
    cli.run(main)
