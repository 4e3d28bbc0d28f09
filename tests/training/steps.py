"""What tests of training/step.py share: programs, gradients, and the losses of docs/method.md written down plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from elbo_kto_jax import objectives
from elbo_kto_jax.models.network import abstract_params
from elbo_kto_jax.runtime import config
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training import step

ONE_DEVICE = config.Mesh(1, 1, 1)

# An "optimizer" that moves nothing and keeps the gradient as its state.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, _, params: (jax.tree.map(jnp.zeros_like, params), grads),
)


def setup(model, params, tx, *, num_examples, draws, objective, sizes=ONE_DEVICE, residuals="recompute"):
    """The programs, and the state before the first step, over as many devices as the mesh has."""
    devices = jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor]
    mesh = rules.make_mesh(sizes, devices)
    shardings = train_state.state_shardings(tx, abstract_params(model), mesh, model.config)
    scorer = Scorer(model, mesh, size=num_examples * draws, residuals=residuals)
    programs = step.build_programs(scorer, objectives.build(objective), draws=draws, tx=tx, shardings=shardings)
    own = jax.tree.map(lambda x, s: jax.device_put(jnp.array(x), s), params, shardings.params)  # steps donate them
    return programs, train_state.init_state(tx, own, shardings)


def scored(programs, params, batch) -> np.ndarray:
    return np.asarray(programs.scorer(params, batch.micro_batches))


def rewards_and_loss(programs, params, reference, batch) -> dict:
    """The metrics of a step without its gradient."""
    return step.batch_loss(programs, programs.scorer(params, batch.micro_batches), reference, batch)[1]


def gradient_and_metrics(model, params, reference, batch, **options):
    """What `train_step` hands to the optimizer, and its metrics."""
    programs, state = setup(model, params, KEEP_GRADIENT, num_examples=len(batch.feedback.is_example), **options)
    state, metrics = step.train_step(programs, state, batch, reference)
    return state.opt_state, metrics


def tree_difference(a, b):
    return jax.tree.map(lambda x, y: x - y, a, b)


def relative_distance(tree, expected) -> float:
    """Euclidean distance over all leaves, relative to the length of `expected`."""
    return float(optax.tree.norm(tree_difference(tree, expected)) / optax.tree.norm(expected))


def assert_same_gradient(gradient, expected):
    assert relative_distance(gradient, expected) <= 1e-5
    assert max(jax.tree.leaves(jax.tree.map(relative_distance, gradient, expected))) <= 1e-4


def plain_kto_loss(estimates, reference, label, objective):
    reward = estimates.mean(axis=1) - reference.mean(axis=1)
    z0 = jax.lax.stop_gradient(reward.mean()) if objective.reference_point == "global_mean" else 0.0
    score = objective.beta * (reward - z0) * jnp.where(label, 1, -1)
    weight = jnp.where(label, objective.desirable_weight, objective.undesirable_weight)
    return jnp.mean(weight - weight * jax.nn.sigmoid(score))


def plain_dpo_loss(estimates, reference, objective):
    reward = estimates.mean(axis=1) - reference.mean(axis=1)
    return jnp.mean(-jax.nn.log_sigmoid(objective.beta * (reward[::2] - reward[1::2])))
