"""python -m conversion.to_hf --source=CHECKPOINT --out=DIR [--adapter]: our checkpoint to published safetensors.

Tensors keep the dtype in which they are stored, so that nothing is lost, or get that of --dtype; where the config.json
of the model that was converted or trained says another one, DIR's says what its tensors are. It also says with which
mask token the model was trained, where that of the published model did not.
Pieces of tensors go from file to file, so that memory does not grow with the model. DIR appears when it is whole: an
interrupted conversion leaves a folder .DIR.*.partial without a config.json, and the same command starts again.
With --adapter, a checkpoint of adapters becomes a folder for the library PEFT, and the base stays where it is.
"""

from pathlib import Path

import jax

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoints.conversion import shard_size, to_peft, to_published
from elbo_kto_jax.checkpoints.safetensors_file import DTYPE_NAMES
from elbo_kto_jax.runtime.errors import UserError


def main(argv: list[str]) -> dict:
    """Converts and returns the summary: published tensors, bytes of tensors written, seconds."""
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
    parser.add_argument("--base", help="with --adapter: hub id or folder of the published base (default: the run's)")
    parser.add_argument("--overwrite", action="store_true", help="replace what was published at --out")
    flags = parser.parse_flags(argv)
    if flags.base is not None and not flags.adapter:
        raise UserError(f"--base={flags.base}: is for --adapter; without it the adapters are merged into their base")
    jax.config.update("jax_platforms", "cpu")
    if flags.adapter:
        return to_peft(flags.source, Path(flags.out), base=flags.base, dtype=flags.dtype, overwrite=flags.overwrite)
    return to_published(
        flags.source, Path(flags.out), dtype=flags.dtype, shard_size=flags.shard_size, overwrite=flags.overwrite
    )


if __name__ == "__main__":
    cli.run(main)
