"""python -m elbo_kto_jax.precompute --config=RECIPE --workdir=DIR: B_ref of every draw, for `train`."""

import shlex

from elbo_kto_jax import cli
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.flags import command_line
from elbo_kto_jax.training.precompute import precompute


def main(argv: list[str]) -> dict:
    flags = cli.Flags("elbo_kto_jax.precompute", "Compute the reference's ELBO of every example and draw of a run.")
    flags.add_config(workdir=True)
    flags.add_argument("--overwrite", action="store_true", help="delete what another command left in --workdir")
    flags.add_argument("--skip-bad-records", action="store_true", help="count and list bad records instead of stopping")
    options, config = flags.parse(argv)
    summary = precompute(
        config, paths.at(options.workdir), overwrite=options.overwrite, skip_bad=options.skip_bad_records
    )
    words = [word for word in argv if word != "--overwrite"]  # which would delete what was computed
    cli.log.info("next: %s %s", command_line("elbo_kto_jax.train"), shlex.join(words))
    return summary


if __name__ == "__main__":
    cli.run(main)
