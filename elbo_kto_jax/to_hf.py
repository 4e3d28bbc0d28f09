"""python -m conversion.to_hf --source=CHECKPOINT --out=DIR: our checkpoint to published safetensors.

Tensors keep the dtype in which they are stored, so that nothing is lost, or get that of --dtype; where the config.json
of the model that was converted or trained says another one, DIR's says what its tensors are. It also says with which
mask token the model was trained, where that of the published model did not.
Pieces of tensors go from file to file, so that memory does not grow with the model. DIR appears when it is whole: an
interrupted conversion leaves a folder .DIR.*.partial without a config.json, and the same command starts again.
"""

import jax

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoints.conversion import shard_size, to_published
from elbo_kto_jax.checkpoints.safetensors_file import DTYPE_NAMES
from elbo_kto_jax.runtime import paths


def main(argv: list[str]) -> dict:
    """Converts and returns the summary: published tensors, bytes of tensors written, seconds."""
    parser = cli.Flags("conversion.to_hf", "Converts a checkpoint into the published form of its model.")
    parser.add_argument("--source", required=True, help="converted checkpoint, step of a training run or its workdir")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of every tensor (default: as stored)")
    parser.add_argument(
        "--shard-size", type=shard_size, default="5GB", help="bytes per file: a number and KB, MB or GB (default: 5GB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the published checkpoint at --out")
    flags = parser.parse_flags(argv)
    jax.config.update("jax_platforms", "cpu")
    return to_published(
        flags.source, paths.at(flags.out), dtype=flags.dtype, shard_size=flags.shard_size, overwrite=flags.overwrite
    )


if __name__ == "__main__":
    cli.run(main)
