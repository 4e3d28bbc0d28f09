"""train/step.py: golden values, exactness, and independence of how the work is split."""

import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elbo_kto_jax import config, objectives
from elbo_kto_jax.models.network import MaskPredictor, abstract_params
from elbo_kto_jax.objectives.protocol import Feedback
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.train import state as train_state
from elbo_kto_jax.train import step
from elbo_kto_jax.train.data import TrainingData
from tests import tiny
from tests.conftest import PROJECT_ROOT
from tests.golden import LAYOUTS

GOLDEN_KTO = config.Objective("elbo_kto", 0.1, 1.0, 1.0, "global_mean", 0.0)
GOLDEN_ADAMW = config.Optimizer(1e-3, 0.1, 0.9, 0.95, 0.01, 1.0)
ONE_DEVICE = config.Mesh(1, 1, 1)

# An "optimizer" that moves nothing and keeps the gradient as its state.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, _, params: (jax.tree.map(jnp.zeros_like, params), grads),
)


def setup(model, params, tx, *, num_examples, draws, objective, sizes=ONE_DEVICE, one_pass_microbatches=1):
    """The programs, and the state before the first step, over as many devices as the mesh has."""
    devices = jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor]
    mesh = rules.make_mesh(sizes, devices)
    shardings = train_state.state_shardings(tx, abstract_params(model), mesh, model.config)
    scorer = Scorer(model, mesh, size=num_examples * draws, one_pass_microbatches=one_pass_microbatches)
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


# ---- golden values ----


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


# ---- exactness ----


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("sizes", "one_pass_microbatches"), [(ONE_DEVICE, 1), (ONE_DEVICE, 3), (config.Mesh(2, 2, 2), 1)], ids=str
)
def test_reward_is_exactly_zero_while_policy_and_reference_are_equal(dtype, packed, sizes, one_pass_microbatches):
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
            one_pass_microbatches=one_pass_microbatches,
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


def plain_kto_loss(estimates, reference, label, objective):
    reward = estimates.mean(axis=1) - reference.mean(axis=1)
    z0 = jax.lax.stop_gradient(reward.mean()) if objective.reference_point == "global_mean" else 0.0
    score = objective.beta * (reward - z0) * jnp.where(label, 1, -1)
    weight = jnp.where(label, objective.desirable_weight, objective.undesirable_weight)
    return jnp.mean(weight - weight * jax.nn.sigmoid(score))


def plain_dpo_loss(estimates, reference, objective):
    reward = estimates.mean(axis=1) - reference.mean(axis=1)
    return jnp.mean(-jax.nn.log_sigmoid(objective.beta * (reward[::2] - reward[1::2])))


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


# ---- how the work is split changes nothing ----


def trajectory(
    sizes: config.Mesh,
    rows: int,
    *,
    steps: int = 3,
    num: int = 4,
    draws: int = 2,
    one_pass_microbatches: int = 1,
    objective: config.Objective = tiny.KTO,
):
    """Losses, gradient norms and total update of a few AdamW steps, and the number of micro-batches."""
    start = tiny.params(0)
    tx = train_state.optimizer(config.Optimizer(1e-2, 0.0, 0.9, 0.95, 0.01, 1.0), 100)
    programs, state = setup(
        tiny.model(),
        start,
        tx,
        num_examples=num,
        draws=draws,
        objective=objective,
        sizes=sizes,
        one_pass_microbatches=one_pass_microbatches,
    )
    data = TrainingData(
        tiny.examples(num),
        tiny.layout(rows, False),
        estimator=config.Estimator(draws, "uniform"),
        batch_size=num,
        seed=0,
        group=2 if objective.name == "elbo_dpo" else 1,
    )
    found, counts = [], set()
    for t in range(steps):
        batch = data.batch(t)
        counts.add(len(batch.micro_batches))
        reference = scored(programs, jax.tree.map(jnp.array, tiny.params(1)), batch)
        state, metrics = step.train_step(programs, state, batch, reference)
        names = ("loss", "grad_norm", "reward_margin", "reward_desirable")
        found.append([float(metrics[name]) for name in names])
    return np.array(found), jax.device_get(tree_difference(jax.device_get(state.params), start)), counts


@pytest.fixture(scope="module", params=[tiny.KTO, tiny.DPO], ids=lambda objective: objective.name)
def whole(request):
    """The trajectory on one device with one micro-batch per step, and its objective."""
    metrics, update, counts = trajectory(ONE_DEVICE, rows=8, objective=request.param)
    assert counts == {1}
    return metrics, update, request.param


@pytest.mark.parametrize(("micro_batches", "one_pass_microbatches"), [(2, 1), (4, 1), (2, 2), (4, 4)])
def test_trajectory_does_not_depend_on_the_micro_batches(whole, micro_batches, one_pass_microbatches):
    """In two passes or in one."""
    rows = 8 // micro_batches
    metrics, update, counts = trajectory(
        ONE_DEVICE, rows, one_pass_microbatches=one_pass_microbatches, objective=whole[2]
    )
    assert counts == {micro_batches}
    np.testing.assert_allclose(metrics, whole[0], rtol=1e-5)
    assert relative_distance(update, whole[1]) <= 1e-4


