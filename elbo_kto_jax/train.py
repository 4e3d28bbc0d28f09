"""python -m elbo_kto_jax.train --config=configs/FILE.py --workdir=DIR: a config's recipe, from data to checkpoint."""

from elbo_kto_jax import cli
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.training.loop import train


def main(argv: list[str]) -> dict:
    flags = cli.Flags("elbo_kto_jax.train", "Align (ELBO-KTO) or fine-tune (SFT) a masked diffusion language model.")
    flags.add_config(workdir=True)
    flags.add_argument("--overwrite", action="store_true", help="delete what another command left in --workdir")
    flags.add_argument("--skip-bad-records", action="store_true", help="count and list bad records instead of stopping")
    options, config = flags.parse(argv)
    return train(config, paths.at(options.workdir), overwrite=options.overwrite, skip_bad=options.skip_bad_records)


if __name__ == "__main__":
    cli.run(main)
