"""What takes the steps of a run, and the state that it starts from."""

import logging
from typing import NamedTuple

import optax

from elbo_kto_jax.checkpoints.manifest import Adaptation
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints, TrainingState
from elbo_kto_jax.models import lora
from elbo_kto_jax.models.network import Params
from elbo_kto_jax.scoring.scorer import Weights
from elbo_kto_jax.training import inputs
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training.progress import Progress
from elbo_kto_jax.training.setup import Setup
from elbo_kto_jax.training.state import TrainState
from elbo_kto_jax.training.step import Programs, build_programs

log = logging.getLogger(__name__)


class Trainer(NamedTuple):
    """The programs of a run, and what belongs to its adapters.

    Attributes:
      base: what the run's adapters belong to, and `adaptation` how checkpoints name it; None without adapters.
    """

    setup: Setup
    programs: Programs
    tx: optax.GradientTransformation
    shardings: TrainState
    base: lora.Base | None
    adaptation: Adaptation | None

    @classmethod
    def of(cls, setup: Setup) -> "Trainer":
        config = setup.config
        tx = train_state.optimizer(config.optimizer, setup.total_steps)
        abstract = train_state.abstract_trained(setup.model, config.lora)
        shardings = train_state.state_shardings(tx, abstract, setup.mesh, setup.model.config)
        programs = build_programs(
            setup.scorer(),
            setup.objective,
            draws=config.estimator.draws,
            tx=tx,
            shardings=shardings,
            seed=config.seed,
        )
        return cls(setup, programs, tx, shardings, *setup.load_base())

    def policy(self, trained: Params) -> Weights:
        """The whole model of which `trained` is what the optimizer moves."""
        return trained if self.base is None else self.base.policy(trained)

    def start(self, weights: inputs.Weights, checkpoints: TrainingCheckpoints) -> tuple[TrainState, Progress]:
        """The state after the latest checkpoint, or before the first step."""
        setup, step = self.setup, checkpoints.latest_step()
        if step is None:
            params = weights.load(inputs.MODEL) if self.adaptation is None else weights.adapters(self.adaptation)
            state, progress = train_state.init_state(self.tx, params, self.shardings), Progress()
        else:
            abstract = train_state.abstract_trained(setup.model, setup.config.lora)
            wanted = train_state.abstract_state(self.tx, abstract, self.shardings)
            params, opt_state, found = checkpoints.restore_latest(TrainingState(*wanted, progress={}))
            state, progress = TrainState(params, opt_state), Progress.restored(found)
            log.info("going on from step %d", step)
        progress.plan(setup.total_steps)
        if self.adaptation is not None:
            weights.check(inputs.MODEL, self.adaptation.base_digest)
        log.info(
            "%s on %s: %d steps of %d of the %d examples, %d draws each; %d rows of %s%d tokens at once",
            setup.config.objective.name,
            ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items()),
            setup.total_steps,
            setup.data.most_examples,
            len(setup.data.examples),
            setup.config.estimator.draws,
            setup.data.layout.rows,
            "up to " if setup.data.layout.shorter else "",
            setup.data.layout.length,
        )
        return state, progress
