"""python -m launch.random_llada --architecture=NAME --tokenizer=FOLDER --out=DIR: a published folder of random weights.

Any architecture (models/), of a small size or of a published one. The name is from when there was LLaDA alone.
"""

from elbo_kto_jax import cli
from elbo_kto_jax.checkpoints import huggingface, random_folder
from elbo_kto_jax.checkpoints.conversion import shard_size
from elbo_kto_jax.checkpoints.folders import check_destination
from elbo_kto_jax.models import registry
from elbo_kto_jax.runtime import paths


def main(argv: list[str]) -> dict:
    dtypes, architectures = random_folder.DTYPES, registry.architectures()
    sizes = ", ".join(f"{name}: {'/'.join(known.sizes)}" for name, known in architectures.items())
    parser = cli.Flags(
        "launch.random_llada", "Writes a model of any architecture with random weights as a Hugging Face folder."
    )
    parser.add_argument(
        "--architecture", choices=architectures, default="llada", help="of the network (default: %(default)s)"
    )
    parser.add_argument("--size", default="23m", help=f"23m (the default), or as published ({sizes})")
    parser.add_argument("--layers", type=int, default=0, help="number of layers (default: that of --size)")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer files, such as another model's")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--shard-size", type=shard_size, default="5GB", help="bytes per file (default: 5GB)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the published checkpoint at --out")
    flags = parser.parse_flags(argv)
    out = paths.here(flags.out, "--out")
    check_destination(out, flags.overwrite, huggingface.is_published)
    dimensions = random_folder.dimensions(flags.size, flags.architecture)
    dimensions |= {"n_layers": flags.layers} if flags.layers else {}
    written = random_folder.write(
        out,
        paths.here(flags.tokenizer, "--tokenizer"),
        dimensions,
        architecture=flags.architecture,
        dtype=flags.dtype,
        seed=flags.seed,
        shard_size=flags.shard_size,
    )
    return {"tensors": len(written), "bytes": sum(written.values()), "out": str(out)}


if __name__ == "__main__":
    cli.run(main)
