"""diagnosis/measure.py against the method written down plainly (tests/tiny.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax import objectives
from elbo_kto_jax.checkpoints.tiny import tiny_tokenizer
from elbo_kto_jax.diagnosis.measure import Measurement, Setting, group_names
from elbo_kto_jax.diffusion.masks import draw_masks
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.flags import load_config_file
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training.data import TrainingData
from elbo_kto_jax.training.setup import Setup
from tests import runs, tiny

SETTINGS = [Setting("uniform", 1), Setting("bernoulli", 3), Setting("complementary", 2), Setting("importance", 1)]
RECORDS = np.array([4, 0, 2])
SEED = 5


@pytest.fixture(scope="module")
def measurement():
    examples = tiny.examples(6, seed=1)
    estimator = config.Estimator(1, "uniform")
    data = TrainingData(examples, tiny.layout(2), estimator=estimator, batch_size=2, seed=SEED)
    mesh = rules.make_mesh(config.Mesh(1, 1, 1), jax.devices()[:1])
    settings = config.Config.from_mapping(load_config_file(str(runs.CONFIG)).to_dict())
    settings = dataclasses.replace(settings, seed=SEED, objective=tiny.KTO)
    setup = Setup(
        settings, tiny.model(), {}, tiny_tokenizer(), mesh, objectives.build(tiny.KTO), data, None, "recompute"
    )
    return Measurement(setup, RECORDS, SETTINGS)


def plain(params, measurement, setting, repetition):
    """B of every draw [n, k]."""
    estimator = config.Estimator(setting.draws, setting.scheme)
    examples = measurement.setup.data.examples
    return tiny.plain_estimates(params, examples, RECORDS, estimator, seed=SEED, epoch=repetition)


def test_values(measurement):
    policy, reference = tiny.params(0), tiny.params(1)
    found = measurement.values(policy, reference, 2)
    for setting in SETTINGS:
        for params, values in ((policy, found.policy), (reference, found.reference)):
            expected = [np.mean(plain(params, measurement, setting, j), axis=1) for j in range(2)]
            np.testing.assert_allclose(values[setting].T, expected, rtol=2e-5)
    fixed = sum(setting.draws for setting in SETTINGS if setting.scheme != "bernoulli")
    assert len(found.record) == len(found.count) == len(RECORDS) * 2 * fixed
    assert found.masks <= len(RECORDS) * 2 * sum(setting.draws for setting in SETTINGS)
    # Of uniform, the weight is L / l already; of importance, a draw of the same mask would have another.
    np.testing.assert_allclose(found.policy_draw[: 2 * len(RECORDS)], found.policy[SETTINGS[0]].ravel(), rtol=1e-6)
    length = measurement.setup.data.examples.completion_length[RECORDS]
    last, setting = slice(-2 * len(RECORDS), None), SETTINGS[-1]
    weight = np.array([[measurement.masks(setting, n, j).weight[0] for j in range(2)] for n in range(3)]).ravel()
    canonical = np.repeat(length, 2) / found.count[last]
    np.testing.assert_allclose(found.policy_draw[last], found.policy[setting].ravel() * canonical / weight, rtol=1e-5)


def test_each_mask_is_scored_once(measurement):
    """The first draws of uniform are the same whatever K is."""
    few = Measurement(measurement.setup, RECORDS, [Setting("uniform", 4)])
    more = Measurement(measurement.setup, RECORDS, [Setting("uniform", 4), Setting("uniform", 2)])
    params = tiny.params(0)
    assert few.values(params, params, 1).masks == more.values(params, params, 1).masks


def test_gradients(measurement):
    params = tiny.params(0)
    found = measurement.gradients(params)
    assert found.groups == group_names(params) == sorted(found.groups)

    def gradient(setting, n, j):
        return jax.grad(lambda p: jnp.mean(plain(p, measurement, setting, j)[n]))(params)

    for setting in (SETTINGS[1], SETTINGS[3]):
        a, b = gradient(setting, 1, 0), gradient(setting, 1, 1)
        for values, (x, y) in zip((found.first, found.second, found.product), ((a, a), (b, b), (a, b)), strict=True):
            total = sum(np.vdot(u, v) for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
            scale = abs(found.first[setting][1].sum())
            np.testing.assert_allclose(values[setting][1].sum(), total, rtol=1e-4, atol=1e-5 * scale)
            head = np.vdot(x["head"]["kernel"], y["head"]["kernel"])
            group = values[setting][1, found.groups.index("head")]
            np.testing.assert_allclose(group, head, rtol=1e-4, atol=1e-5 * scale)
        assert (found.seconds[setting] > 0).all()

    # Single draws: those of uniform, and of importance with the weight L / l instead of its own.
    examples, n = measurement.setup.data.examples, 2
    at = np.flatnonzero(found.single_record == n)
    assert len(at) == 4
    length = int(examples.completion_length[RECORDS[n]])
    arguments = {"seed": SEED, "id_words": examples.id_words[RECORDS[n]], "epoch": 1, "draws": 1, "length": length}
    draws = draw_masks("importance", **arguments)
    count = int(draws.mask.sum())
    assert found.single_count[at[-1]] == count
    expected = found.second[SETTINGS[3]][n].sum() * (length / count / draws.weight[0]) ** 2
    assert found.single_square[at[-1]] == pytest.approx(expected)


def test_gradients_of_pairs(measurement):
    """Of the difference of two records, with masks of their own."""
    params, records, setting = tiny.params(0), np.array([4, 0]), Setting("uniform", 2)
    found = Measurement(measurement.setup, records, [setting], (1.0, -1.0)).gradients(params)
    examples = measurement.setup.data.examples
    estimator = config.Estimator(2, "uniform")

    def gradient(j):
        def difference(p):
            chosen, rejected = jnp.mean(
                tiny.plain_estimates(p, examples, records, estimator, seed=SEED, epoch=j), axis=1
            )
            return chosen - rejected

        return jax.grad(difference)(params)

    a, b = gradient(0), gradient(1)
    for values, (x, y) in zip((found.first, found.second, found.product), ((a, a), (b, b), (a, b)), strict=True):
        total = sum(np.vdot(u, v) for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
        np.testing.assert_allclose(values[setting].sum(), total, rtol=1e-4, atol=1e-5 * found.first[setting].sum())
    assert not len(found.single_record)
