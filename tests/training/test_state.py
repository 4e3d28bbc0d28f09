"""training/state.py: the rate's schedules, and what Adam's moments say of the gradient's noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elbo_kto_jax.runtime import config
from elbo_kto_jax.training import state as train_state


@pytest.mark.parametrize("clip_norm", [1e9, 1.0])
@pytest.mark.parametrize("ratio", [0.5, 20.0])
def test_noise_scale(ratio, clip_norm):
    """Gradients g = signal + noise with tr Cov = `ratio` |signal|^2 in 4,000 dimensions, where a mean over ten steps
    tells a good deal; clipped to a fixed length they have the same ratio."""
    options = config.Optimizer(1e-3, "cosine", 0.0, 0.9, 0.95, 0.0, clip_norm, "float32")
    tx = train_state.optimizer(options, 100)
    params = {"a": {"kernel": jnp.zeros((40, 50))}, "b": {"scale": jnp.zeros(2000)}}
    opt_state = tx.init(params)
    update = jax.jit(lambda grads, state: tx.update(grads, state, params)[1])
    rng = np.random.default_rng(0)
    signal = rng.normal(size=4000)
    found = []
    for _ in range(80):
        g = jnp.asarray(signal + np.sqrt(ratio) * rng.normal(size=4000), jnp.float32)
        opt_state = update({"a": {"kernel": g[:2000].reshape(40, 50)}, "b": {"scale": g[2000:]}}, opt_state)
        found.append(float(train_state.gradient_noise_scale(opt_state, options, 16)))
    assert np.isnan(found[0])
    assert np.nanmean(found[20:]) == pytest.approx(16 * ratio, rel=0.1)
    assert found[4] == pytest.approx(16 * ratio, rel=0.5)  # the means' bias is corrected early on too


def rates(schedule: str, warmup_fraction: float, steps: int) -> list[float]:
    options = config.Optimizer(0.5, schedule, warmup_fraction, 0.9, 0.95, 0.0, 1.0, "float32")
    rate = train_state.learning_rate(options, steps)
    return [float(rate(step)) for step in range(steps + 1)]


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", [0.5] * 9),
        ("linear", [0.5 * (8 - step) / 8 for step in range(9)]),
        ("cosine", [0.25 * (1 + np.cos(np.pi * step / 8)) for step in range(9)]),
    ],
)
def test_schedules(schedule, after):
    assert rates(schedule, 0.0, 8) == pytest.approx(after, abs=1e-7)
    assert rates(schedule, 0.2, 10) == pytest.approx([0, 0.25, *after], abs=1e-7)
    assert rates(schedule, 1.0, 4) == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])  # nothing is left after the warm-up


def test_the_cosine_is_what_it_was_bit_by_bit():
    """The rates of runs that began before there was a choice."""
    before = optax.warmup_cosine_decay_schedule(init_value=0.0, peak_value=0.5, warmup_steps=3, decay_steps=30)
    assert rates("cosine", 0.1, 30) == [float(before(step)) for step in range(31)]
