"""python -m elbo_kto_jax.diagnose --config=... --checkpoint=DIR --out=DIR: bias and variance of the ELBO substitution.

On records of config.data.train, for every mask scheme and K = 1, 2, 4, 8, 16 draws (--schemes, --draws for fewer): what
the checkpoint's ELBOs, the rewards against the reference (config.reference.path, or else config.model.path), the loss
and the gradient vary by from draw to draw, what bias the value function makes of it, and what it costs.
--config.estimator.* do not matter.

    OUT/table.csv        a row per scheme and K; figures with the ends of their 95% intervals
    OUT/diagnosis.json   the same, with variances by group of parameters, label, length and hidden share
    OUT/report.html      the plots, and which scheme and how many draws to use
"""

from elbo_kto_jax import cli
from elbo_kto_jax.diagnosis.diagnose import DRAWS, FILES, SCHEMES, Request, diagnose, settings_of
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.flags import refuse_existing


def main(argv: list[str]) -> dict:
    flags = cli.Flags("elbo_kto_jax.diagnose", "Measure the bias and the variance of the estimator on real records.")
    flags.add_config()
    flags.add_argument(
        "--checkpoint", required=True, help="the policy: Hugging Face folder, checkpoint or training run"
    )
    flags.add_argument("--out", required=True, metavar="DIR", help="where table.csv, diagnosis.json and report.html go")
    flags.add_argument("--records", type=int, default=32, help="drawn from config.data.train (default: %(default)s)")
    flags.add_argument("--repeats", type=int, default=8, help="sets of masks per record (default: %(default)s)")
    flags.add_argument(
        "--schemes", type=str, default=",".join(SCHEMES), help="uniform is always among them (default: all)"
    )
    flags.add_argument(
        "--draws", type=str, default=",".join(map(str, DRAWS)), help="values of K (default: %(default)s)"
    )
    flags.add_argument("--overwrite", action="store_true", help="replace earlier results")
    flags.add_argument("--skip-bad-records", action="store_true", help="count and list bad records instead of stopping")
    options, config = flags.parse(argv)
    for name in FILES:
        refuse_existing(paths.at(options.out) / name, options.overwrite)
    request = Request(
        checkpoint=options.checkpoint,
        settings=settings_of(options.schemes, options.draws),
        records=options.records,
        repeats=options.repeats,
        skip_bad=options.skip_bad_records,
    )
    return diagnose(request, config, paths.at(options.out))


if __name__ == "__main__":
    cli.run(main)
