"""The tables and the recommendation of a diagnosis, on made-up measurements whose answers are known.

The numbers are drawn with fixed seeds; a bound of 4 standard errors refuses a correct one with probability 6e-5 over
the choice of the seed.
"""

import numpy as np
import pytest

from elbo_kto_jax import objectives
from elbo_kto_jax.diagnosis import tables
from elbo_kto_jax.diagnosis.analyse import Analysis
from elbo_kto_jax.diagnosis.bootstrap import Bootstrap
from elbo_kto_jax.diagnosis.measure import Gradients, Setting, Values
from elbo_kto_jax.diagnosis.recommendation import recommendation
from elbo_kto_jax.runtime import config

DRAWS = (1, 2, 4)
KTO = config.Objective("elbo_kto", 0.5, 1.2, 0.8, "global_mean", 0.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def analysis(*, n=40, repeats=400, objective=KTO, noise=None, seed=0, schemes=("uniform", "balanced")) -> Analysis:
    """Rewards with variance noise[scheme] / K around the record's own; gradients of a 30-dimensional parameter.

    Policy and reference share most of their noise: 4 / K, of which the reward has none.
    """
    rng = np.random.default_rng(seed)
    noise = noise or {"uniform": 1.0, "balanced": 0.25}
    settings = [Setting(scheme, k) for scheme in schemes for k in DRAWS]
    own = rng.normal(size=n)
    direction = rng.normal(size=(n, 30))
    policy, reference, first, second, product = {}, {}, {}, {}, {}
    for s in settings:
        common = rng.normal(scale=np.sqrt(4 / s.draws), size=(n, repeats))
        reference[s] = -10 + common
        policy[s] = (
            reference[s] + own[:, None] + rng.normal(scale=np.sqrt(noise[s.scheme] / s.draws), size=(n, repeats))
        )
        a, b = (
            direction + rng.normal(scale=np.sqrt(10 * noise[s.scheme] / s.draws), size=direction.shape)
            for _ in range(2)
        )
        split = lambda x: np.stack([x[:, :10].sum(axis=1), x[:, 10:].sum(axis=1)], axis=1)  # noqa: E731
        first[s], second[s], product[s] = split(a * a), split(b * b), split(a * b)
    record = np.repeat(np.arange(n), 60)
    count = rng.integers(1, 7, len(record))
    ones = {s: np.ones(n) for s in settings}
    size = len(objectives.build(objective).contrast)  # gradients are of units
    first, second, product, ones_of_units = (
        {s: x[: n // size] for s, x in of.items()} for of in (first, second, product, {s: np.ones(n) for s in settings})
    )
    return Analysis(
        Values(policy, reference, record, count, rng.normal(scale=count), rng.normal(size=len(record)), ones, 7),
        Gradients(["a", "b"], first, second, product, ones_of_units, record, count, 1.0 * count),
        objective=objectives.build(objective),
        length=np.full(n, 6),
        is_desirable=np.arange(n) % 2 == 0,
        flops={s: np.full(n, 5.0 * s.draws) for s in settings},
        batch_size=8,
    )


def by_setting(found: Analysis) -> dict:
    return {(row["scheme"], row["draws"]): row for row in tables.by_setting(found)}


def holds(figure, value) -> bool:
    """Within four of its standard errors, as the 95% interval gives them."""
    return abs(figure["value"] - value) < 4 * (figure["high"] - figure["low"]) / 3.92


def test_intervals_cover():
    """The share of 95% intervals that hold the truth is at least 88% in 400 trials: 95% - 6 standard errors."""
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap(40)
    held = 0
    for _ in range(400):
        x, y = rng.exponential(2.0, 40), rng.exponential(1.0, 40) + 1
        figure = bootstrap.ratio(x, y)
        held += figure["low"] <= 1.0 <= figure["high"]
    assert 0.88 <= held / 400 < 1


def test_mean_of_some():
    figure = Bootstrap(4).mean(np.array([1.0, 2.0, np.nan, 6.0]), np.array([True, False, False, True]))
    assert figure["value"] == 3.5
    assert figure["low"] == 1.0
    assert figure["high"] == 6.0


@pytest.mark.parametrize("draws", DRAWS)
def test_variances(draws):
    rows = by_setting(analysis())
    for scheme, noise in (("uniform", 1.0), ("balanced", 0.25)):
        row = rows[scheme, draws]
        assert holds(row["reward_variance_shared"], noise / draws)
        assert holds(row["elbo_variance"], (4 + noise) / draws)
        assert holds(row["reward_variance_independent"], (8 + noise) / draws)
        assert holds(row["independent_over_shared"], 8 / noise + 1)
        assert holds(row["reference_point_variance"], noise / draws / 8)
        assert holds(row["reference_point_bias"], 0)
        assert holds(row["elbo_bias"], 0)


@pytest.mark.parametrize(
    ("name", "mode"), [("elbo_kto", "global_mean"), ("elbo_kto", "zero"), ("elbo_dpo", "zero")], ids=str
)
def test_bias_and_variance_of_the_loss(name, mode):
    """Against the loss itself: its mean over many batches less its value without noise, and its variance."""
    objective = config.Objective(name, 0.5, 1.2, 0.8, mode, 0.1)
    found = analysis(objective=objective, repeats=2000)
    desirable = found.is_desirable[:, None]
    weight = np.where(desirable, 1.2, 0.8)

    def loss(reward):
        if name == "elbo_dpo":
            p = sigmoid(0.5 * (reward[::2] - reward[1::2]))
            return np.mean(-0.9 * np.log(p) - 0.1 * np.log(1 - p), axis=0)
        z0 = reward.mean(axis=0) if mode == "global_mean" else 0.0
        return np.mean(weight * sigmoid(np.where(desirable, -1, 1) * 0.5 * (reward - z0)), axis=0)

    for setting, row in zip(found.settings, tables.by_setting(found), strict=True):
        losses = loss(found.reward[setting])
        error = losses.std() / np.sqrt(len(losses))
        exact = loss(found.many_reward[:, None])[0]
        assert abs(row["loss_bias"]["value"] - (losses.mean() - exact)) < 4 * error
        assert row["loss_bias_predicted"]["value"] == pytest.approx(row["loss_bias"]["value"], abs=1e-3, rel=0.1)
        # Of a batch of 8 instead of 40 records; to first order.
        assert row["loss_variance"]["value"] * 8 / 40 == pytest.approx(losses.var(), rel=0.15)
    assert (row["reference_point_variance"]["value"] == 0) == (mode == "zero")


def test_gradients():
    """Slopes of the loss scale the gradient of B_hat; without noise in r they are those of the loss without noise."""
    found = analysis(noise={"uniform": 1e-9, "balanced": 1e-9}, n=300, repeats=3)
    slope = 0.5 * found.value(found.many_margin[:, None], 1)
    for row in tables.by_setting(found):
        assert row["gradient_signal"]["value"] == pytest.approx(np.mean(slope**2 * 30) / 8, rel=0.2)
        assert row["gradient_variance"]["value"] < 1e-7
    loud = analysis(n=300, repeats=3)
    rows = by_setting(loud)
    assert holds(rows["balanced", 2]["over_uniform"], 0.25)
    assert holds(rows["balanced", 2]["over_uniform_twice"], 0.5)
    assert rows["balanced", 4]["over_uniform_twice"] is None  # uniform was not measured with 8
    groups = rows["uniform", 1]["gradient_variance_by_group"]
    assert groups["a"]["value"] + groups["b"]["value"] == pytest.approx(
        rows["uniform", 1]["gradient_variance"]["value"]
    )
    assert holds(groups["b"], 2 * groups["a"]["value"])
    row = rows["uniform", 4]
    assert row["gradient_variance_times_flops"]["value"] == pytest.approx(20 * row["gradient_variance"]["value"])


def test_recommends_the_fewest_draws_with_less_noise_than_signal():
    """A signal of 30 and noise of 300 noise / K: balanced has 75 / K, so 4 draws; uniform would need 10."""
    advice = recommendation(analysis(n=400, repeats=3))
    assert (advice["scheme"], advice["draws"], advice["uniform_draws"]) == ("balanced", 4, None)
    assert "estimator.scheme=balanced" in advice["text"]
    assert "estimator.draws=4" in advice["text"]
    same = recommendation(analysis(n=400, repeats=3, noise={"uniform": 0.05, "balanced": 0.05}))
    assert same["draws"] == 1
    assert len(same["alike"]) == 1


def test_no_gradient_no_recommendation():
    advice = recommendation(analysis(objective=config.Objective("elbo_kto", 0.0, 1.0, 1.0, "zero", 0.0), repeats=3))
    assert advice["scheme"] is None
    assert "No recommendation" in advice["text"]


def test_breakdowns():
    found = analysis(repeats=3)
    rows = tables.breakdown(found)
    assert [row["records"] for row in rows if row["by"] == "label"] == [20] * 12
    assert [(row["bin"], row["records"]) for row in rows if row["by"] == "length"] == [("6 tokens", 40)] * 6
    counts = tables.by_count(found)
    assert [row["hidden"] for row in counts][::5] == ["0.00 to 0.17", "0.83 to 1.00"]
    for size, row in enumerate(counts, 1):
        assert holds(row["elbo_variance"], size**2)
        assert holds(row["reward_variance"], size**2 + 1)
        assert row["gradient_square"]["value"] == pytest.approx(size)


def test_flat_rows():
    row = {
        "scheme": "x",
        "v": {"value": 1, "low": 0, "high": 2},
        "g": {"a": {"value": 3, "low": 3, "high": 3}},
        "n": None,
    }
    assert tables.flat(row) == {"scheme": "x", "v": 1, "v_low": 0, "v_high": 2, "g.a": 3, "g.a_low": 3, "g.a_high": 3}
    assert tables.columns([{"a": 1, "b": 2}, {"c": 3, "a": 1}]) == ["a", "b", "c"]


@pytest.mark.parametrize("schemes", [("uniform",), ("uniform", "bernoulli")])
def test_without_another_scheme_there_is_no_bias_to_measure(schemes):
    found = analysis(schemes=schemes, repeats=20, noise={"uniform": 1.0, "bernoulli": 4.0})
    row = by_setting(found)["uniform", 2]
    assert np.isnan(row["elbo_bias"]["value"])
    assert np.isfinite(row["elbo_variance"]["value"])
    assert recommendation(found)["scheme"] == "uniform"
    assert tables.breakdown(found)
    assert tables.by_count(found)
