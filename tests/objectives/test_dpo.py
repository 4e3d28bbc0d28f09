"""objectives/dpo.py: the formula, its derivative, and numbers worked out by hand (docs/method.md 9)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.objectives.dpo import Dpo
from elbo_kto_jax.objectives.protocol import Feedback
from elbo_kto_jax.runtime import config


def objective(beta=0.5, smoothing=0.0) -> Dpo:
    return Dpo(config.Objective("elbo_dpo", beta, 1.0, 1.0, "zero", smoothing))


def feedback(completions: int, size: int) -> Feedback:
    at = jnp.arange(size)
    return Feedback(at % 2 == 0, at < completions, jnp.ones(size, jnp.int32))


def test_numbers_by_hand():
    """Two pairs, K = 2, beta 0.5: r = (2, -2), (0, 1), so h = 2 and -0.5."""
    reference = jnp.full((4, 2), -10.0)
    policy = reference + jnp.array([[1.0, 3.0], [-2.0, -2.0], [0.0, 0.0], [2.0, 0.0]])
    found = objective()(policy, reference, feedback(4, 4))
    assert found.loss == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(0.5))) / 2, rel=1e-6)
    slopes = [0.5 / (1 + math.exp(2)) / 2, 0.5 / (1 + math.exp(-0.5)) / 2]
    np.testing.assert_allclose(found.elbo_cotangent, [-slopes[0], slopes[0], -slopes[1], slopes[1]], rtol=1e-6)
    name, rewards = found.values
    assert name == "reward"
    np.testing.assert_allclose(rewards, [2.0, -2.0, 0.0, 1.0])
    expected = {
        "reward_desirable": 1.0,
        "reward_undesirable": -0.5,
        "reward_margin": 1.5,
        "accuracy": 0.5,
        "saturated_fraction": 0.0,
    }
    assert {key: float(found.metrics[key]) for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("completions", [6, 10])
def test_loss_and_cotangent_are_the_formula_and_its_autodiff(smoothing, completions):
    """With padding, which has no part in either."""
    rng = np.random.default_rng(0)
    policy, reference = (jnp.asarray(rng.normal(-50, 4, (10, 3)), jnp.float32) for _ in range(2))
    dpo, given = objective(0.3, smoothing), feedback(completions, 10)

    def plain(elbo):
        reward = elbo - reference.mean(axis=1)
        h = 0.3 * (reward[0::2] - reward[1::2])[: completions // 2]
        return jnp.mean(-(1 - smoothing) * jnp.log(jax.nn.sigmoid(h)) - smoothing * jnp.log(jax.nn.sigmoid(-h)))

    loss, cotangent = jax.value_and_grad(plain)(policy.mean(axis=1))
    found = dpo(policy, reference, given)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(found.elbo_cotangent, cotangent, rtol=1e-5, atol=1e-9)
    assert not found.elbo_cotangent[completions:].any()


def test_at_the_start_the_loss_is_log_2_and_without_beta_nothing_moves():
    elbo = jnp.asarray(np.random.default_rng(0).normal(-50, 4, (8, 2)), jnp.float32)
    found = objective()(elbo, elbo, feedback(8, 8))
    assert found.loss == np.float32(math.log(2))
    assert not found.values[1].any()
    assert not objective(beta=0.0)(elbo, elbo + 1, feedback(8, 8)).elbo_cotangent.any()


def test_large_margins_have_finite_losses():
    elbo = jnp.array([[0.0], [-5e4], [-5e4], [0.0]])
    found = objective()(elbo, jnp.zeros((4, 1)), feedback(4, 4))
    assert found.loss == pytest.approx(12500.0)
    np.testing.assert_allclose(found.elbo_cotangent, [0.0, 0.0, -0.25, 0.25])
    assert found.metrics["saturated_fraction"] == 1.0


def test_held_out_figures():
    found = objective().held_out(np.array([3.0, 1.0, 0.0, 2.0, 5.0, 4.0], np.float32), np.arange(6) % 2 == 0)
    assert found == pytest.approx({"reward_margin": 1 / 3, "accuracy": 2 / 3})
