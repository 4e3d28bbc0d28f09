"""training/step.py: how the work is split over micro-batches, passes and devices changes nothing."""

import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.runtime import config
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training import step
from elbo_kto_jax.training.data import TrainingData
from tests import tiny
from tests.conftest import PROJECT_ROOT
from tests.share import cases
from tests.training.steps import (
    KEEP_GRADIENT,
    ONE_DEVICE,
    assert_same_gradient,
    gradient_and_metrics,
    relative_distance,
    scored,
    setup,
    tree_difference,
)


def trajectory(
    sizes: config.Mesh,
    rows: int,
    *,
    steps: int = 3,
    num: int = 4,
    draws: int = 2,
    residuals: str = "recompute",
    objective: config.Objective = tiny.KTO,
):
    """Losses, gradient norms and total update of a few AdamW steps, and the number of micro-batches."""
    start = tiny.params(0)
    tx = train_state.optimizer(config.Optimizer(1e-2, "cosine", 0.0, 0.9, 0.95, 0.01, 1.0, "float32"), 100)
    programs, state = setup(
        tiny.model(),
        start,
        tx,
        num_examples=num,
        draws=draws,
        objective=objective,
        sizes=sizes,
        residuals=residuals,
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


@pytest.mark.parametrize(
    ("micro_batches", "residuals"), [(2, "recompute"), (4, "recompute"), (2, "device"), (4, "host")]
)
def test_trajectory_does_not_depend_on_the_micro_batches(whole, micro_batches, residuals):
    """In two passes or in one."""
    rows = 8 // micro_batches
    metrics, update, counts = trajectory(ONE_DEVICE, rows, residuals=residuals, objective=whole[2])
    assert counts == {micro_batches}
    np.testing.assert_allclose(metrics, whole[0], rtol=1e-5)
    assert relative_distance(update, whole[1]) <= 1e-4


@pytest.mark.parametrize(
    "sizes", cases([config.Mesh(8, 1, 1), config.Mesh(2, 2, 2)], [config.Mesh(1, 8, 1), config.Mesh(1, 4, 2)]), ids=str
)
def test_trajectory_does_not_depend_on_the_mesh(whole, cpu_devices, sizes):
    metrics, update, _ = trajectory(sizes, rows=8, objective=whole[2])
    np.testing.assert_allclose(metrics, whole[0], rtol=1e-5)
    assert relative_distance(update, whole[1]) <= 1e-4


@pytest.mark.parametrize("residuals", cases(["host"], ["recompute", "device"]))
def test_trajectory_does_not_depend_on_a_second_fsdp_axis(whole, cpu_devices, residuals, monkeypatch):
    """As on a square of TPUs, where gradients of matrices are summed as they are computed (sharding/gather.py)."""
    monkeypatch.setattr(rules, "_torus_side", lambda devices: 4 if len(devices) == 8 else 0)
    metrics, update, _ = trajectory(config.Mesh(1, 8, 1), rows=8, residuals=residuals, objective=whole[2])
    np.testing.assert_allclose(metrics, whole[0], rtol=1e-5)
    assert relative_distance(update, whole[1]) <= 1e-4


@pytest.mark.parametrize(
    ("sizes", "objective"),
    [(ONE_DEVICE, tiny.KTO), (ONE_DEVICE, tiny.SFT), (ONE_DEVICE, tiny.DPO), (config.Mesh(2, 2, 2), tiny.KTO)],
)
def test_one_pass_over_several_micro_batches_gives_what_two_give(sizes, objective):
    """With its residuals in either memory."""
    estimator, group = config.Estimator(3, "uniform"), 2 if objective.name == "elbo_dpo" else 1
    size = 4 + group % 2
    data = TrainingData(
        tiny.examples(size), tiny.layout(4, False), estimator=estimator, batch_size=size, seed=0, group=group
    )
    batch, reference = data.batch(0), np.random.default_rng(0).normal(-50, 3, 3 * size).astype(np.float32)
    assert len(batch.micro_batches) == size - 1
    (two_passes, expected), *one_pass = (
        gradient_and_metrics(
            tiny.model(),
            tiny.params(0),
            None if objective.name == "sft" else reference,
            batch,
            objective=objective,
            draws=3,
            sizes=sizes,
            residuals=residuals,
        )
        for residuals in ("recompute", "device", "host")
    )
    for gradient, found in one_pass:
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
        assert_same_gradient(jax.device_get(gradient), jax.device_get(two_passes))


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
        residuals="device",
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
from elbo_kto_jax.runtime import config
from elbo_kto_jax.sharding import rules
sizes = config.Mesh(2, 1, 1)
rules.split_cpu(sizes)
import numpy as np
from elbo_kto_jax.training import step
from tests import tiny
from elbo_kto_jax.training.data import TrainingData
from tests.training.steps import KEEP_GRADIENT, setup
estimator, length = config.Estimator(2, "uniform"), 512
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
