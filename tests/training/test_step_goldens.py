"""training/step.py against golden values: estimates, gradient, a trajectory of AdamW steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.models.network import MaskPredictor
from elbo_kto_jax.runtime import config
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training import step
from tests.golden import LAYOUTS
from tests.training.steps import (
    KEEP_GRADIENT,
    assert_same_gradient,
    scored,
    setup,
    tree_difference,
)

GOLDEN_KTO = config.Objective("elbo_kto", 0.1, 1.0, 1.0, "global_mean", 0.0)
GOLDEN_ADAMW = config.Optimizer(1e-3, "cosine", 0.1, 0.9, 0.95, 0.01, 1.0, "float32")


@pytest.fixture(scope="module")
def golden_programs(golden):
    """Programs and first state for batches of every golden record, whose "optimizer" keeps the gradient."""
    records, draws = golden.arrays["l_values"].shape
    return setup(
        MaskPredictor(golden.config),
        golden.policy,
        KEEP_GRADIENT,
        num_examples=records,
        draws=draws,
        objective=GOLDEN_KTO,
    )


@pytest.mark.parametrize("mode", LAYOUTS)
def test_golden_estimates(golden, golden_programs, mode):
    arrays, (records, draws), (programs, _) = golden.arrays, golden.arrays["l_values"].shape, golden_programs
    batch = golden.batch(range(records), arrays["mask"], arrays["l_values"], mode, rows=4, size=records)
    for params, name in ((golden.policy, "theta"), (golden.reference, "ref")):
        estimates = scored(programs, params, batch).reshape(records, draws)
        np.testing.assert_allclose(estimates, arrays[f"{mode}.B_{name}_draws"], atol=2e-3, rtol=0)
        np.testing.assert_allclose(estimates, arrays[f"{mode}.B_{name}_draws_f64"], rtol=3e-6)


@pytest.mark.parametrize(("mode", "name"), [("padded", "grads"), ("unpadded", "grads_unpadded")])
def test_golden_gradient(golden, golden_programs, mode, name):
    arrays, described, (programs, state) = golden.arrays, golden.described, golden_programs
    size, records = len(arrays["mask"]), len(arrays[f"{name}.c_b"])
    batch = golden.batch(range(records), arrays["mask"], arrays["l_values"], mode, rows=4, size=size)
    state, metrics = step.train_step(programs, jax.tree.map(jnp.copy, state), batch, golden.reference)
    np.testing.assert_allclose(metrics["reward"][:records], arrays[f"{name}.r"], atol=3e-3)
    np.testing.assert_allclose(metrics["loss"], described[f"{name}.loss"], atol=2e-5)
    np.testing.assert_allclose(metrics["grad_norm"], described[f"{name}.global_norm"], rtol=1e-4)
    assert_same_gradient(state.opt_state, golden.tree(f"{name}.safetensors"))


@pytest.fixture(scope="module")
def golden_training(golden):
    steps, size, draws = golden.arrays["traj.l_values"].shape
    tx = train_state.optimizer(GOLDEN_ADAMW, steps)
    return setup(MaskPredictor(golden.config), golden.policy, tx, num_examples=size, draws=draws, objective=GOLDEN_KTO)


@pytest.mark.parametrize("reference_mode", ["online", "precomputed"])
def test_golden_trajectory(golden, golden_training, reference_mode):
    arrays, (programs, state) = golden.arrays, golden_training
    steps, size, _ = arrays["traj.l_values"].shape
    state = jax.tree.map(jnp.copy, state)
    for t in range(steps):
        masks, counts = arrays["traj.mask"][t], arrays["traj.l_values"][t]
        batch = golden.batch(arrays["traj.batch"][t], masks, counts, "unpadded", rows=2, size=size)
        reference = golden.reference
        if reference_mode == "precomputed":
            reference = scored(programs, reference, batch)
        state, metrics = step.train_step(programs, state, batch, reference)
        np.testing.assert_allclose(metrics["loss"], arrays["traj.loss"][t], atol=1e-4)
        np.testing.assert_allclose(metrics["reference_point"], arrays["traj.z0"][t], atol=3e-3)
        np.testing.assert_allclose(metrics["grad_norm"], arrays["traj.grad_norm"][t], rtol=1e-3)
    difference = tree_difference(state.params, golden.tree("final.safetensors"))
    errors = np.concatenate([np.abs(leaf).ravel() for leaf in jax.tree.leaves(difference)])
    assert errors.max() <= 3e-4
    assert errors.mean() <= 1e-6


def test_golden_learning_rate(golden):
    expected = golden.arrays["traj.lr"]
    rate = train_state.learning_rate(GOLDEN_ADAMW, len(expected))
    np.testing.assert_allclose([rate(t) for t in range(len(expected))], expected, rtol=1e-6, atol=1e-12)
