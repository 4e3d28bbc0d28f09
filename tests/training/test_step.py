"""training/step.py: exact zeros, gradients against autodiff of the whole loss, and few compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.objectives.protocol import Feedback
from elbo_kto_jax.runtime import config
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training import step
from elbo_kto_jax.training.data import TrainingData
from tests import tiny
from tests.share import cases
from tests.training.steps import (
    KEEP_GRADIENT,
    ONE_DEVICE,
    assert_same_gradient,
    gradient_and_metrics,
    plain_dpo_loss,
    plain_kto_loss,
    relative_distance,
    rewards_and_loss,
    scored,
    setup,
)

# ---- exactness ----


@pytest.mark.parametrize(
    ("dtype", "packed", "sizes", "residuals"),
    cases(
        [
            ("float32", True, ONE_DEVICE, "recompute"),
            ("bfloat16", False, ONE_DEVICE, "recompute"),
            ("bfloat16", True, ONE_DEVICE, "device"),
            ("bfloat16", True, config.Mesh(2, 2, 2), "host"),
            ("bfloat16", True, config.Mesh(2, 2, 2), "recompute"),
        ],
        [
            ("bfloat16", True, ONE_DEVICE, "recompute"),
            ("float32", False, ONE_DEVICE, "recompute"),
            ("float32", True, ONE_DEVICE, "device"),
            ("bfloat16", False, ONE_DEVICE, "host"),
            ("float32", False, ONE_DEVICE, "device"),
            ("bfloat16", False, ONE_DEVICE, "device"),
            ("float32", True, config.Mesh(2, 2, 2), "recompute"),
            ("float32", False, config.Mesh(2, 2, 2), "recompute"),
            ("bfloat16", False, config.Mesh(2, 2, 2), "recompute"),
        ],
    ),
    ids=str,
)
def test_reward_is_exactly_zero_while_policy_and_reference_are_equal(dtype, packed, sizes, residuals):
    """Online, and precomputed by another instance of the programs."""
    data = TrainingData(
        tiny.examples(6), tiny.layout(4, packed), estimator=config.Estimator(2, "uniform"), batch_size=6, seed=0
    )
    batch = data.batch(0)
    assert 1 < len(batch.micro_batches) <= 3
    (programs, state), (other, frozen) = (
        setup(
            tiny.model(dtype),
            tiny.params(0),
            KEEP_GRADIENT,
            num_examples=6,
            draws=2,
            objective=tiny.KTO,
            sizes=sizes,
            residuals=residuals,
        )
        for _ in range(2)
    )
    for reference in (frozen.params, scored(other, frozen.params, batch)):
        _, metrics = step.train_step(programs, jax.tree.map(jnp.copy, state), batch, reference)
        np.testing.assert_array_equal(metrics["reward"], np.zeros(6))
        assert metrics["grad_norm"] > 0  # c_b is not zero where the reward is
        np.testing.assert_allclose(metrics["loss"], 0.5 * (4 * 1.33 + 2 * 0.75) / 6, rtol=1e-6)


def test_estimates_do_not_depend_on_the_layout():
    """Packed among others, or alone in a row of its own length: the same up to float32 rounding."""
    estimator, params = config.Estimator(2, "uniform"), tiny.params(0)
    examples = tiny.examples(6)
    data = TrainingData(examples, tiny.layout(2), estimator=estimator, batch_size=6, seed=0)
    programs, state = setup(tiny.model(), params, KEEP_GRADIENT, num_examples=6, draws=2, objective=tiny.KTO)
    alone = tiny.plain_estimates(params, examples, data.indices(0), estimator, seed=0)
    assert max(rows.segment_ids.max() for rows in data.batch(0).micro_batches) > 1
    np.testing.assert_allclose(scored(programs, state.params, data.batch(0)).reshape(6, 2), alone, rtol=2e-6)


# ---- the gradient is that of the loss as docs/method.md 2 states it ----


@pytest.mark.parametrize(
    ("objective", "scheme", "batch_size", "dtype"),
    [
        (tiny.KTO, "uniform", 5, "float32"),  # 3 examples in a batch of 5: the last of an epoch
        (tiny.DPO, "uniform", 6, "float32"),  # 2 pairs in a batch of 3
        (tiny.DPO, "balanced", 4, "float32"),
        (config.Objective("elbo_kto", 0.3, 0.5, 2.0, "zero", 0.0), "bernoulli", 3, "float32"),
        (tiny.SFT, "complementary", 5, "float32"),
        (tiny.SFT, "complementary", 5, "bfloat16"),
    ],
)
def test_gradient_is_autodiff_of_the_whole_loss(objective, scheme, batch_size, dtype):
    pairs = objective.name == "elbo_dpo"
    num, estimator = (4, config.Estimator(2, scheme)) if pairs else (3, config.Estimator(3, scheme))
    examples, params, reference = tiny.examples(num), tiny.params(0), tiny.params(1)
    data = TrainingData(examples, tiny.layout(2), estimator=estimator, batch_size=batch_size, seed=0, group=1 + pairs)
    indices = data.indices(0)
    assert len(indices) == num

    @jax.jit
    @jax.value_and_grad
    def plain(p):
        estimates = tiny.plain_estimates(p, examples, indices, estimator, seed=0)
        if objective.name == "sft":
            return -jnp.mean(estimates.mean(axis=1) / examples.completion_length[indices])
        other = tiny.plain_estimates(reference, examples, indices, estimator, seed=0)
        if pairs:
            return plain_dpo_loss(estimates, other, objective)
        return plain_kto_loss(estimates, other, examples.is_desirable[indices], objective)

    loss, expected = plain(params)
    gradient, metrics = gradient_and_metrics(
        tiny.model(dtype),
        params,
        None if objective.name == "sft" else reference,
        data.batch(0),
        objective=objective,
        draws=estimator.draws,
    )
    if dtype == "bfloat16":  # 8 bits of mantissa
        np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-2)
        assert relative_distance(gradient, expected) <= 5e-2
    else:
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        assert_same_gradient(gradient, expected)


@pytest.mark.parametrize("batch_size", [5, 7])
@pytest.mark.parametrize("rows", [1, 16])
def test_reference_point_is_the_mean_over_the_global_batch(rows, batch_size):
    """However many micro-batches the batch takes, and without its padding."""
    data = TrainingData(
        tiny.examples(5),
        tiny.layout(rows, False),
        estimator=config.Estimator(2, "uniform"),
        batch_size=batch_size,
        seed=0,
    )
    programs, state = setup(
        tiny.model(), tiny.params(0), KEEP_GRADIENT, num_examples=batch_size, draws=2, objective=tiny.KTO
    )
    metrics = rewards_and_loss(programs, state.params, tiny.params(1), data.batch(0))
    reward = np.asarray(metrics["reward"])[:5]
    assert np.ptp(reward) > 0.1
    np.testing.assert_allclose(metrics["reference_point"], reward.mean(), rtol=1e-5)


@pytest.mark.parametrize("reference_mode", ["online", "precomputed"])
@pytest.mark.parametrize(
    ("residuals", "used"),
    [
        ("recompute", {"score", "grad"}),
        ("device", {"forward", "backward"}),
        ("host", {"forward", "backward"}),
    ],
)
def test_each_program_is_compiled_once(reference_mode, residuals, used):
    """Over steps that differ in lengths, in targets, in the number of micro-batches and in the number of examples."""
    estimator = config.Estimator(3, "complementary")
    data = TrainingData(tiny.examples(7), tiny.layout(1), estimator=estimator, batch_size=3, seed=0)
    tx = train_state.optimizer(config.Optimizer(1e-3, "cosine", 0.1, 0.9, 0.95, 0.01, 1.0, "float32"), 10)
    programs, state = setup(
        tiny.model(),
        tiny.params(0),
        tx,
        num_examples=3,
        draws=3,
        objective=tiny.KTO,
        residuals=residuals,
    )
    shapes = set()
    for batch in data.batches(0, 3):
        reference = state.params if reference_mode == "online" else np.zeros(9, np.float32)
        shapes.add((len(batch.micro_batches), int(batch.feedback.is_example.sum()), batch.real_tokens))
        state, _ = step.train_step(programs, state, batch, reference)
    assert len(shapes) == 3
    assert {count for count, *_ in shapes} == {2, 5, 6}
    names = ("score", "grad", "forward", "backward", "loss", "update")
    owner = {name: programs.scorer if name in ("score", "forward") else programs for name in names}
    sizes = {name: getattr(owner[name], name)._cache_size() for name in names}
    assert sizes == {name: int(name in used | {"loss", "update"}) for name in names}


# ---- rows as short as the batch allows ----


def of_rows(*shorter: int) -> TrainingData:
    layout = tiny.layout(2)._replace(shorter=(shorter,) if shorter else ())
    return TrainingData(tiny.examples(7), layout, estimator=config.Estimator(3, "uniform"), batch_size=3, seed=0)


def test_rows_of_several_lengths_give_the_gradient_of_rows_of_one():
    """In two passes; each length has its programs compiled once, and rewards are exactly 0."""
    data, fixed, reference = of_rows(16), of_rows(), np.zeros(9, np.float32)
    programs, state = setup(tiny.model(), tiny.params(0), KEEP_GRADIENT, num_examples=3, draws=3, objective=tiny.KTO)
    compiled = [programs.scorer.score, programs.grad, programs.loss, programs.update]
    for index, sizes in ((0, [1, 1, 1, 1]), (1, [2, 2, 1, 1]), (4, [2, 2, 1, 1])):
        state, metrics = step.train_step(programs, state, data.batch(index), reference)
        assert [program._cache_size() for program in compiled] == sizes, index
        found = jax.tree.map(np.asarray, state.opt_state)
        state, others = step.train_step(programs, state, fixed.batch(index), reference)
        np.testing.assert_allclose(metrics["reward"], others["reward"], rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-5)
        assert_same_gradient(found, state.opt_state)
    scores = scored(programs, state.params, data.batch(1))
    np.testing.assert_array_equal(step.train_step(programs, state, data.batch(1), scores)[1]["reward"], np.zeros(3))


def test_reward_is_exactly_zero_in_rows_of_several_lengths():
    """The precomputed reference, of another instance of the data, meets the same rows; here in one pass."""
    programs, state = setup(
        tiny.model("bfloat16"),
        tiny.params(0),
        KEEP_GRADIENT,
        num_examples=3,
        draws=3,
        objective=tiny.KTO,
        residuals="device",
    )
    elbo_ref = scored(programs, state.params, of_rows(16).batch(1))
    _, metrics = step.train_step(programs, state, of_rows(16).batch(1), elbo_ref)
    np.testing.assert_array_equal(metrics["reward"], np.zeros(3))
    assert metrics["grad_norm"] > 0


# ---- what the draws say of the noise ----


def test_noise_of_the_rewards():
    """Var(r) from the spread of the draws, and the draws at which it is a tenth of the variance between examples."""
    n, draws = 5, 4
    programs, _ = setup(
        tiny.model(), tiny.params(0), KEEP_GRADIENT, num_examples=n + 1, draws=draws, objective=tiny.KTO
    )
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(n + 1, draws)).astype(np.float32)
    difference = rng.normal(size=(n + 1, draws)) + 3 * np.arange(n + 1)[:, None]
    feedback = Feedback(np.arange(n + 1) % 2 == 0, np.arange(n + 1) < n, np.ones(n + 1, np.int32))
    policy = jnp.asarray(reference + difference, jnp.float32).ravel()
    _, metrics = programs.loss(policy, reference.ravel(), feedback)
    noise = np.var(difference[:n], axis=1, ddof=1).mean() / draws
    between = np.var(difference[:n].mean(axis=1), ddof=1) - noise
    np.testing.assert_allclose(metrics["reward_variance"], noise, rtol=1e-5)
    np.testing.assert_allclose(metrics["draws_needed"], draws * noise / (0.1 * between), rtol=1e-4)
    _, metrics = programs.loss(reference.ravel(), reference.ravel(), feedback)
    assert metrics["reward_variance"] == 0
    assert np.isnan(metrics["draws_needed"])
    programs, _ = setup(tiny.model(), tiny.params(0), KEEP_GRADIENT, num_examples=n + 1, draws=1, objective=tiny.KTO)
    _, metrics = programs.loss(policy[: n + 1], reference.ravel()[: n + 1], feedback)
    assert not {"reward_variance", "draws_needed"} & metrics.keys()
