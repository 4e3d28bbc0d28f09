"""Every objective of the folder keeps the protocol: what it needs, derivatives, and names."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax import objectives
from elbo_kto_jax.objectives.protocol import Feedback, Objective, ValueFunction, known
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError

OPTIONS = config.Objective("", 0.4, 1.3, 0.7, "global_mean", 0.1)
NAMES = sorted(known())
SIZE, DRAWS = 8, 3


def built(name):
    return objectives.build(dataclasses.replace(OPTIONS, name=name))


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    policy, reference = (jnp.asarray(rng.normal(-40, 3, (SIZE, DRAWS)), jnp.float32) for _ in range(2))
    at = jnp.arange(SIZE)
    feedback = Feedback(at % 2 == 0, at < 6, at + 1)
    return policy, reference, feedback


@pytest.mark.parametrize("name", NAMES)
def test_outcome(name):
    """One cotangent for each completion, none for the padding, and metrics that are numbers."""
    objective, (policy, reference, feedback) = built(name), inputs()
    assert isinstance(objective, Objective)
    outcome = objective(policy, reference, feedback)
    assert outcome.elbo_cotangent.shape == (SIZE,)
    assert outcome.elbo_cotangent[:6].all()
    assert not outcome.elbo_cotangent[6:].any()
    assert all(metric.ndim == 0 for metric in outcome.metrics.values())
    assert outcome.values[1].shape == (SIZE,)


@pytest.mark.parametrize("name", NAMES)
def test_the_cotangent_is_the_derivative_of_the_loss(name):
    """Central differences in every completion's ELBO; of a coupled objective with the reference point held still."""
    objective, (policy, reference, feedback) = built(name), inputs()
    if getattr(objective, "coupled", False):
        objective = dataclasses.replace(
            objective, options=dataclasses.replace(objective.options, reference_point="zero")
        )
    found = objective(policy, reference, feedback)
    for b in range(SIZE):
        low, high = (float(objective(policy.at[b].add(step), reference, feedback).loss) for step in (-0.05, 0.05))
        np.testing.assert_allclose(found.elbo_cotangent[b], (high - low) / 0.1, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_cotangents_without_need_of_scores_do_not_depend_on_them(name):
    objective, (policy, reference, feedback) = built(name), inputs()
    other, _, _ = inputs(seed=1)
    a, b = (objective(elbo, reference, feedback).elbo_cotangent for elbo in (policy, other))
    assert np.array_equal(a, b) == (not objective.needs.scores)


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(built(name), ValueFunction)])
def test_value_function(name):
    """Its mean over the units is the loss, and its derivatives are those of the value."""
    objective, (policy, reference, feedback) = built(name), inputs()
    reward = np.asarray(policy - reference, np.float64).mean(axis=1)[:6, None]
    contrasted = np.einsum("ucr,c->ur", reward.reshape(-1, len(objective.contrast), 1), objective.contrast)
    margin = OPTIONS.beta * (contrasted - (reward.mean(axis=0) if objective.coupled else 0.0))
    labels = np.asarray(feedback.is_desirable[:6])
    loss = objective(policy, reference, feedback).loss
    np.testing.assert_allclose(objective.value(margin, labels, 0).mean(), loss, rtol=1e-5)
    for order in (1, 2):
        low, high = (objective.value(margin + step, labels, order - 1) for step in (-1e-5, 1e-5))
        np.testing.assert_allclose(objective.value(margin, labels, order), (high - low) / 2e-5, rtol=1e-5, atol=1e-8)


def test_an_unknown_name_is_refused():
    names = ", ".join(map(repr, NAMES))
    with pytest.raises(UserError, match=f"expected one of {names}, got 'no_such_objective'"):
        built("no_such_objective")
