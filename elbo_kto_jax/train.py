"""python -m elbo_kto_jax.train --config=configs/FILE.py --workdir=DIR: a config's recipe, from data to checkpoint."""

import itertools
import shlex

from elbo_kto_jax import cli
from elbo_kto_jax.planning.dry_run import dry_run
from elbo_kto_jax.reports.dry_run import as_text
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.flags import command_line
from elbo_kto_jax.training.loop import train

_DRY_RUN = "--dry-run"
_LARGE = "v5e:8x8"  # a slice to search


def main(argv: list[str]) -> dict:
    flags = cli.Flags("elbo_kto_jax.train", "Align (ELBO-KTO) or fine-tune (SFT) a masked diffusion language model.")
    flags.add_config(workdir=True)
    flags.add_argument("--overwrite", action="store_true", help="delete what another command left in --workdir")
    flags.add_argument("--skip-bad-records", action="store_true", help="count and list bad records instead of stopping")
    flags.add_argument(_DRY_RUN, action="store_true", help="say what the run would be: load no weights, write nothing")
    options, config = flags.parse(argv)
    how = {"overwrite": options.overwrite, "skip_bad": options.skip_bad_records}
    if not options.dry_run:
        return train(config, paths.at(options.workdir), **how)
    summary = dry_run(config, paths.at(options.workdir), **how)
    cli.log.info("%s", as_text(summary))
    _say_what_is_next(argv, summary["slices"])
    return summary


def _say_what_is_next(argv: list[str], slices: list[str]) -> None:
    """The command of the run itself, and that which compiles it for a slice of TPUs."""
    words = [word for word in argv if word != _DRY_RUN]
    cli.log.info("next: %s %s", command_line("elbo_kto_jax.train"), shlex.join(words))
    of_config = [
        word
        for before, word in itertools.pairwise(["", *words])
        if word.startswith("--config") or (before.startswith("--config") and "=" not in before)
    ]
    hold = f"{', '.join(slices)} hold a step" if slices else "no slice with this mesh holds a step"
    plan = f"{command_line('launch.plan')} {shlex.join(of_config)}"
    topology = f"--topology={slices[0]}" if slices else f"--topology={_LARGE} --search"
    cli.log.info("on TPUs, where %s by estimate: %s %s", hold, plan, topology)


if __name__ == "__main__":
    cli.run(main)