@pytest.mark.parametrize(
    "sizes", [config.Mesh(8, 1, 1), config.Mesh(1, 8, 1), config.Mesh(1, 4, 2), config.Mesh(2, 2, 2)], ids=str
)
def test_trajectory_does_not_depend_on_the_mesh(whole, cpu_devices, sizes):
    metrics, update, _ = trajectory(sizes, rows=8, objective=whole[2])
    np.testing.assert_allclose(metrics, whole[0], rtol=1e-5)
    assert relative_distance(update, whole[1]) <= 1e-4


@pytest.mark.parametrize(
    ("sizes", "objective"),
    [(ONE_DEVICE, tiny.KTO), (ONE_DEVICE, tiny.SFT), (ONE_DEVICE, tiny.DPO), (config.Mesh(2, 2, 2), tiny.KTO)],
)
def test_one_pass_over_several_micro_batches_gives_what_two_give(sizes, objective):
    estimator, group = config.Estimator(3, "uniform"), 2 if objective.name == "elbo_dpo" else 1
    size = 4 + group % 2
    data = TrainingData(
        tiny.examples(size), tiny.layout(4, False), estimator=estimator, batch_size=size, seed=0, group=group
    )
    batch, reference = data.batch(0), np.random.default_rng(0).normal(-50, 3, 3 * size).astype(np.float32)
    assert len(batch.micro_batches) == size - 1
    (two_passes, expected), (one_pass, found) = (
        gradient_and_metrics(
            tiny.model(),
            tiny.params(0),
            None if objective.name == "sft" else reference,
            batch,
            objective=objective,
            draws=3,
            sizes=sizes,
            one_pass_microbatches=most,
        )
        for most in (size - 2, size - 1)
    )
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    assert_same_gradient(jax.device_get(one_pass), jax.device_get(two_passes))


def test_what_a_micro_batch_keeps_is_dropped_with_its_backward_pass():
    estimator = config.Estimator(2, "uniform")
    data = TrainingData(tiny.examples(4), tiny.layout(2, False), estimator=estimator, batch_size=4, seed=0)
    programs, state = setup(
        tiny.model(),
        tiny.params(0),
        KEEP_GRADIENT,
        num_examples=4,
        draws=2,
        objective=tiny.KTO,
        one_pass_microbatches=4,
    )
    kept, alive = [], []

    def forward(*arguments):
        estimates, residuals = compiled(*arguments)
        kept.append([weakref.ref(leaf) for leaf in jax.tree.leaves(residuals)])
        return estimates, residuals

    def counted(program):
        def run(*arguments):
            alive.append(sum(any(leaf() is not None for leaf in leaves) for leaves in kept))
            return program(*arguments)

        return run

    compiled, programs.scorer.forward = programs.scorer.forward, forward
    spied = programs._replace(
        loss=counted(programs.loss),
        backward=counted(programs.backward),
        update=counted(programs.update),
    )
    step.train_step(spied, state, data.batch(0), np.zeros(8, np.float32))
    assert alive == [4, 4, 3, 2, 1, 0]


MANY_MICRO_BATCHES = """
from elbo_kto_jax import config
from elbo_kto_jax.sharding import rules
sizes = config.Mesh(2, 1, 1)
rules.split_cpu(sizes)
import numpy as np
from elbo_kto_jax.train import step
from tests import tiny
from tests.train.test_step import KEEP_GRADIENT, TrainingData, setup
estimator, length = config.Estimator(2, "uniform"), 2048
layout = tiny.layout(4, length=length)
data = TrainingData(tiny.examples(8, max_length=length), layout, estimator=estimator, batch_size=8, seed=0)
programs, state = setup(
    tiny.model(), tiny.params(0), KEEP_GRADIENT, num_examples=8, draws=2, objective=tiny.KTO, sizes=sizes
)
rows = data.batch_of(np.arange(8)).micro_batches[0]
print(np.asarray(programs.scorer(state.params, [rows] * 60)).shape)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core is not split")
def test_many_micro_batches_on_several_cpu_devices():
    """Without `pace`, more than 32 programs in flight never end, and XLA aborts the process after a minute."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", MANY_MICRO_BATCHES]
    done = subprocess.run(command, env=environment, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "(16,)", done.stderr[-2000:]


@pytest.mark.parametrize("reference_mode", ["online", "precomputed"])
@pytest.mark.parametrize(
    ("one_pass_microbatches", "used"),
    [(1, {"score", "grad"}), (5, {"score", "grad", "forward", "backward"}), (6, {"forward", "backward"})],
    ids=["two passes", "either", "one pass"],
)
def test_each_program_is_compiled_once(reference_mode, one_pass_microbatches, used):
    """Over steps that differ in lengths, in targets, in the number of micro-batches and in the number of examples."""
    estimator = config.Estimator(3, "complementary")
    data = TrainingData(tiny.examples(7), tiny.layout(1), estimator=estimator, batch_size=3, seed=0)
    tx = train_state.optimizer(GOLDEN_ADAMW, 10)
    programs, state = setup(
        tiny.model(),
        tiny.params(0),
        tx,
        num_examples=3,
        draws=3,
        objective=tiny.KTO,
        one_pass_microbatches=one_pass_microbatches,
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
