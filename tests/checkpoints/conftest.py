"""A published model with random bits, and a state of training it."""

import jax
import optax
import pytest

from elbo_kto_jax.checkpoints.load import load_model
from elbo_kto_jax.checkpoints.model import Model
from elbo_kto_jax.checkpoints.training_state import TrainingState
from tests.published import write_published


@pytest.fixture
def model(tmp_path) -> Model:
    write_published(tmp_path / "published", dtype="bfloat16", bits=True)
    return load_model(tmp_path / "published")


@pytest.fixture
def state(model) -> TrainingState:
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), model.params)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return TrainingState(params, optimizer.init(params), {"step": 7, "note": "é"})
