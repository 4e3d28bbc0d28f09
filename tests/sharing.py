"""Runs of one test file that take the same steps share the programs that take them."""

from collections.abc import Hashable

import pytest

from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.training.setup import Setup
from elbo_kto_jax.training.trainer import Trainer


def share_programs(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone, a run takes the programs of an earlier one that was asked for the same.

    A run's data, weights, reference and hooks are its own.
    """
    new_trainer, new_scorer = Trainer.of.__func__, Setup.scorer
    trainers: dict[Hashable, Trainer] = {}
    scorers: dict[Hashable, Scorer] = {}

    def scorer(setup: Setup) -> Scorer:
        key = scorer_key(setup)
        if key not in scorers:
            scorers[key] = new_scorer(setup)
        return scorers[key]

    def of(cls, setup: Setup) -> Trainer:
        config = setup.config
        said = (config.objective, config.optimizer, config.estimator, config.lora, config.seed)
        key = (*scorer_key(setup), setup.total_steps, repr(said))
        if key not in trainers:
            trainers[key] = new_trainer(cls, setup)
            return trainers[key]
        base, adaptation = setup.load_base()
        return trainers[key]._replace(setup=setup, base=base, adaptation=adaptation)

    patch.setattr(Setup, "scorer", scorer)
    patch.setattr(Trainer, "of", classmethod(of))


def scorer_key(setup: Setup) -> tuple[Hashable, ...]:
    """Everything that a run's scorer depends on."""
    size = setup.data.batch_size * setup.config.estimator.draws
    return setup.model, setup.mesh, size, setup.config.train.one_pass_microbatches
