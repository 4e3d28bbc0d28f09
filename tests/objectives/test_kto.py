"""objectives/kto.py against the golden losses and against autodiff of the loss as docs/method.md 2 writes it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.objectives import kto
from tests.golden import LAYOUTS

WEIGHTS = {"lam1": (1.0, 1.0), "lam2": (1.33, 0.75)}
BETA = 0.1


def loss_of(reward, z0, label, is_example=None, *, beta=BETA, weights=WEIGHTS["lam2"]):
    is_example = np.ones(len(reward), bool) if is_example is None else is_example
    return kto.loss_and_cotangent(
        jnp.asarray(reward, jnp.float32),
        jnp.asarray(z0, jnp.float32),
        jnp.asarray(label),
        jnp.asarray(is_example),
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )


@pytest.mark.parametrize(("mode", "point", "lam"), list(itertools.product(LAYOUTS, ("global_mean", "zero"), WEIGHTS)))
def test_golden_values(golden, mode, point, lam):
    """From the golden ELBOs, whose float32 sums make r good to 3e-3 nats and s to beta times that."""
    arrays, name = golden.arrays, f"{mode}.{point}.{lam}"
    reward = jnp.asarray(golden.elbo(mode, "theta") - golden.elbo(mode, "ref"), jnp.float32)
    z0 = kto.reference_point(reward, jnp.ones(len(reward), bool), point)
    loss = loss_of(reward, z0, arrays["label"], weights=WEIGHTS[lam])
    np.testing.assert_allclose(reward, arrays[f"{name}.r"], atol=3e-3)
    np.testing.assert_allclose(z0, arrays[f"{name}.z0"], atol=3e-3)
    np.testing.assert_allclose(loss.kto_logit, arrays[f"{name}.s"], atol=3e-4)
    np.testing.assert_allclose(loss.loss, arrays[f"{name}.loss"], atol=2e-5)
    np.testing.assert_allclose(loss.elbo_cotangent, arrays[f"{name}.c_b"], rtol=2e-4)


@pytest.mark.parametrize("point", ["global_mean", "zero"])
def test_cotangent_is_the_gradient_with_the_reference_point_held_constant(point):
    rng = np.random.default_rng(0)
    reward, label = jnp.asarray(rng.normal(0, 20, 9), jnp.float32), rng.random(9) < 0.5

    def loss(r):  # docs/method.md 2, word for word
        z0 = jax.lax.stop_gradient(jnp.mean(r)) if point == "global_mean" else 0.0
        s = BETA * (r - z0)
        weight = jnp.where(label, *WEIGHTS["lam2"])
        return jnp.mean(weight - weight * jax.nn.sigmoid(jnp.where(label, s, -s)))

    found = loss_of(reward, kto.reference_point(reward, jnp.ones(9, bool), point), label)
    expected, gradient = jax.value_and_grad(loss)(reward)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-6)
    np.testing.assert_allclose(found.elbo_cotangent, gradient, rtol=1e-5)
    assert (np.sign(found.elbo_cotangent) == np.where(label, -1, 1)).all()


def test_extreme_rewards_are_finite():
    """And the weakest pull is not rounded to 0: sigmoid'(50) is 2e-22."""
    label = np.array([True, False, True, False, True, False])
    found = loss_of([1e6, 1e6, -1e6, -1e6, 500.0, -500.0], 0.0, label)
    assert all(np.isfinite(x).all() for x in found)
    np.testing.assert_allclose(found.loss, (2 * 0 + 0.75 + 1.33) / 6, rtol=1e-6)
    np.testing.assert_allclose(found.elbo_cotangent[4:] * 6 / BETA, np.array([-1.33, 0.75]) * np.exp(-50.0), rtol=1e-4)


def test_padding_does_not_count():
    reward, label = np.array([1.0, -3.0, 8.0]), np.array([True, False, True])
    is_example = np.array([True, True, True, False, False])
    padded = np.concatenate([reward, [1e4, -77.0]]).astype(np.float32)
    for point in ("global_mean", "zero"):
        z0 = kto.reference_point(jnp.asarray(padded), jnp.asarray(is_example), point)
        np.testing.assert_allclose(z0, 2.0 if point == "global_mean" else 0.0)
        found = loss_of(padded, z0, np.concatenate([label, [True, False]]), is_example)
        alone = loss_of(reward, z0, label)
        np.testing.assert_allclose(found.loss, alone.loss, rtol=1e-6)
        np.testing.assert_allclose(found.elbo_cotangent, [*alone.elbo_cotangent, 0, 0], rtol=1e-6)


def test_mean_over_nothing_is_nan():
    assert np.isnan(kto.masked_mean(jnp.ones(3), jnp.zeros(3, bool)))
