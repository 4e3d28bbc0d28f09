"""What the rewards of a run are measured against: scores made before, or weights that score in every step."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elbo_kto_jax.checkpoints.digest import params_digest
from elbo_kto_jax.models import lora
from elbo_kto_jax.models.network import Params
from elbo_kto_jax.scoring.scorer import Weights
from elbo_kto_jax.training import inputs
from elbo_kto_jax.training.data import TrainingData
from elbo_kto_jax.training.reference import ReferenceCache
from elbo_kto_jax.training.step import Reference
from elbo_kto_jax.training.trainer import Trainer


class RunReference(NamedTuple):
    """The reference of all steps: a cache of scores, weights, the adapters' base, or None."""

    source: ReferenceCache | Weights | lora.Base | None

    def of_step(self, index: int, trained: Params | None = None) -> Reference:
        """What a step, counted from 0, wants to know of it; with `trained`, a base is made the model that scores."""
        if isinstance(self.source, ReferenceCache):
            return self.source.elbo_ref[index]
        if isinstance(self.source, lora.Base) and trained is not None:
            return self.source.reference(trained)
        return self.source


class RunReferences(NamedTuple):
    """Those of the training batches and of the held-out ones."""

    training: RunReference
    held_out: RunReference


def prepare_references(
    trainer: Trainer,
    trained: Params,
    weights: inputs.Weights,
    workdir: Path,
    stop_requested: Callable[[], bool],
    *,
    fresh: bool,
) -> RunReferences:
    """The references of a run; what is to be scored before training is scored here, or read.

    Args:
      trained: what the optimizer moves.
      fresh: `trained` is what training starts from, which mostly is the reference.

    Raises:
      Interrupted: the reference pass was stopped; what was scored is saved.
    """
    setup, config = trainer.setup, trainer.setup.config
    if not setup.objective.needs.reference:
        return RunReferences(RunReference(None), RunReference(None))
    online, key = config.reference.mode == "online", inputs.reference_key(config)

    @functools.cache  # loaded once, and only where something is not scored yet
    def reference() -> Weights | lora.Base:
        if trainer.base is not None:
            return trainer.base if online else trainer.base.reference(trained)
        if not fresh or key != inputs.MODEL:
            return weights.load(key)
        return jax.tree.map(jnp.copy, trained) if online else trained  # the first step donates the originals

    if online:
        return RunReferences(RunReference(reference()), RunReference(reference()))
    if weights.known(key) is None:
        reference()
    digest = weights.digest(key) if trainer.base is None else params_digest(trainer.base.params)

    def scored(folder: str, data: TrainingData | None, steps: int) -> RunReference:
        if data is None:
            return RunReference(None)
        cache = ReferenceCache(workdir / folder, setup.fingerprint(digest, data), data, steps)
        if not cache.known.all():
            cache.complete(trainer.programs.scorer, reference(), stop_requested)
        return RunReference(cache)

    held_out = setup.eval_data if config.train.eval_every else None
    references = RunReferences(
        scored("reference", setup.data, setup.total_steps),
        scored("reference_eval", held_out, held_out.steps_per_epoch if held_out else 0),
    )
    weights.verify(key)
    return references
