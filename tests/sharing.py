"""Runs of one test file that take the same steps share the programs that take them."""

from collections.abc import Hashable

import pytest

from elbo_kto_jax.scoring import likelihood, records
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.training import setup as train_setup
from elbo_kto_jax.training.setup import Setup
from elbo_kto_jax.training.trainer import Trainer


def share_programs(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone, a command takes the programs of an earlier one that was asked for the same.

    A run's data, weights, reference and hooks are its own.
    """
    new_trainer = Trainer.of.__func__
    trainers: dict[Hashable, Trainer] = {}
    scorers: dict[Hashable, Scorer] = {}

    def scorer(model, mesh, **options) -> Scorer:
        key = (model, mesh, *sorted(options.items()))
        if key not in scorers:
            scorers[key] = Scorer(model, mesh, **options)
        return scorers[key]

    def of(cls, setup: Setup) -> Trainer:
        config = setup.config
        said = (config.objective, config.optimizer, config.estimator, config.lora, config.seed)
        key = (setup.scorer(), setup.total_steps, repr(said))  # equal runs have the same scorer
        if key not in trainers:
            trainers[key] = new_trainer(cls, setup)
            return trainers[key]
        base, adaptation = setup.load_base()
        return trainers[key]._replace(setup=setup, base=base, adaptation=adaptation)

    for module in (train_setup, records, likelihood):
        patch.setattr(module, "Scorer", scorer)
    patch.setattr(Trainer, "of", classmethod(of))
