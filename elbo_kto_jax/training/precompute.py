"""The reference pass of a run alone: B_ref of every example and draw, for training to find."""

import logging
import time
from pathlib import Path

from elbo_kto_jax import objectives
from elbo_kto_jax.checkpoints.digest import params_digest
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.workdir import Workdir, open_workdir, stop_on_signal
from elbo_kto_jax.training import inputs
from elbo_kto_jax.training.reference import ReferenceCache
from elbo_kto_jax.training.setup import Setup, check_held_out

log = logging.getLogger(__name__)


def precompute(config: Config, workdir: Path, *, overwrite: bool, skip_bad: bool) -> dict:
    """Scores with the reference what is not in the cache of `workdir` yet, and returns the summary.

    Raises:
      UserError: the objective has no reference, or something about model and data has to be mended.
      Interrupted: SIGTERM or SIGINT came; what is done is kept.
    """
    if not objectives.build(config.objective).needs.reference:
        raise UserError(f"config.objective.name: {config.objective.name!r} has no reference to precompute")
    check_held_out(config)  # as `train` does, for which this is
    paths.refuse_checkpoints(workdir, "--workdir")
    with open_workdir(workdir, config, overwrite, "precompute") as folder:
        setup = inputs.prepare_in(config, folder, skip_bad=skip_bad)
        summary = _precompute(setup, folder)
        folder.finish()
    return summary


def _precompute(setup: Setup, folder: Workdir) -> dict:
    config = setup.config
    weights, (base, adaptation) = inputs.Weights(setup, folder), setup.load_base()
    if base is None or adaptation is None:
        key = inputs.reference_key(config)
        reference = weights.load(key)
        digest = weights.digest(key)
    else:
        weights.check(inputs.MODEL, adaptation.base_digest)
        reference, digest = base.reference(weights.adapters(adaptation)), params_digest(base.params)
    folder.go_on()
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
