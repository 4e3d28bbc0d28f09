"""A grid of evaluations: checkpoints x tasks x sampler settings x draws, in one table and one report.

    python -m elbo_kto_jax.sweep --config=configs/eval_sweep.py --workdir=DIR

The axes are the lists of config.sweep. A task takes the axes that its result depends on: what generates takes those of
the sampler, what estimates a likelihood the numbers of draws. A cell of the grid is one such evaluation. Its prompts
(or masked rows) are spread over all devices, so that every device works whatever the grid looks like, and one program
serves all cells with equal settings. A checkpoint is loaded once for all of its cells.

Every cell is checked before the first one runs. config.sweep.limit is the number of prompts, records or questions that
every task takes. A grid may grow: values that are added to a list are evaluated, and the cells that are done are kept.
Taking a value away, another limit or another config is refused.

    DIR/config.json            the grid; one that is not this one and more is refused
    DIR/cells/NAME/            result.json and what `evaluate` and `score` write; a cell that has a result of the same
                               settings, weights and data (by their content) is not evaluated again
    DIR/answers/, DIR/judge/   answers and verdicts that cells share
    DIR/table.csv, table.md, report.html
"""

from typing import Any, cast

from elbo_kto_jax import cli
from elbo_kto_jax.evaluate import add_judge_flags, add_task_flags
from elbo_kto_jax.evaluation.sweep import sweep
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.grid import SweepConfig


def main(argv: list[str]) -> dict[str, Any]:
    parser = cli.Flags("elbo_kto_jax.sweep", "A grid of evaluations, resumable, in one table and one report.")
    parser.add_config(workdir=True, kind=SweepConfig)
    add_judge_flags(parser)
    add_task_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="delete what another command left in --workdir")
    flags, config = parser.parse(argv)
    config = cast(SweepConfig, config)  # the kind that was asked for
    return sweep(config, paths.at(flags.workdir), allow_code=flags.confirm_run_unsafe_code, overwrite=flags.overwrite)


if __name__ == "__main__":
    cli.run(main)
