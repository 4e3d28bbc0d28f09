"""python -m elbo_kto_jax.precompute --config=configs/FILE.py --workdir=DIR: B_ref of every draw, for `train`."""

import logging
import shlex
import time
from pathlib import Path

from elbo_kto_jax import cli, objectives
from elbo_kto_jax.checkpoints.digest import params_digest
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.workdir import Workdir, open_workdir, stop_on_signal
from elbo_kto_jax.training import inputs
from elbo_kto_jax.training.reference import ReferenceCache
from elbo_kto_jax.training.setup import Setup, prepare

log = logging.getLogger(__name__)


def main(argv: list[str]) -> dict:
    flags = cli.Flags("elbo_kto_jax.precompute", "Compute the reference's ELBO of every example and draw of a run.")
    flags.add_config(workdir=True)
    flags.add_argument("--overwrite", action="store_true", help="delete what another command left in --workdir")
    flags.add_argument("--skip-bad-records", action="store_true", help="count and list bad records instead of stopping")
    options, config = flags.parse(argv)
    if not objectives.build(config.objective).needs.reference:
        raise UserError(f"config.objective.name: {config.objective.name!r} has no reference to precompute")
    workdir = Path(options.workdir)
    with open_workdir(workdir, config, options.overwrite, "precompute") as folder:
        setup = prepare(config, skip_bad=options.skip_bad_records, moment=folder.moment)
        folder.claim(inputs.of_setup(setup), inputs.files_of(setup))
        summary = _precompute(setup, folder)
        folder.finish()
    words = [word for word in argv if word != "--overwrite"]  # which would delete what was computed
    log.info("next: python -m elbo_kto_jax.train %s", shlex.join(words))
    return summary


def _precompute(setup: Setup, folder: Workdir) -> dict:
    config = setup.config
    weights, (base, adaptation) = inputs.Weights(setup, folder), setup.load_base()
    if base is None:
        key = inputs.reference_key(config)
        reference = weights.load(key)
        digest = weights.known(key)
    else:
        weights.check(inputs.MODEL, adaptation.base_digest)
        reference, digest = base.reference(setup.init_adapters()), params_digest(base.params)
    began = time.monotonic()
    with stop_on_signal() as stop_requested:
        fingerprint = setup.fingerprint(digest, setup.data)
        cache = ReferenceCache(folder.path / "reference", fingerprint, setup.data, setup.total_steps)
        scored = cache.complete(setup.scorer(), reference, stop_requested)
    log.info("%d of %d steps were scored now, the others were known", scored, setup.total_steps)
    return {
        "examples": sum(len(setup.data.indices(step)) for step in range(setup.total_steps)),
        "draws": config.estimator.draws,
        "seconds": time.monotonic() - began,
        "cache": str(cache.path),
    }


if __name__ == "__main__":
    cli.run(main)
