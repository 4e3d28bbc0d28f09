"""python -m elbo_kto_jax.precompute --config=configs/FILE.py --workdir=DIR: B_ref of every draw, for `train`."""

import logging
import shlex
import time
from pathlib import Path

from elbo_kto_jax import cli, objectives
from elbo_kto_jax.errors import UserError
from elbo_kto_jax.train.reference import ReferenceCache
from elbo_kto_jax.train.setup import prepare
from elbo_kto_jax.train.workdir import open_workdir, stop_on_signal

log = logging.getLogger(__name__)


def main(argv: list[str]) -> dict:
    flags = cli.Flags("elbo_kto_jax.precompute", "Compute the reference's ELBO of every example and draw of a run.")
    flags.add_config(workdir=True)
    flags.add_argument("--overwrite", action="store_true", help="delete what the working folder holds and start again")
    flags.add_argument("--skip-bad-records", action="store_true", help="count and list bad records instead of stopping")
    options, config = flags.parse(argv)
    if not objectives.build(config.objective).needs.reference:
        raise UserError(f"config.objective.name: {config.objective.name!r} has no reference to precompute")
    setup = prepare(config, skip_bad=options.skip_bad_records)
    workdir = Path(options.workdir)
    open_workdir(workdir, config, options.overwrite)
    base, _ = setup.load_base()
    if base is None:
        path = config.reference.path or config.model.path
        flag = "--config.reference.path" if config.reference.path else "--config.model.path"
        reference = source = setup.load_params(path, flag)
    else:
        reference, source = base.reference(setup.init_adapters()), base.params
    began = time.monotonic()
    with stop_on_signal() as stop_requested:
        fingerprint = setup.fingerprint(source, setup.data)
        cache = ReferenceCache(workdir / "reference", fingerprint, setup.data, setup.total_steps)
        scored = cache.complete(setup.scorer(), reference, stop_requested)
    log.info("%d of %d steps were scored now, the others were known", scored, setup.total_steps)
    words = [word for word in argv if word != "--overwrite"]  # which would delete what was computed
    log.info("next: python -m elbo_kto_jax.train %s", shlex.join(words))
    return {
        "examples": sum(len(setup.data.indices(step)) for step in range(setup.total_steps)),
        "draws": config.estimator.draws,
        "seconds": time.monotonic() - began,
        "cache": str(cache.path),
    }


if __name__ == "__main__":
    cli.run(main)
