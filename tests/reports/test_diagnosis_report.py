"""reports/diagnosis.py: every number and the recommendation reach the page, missing ones as a dash."""

import math

import pytest

from elbo_kto_jax.reports.diagnosis import write_diagnosis_report
from tests.reports.seen import Seen

FIGURES = [
    *"""elbo_variance elbo_bias reward_variance_shared reward_variance_independent independent_over_shared
    loss_variance loss_bias loss_bias_predicted reference_point_variance reference_point_bias gradient_variance
    gradient_signal flops seconds gradient_variance_times_flops gradient_variance_times_seconds over_uniform
    over_uniform_twice""".split()  # noqa: SIM905
]


def figure(value):
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def figures(value, *names):
    return {name: figure(value) for name in names}


def result(schemes=("uniform", "bernoulli", "balanced"), draws=(1, 2, 4, 8), **changes):
    settings = [(s, {"scheme": scheme, "draws": k}) for s, scheme in enumerate(schemes) for k in draws]
    rows = [
        setting
        | figures((1 + s) / setting["draws"], *FIGURES)
        | {"finite_variance": setting["scheme"] != "bernoulli"}
        | {"gradient_variance_by_group": {"wte": figure(0.4 / setting["draws"]), "head": figure(0.6)}}
        for s, setting in settings
    ]
    parts = figures(3.25, "elbo_variance", "reward_variance_shared", "gradient_variance")
    counts = figures(5.5, "elbo_mean", "elbo_variance", "reward_variance", "gradient_square")
    chosen = {"scheme": "balanced", "draws": 4, "noise_over_signal": figure(0.5), "text": "Use <balanced> & 4."}
    return {
        **{"records": 32, "repeats": 8, "masks": 1234, "batch_size": 16, "config": {"seed": 0}},
        "recommendation": chosen,
        "rows": rows,
        "breakdown": [{**one, "by": "label", "bin": "desirable", "records": 7, **parts} for _, one in settings],
        "by_count": [{"hidden": "0.00 to 0.17", "draws": 99, **counts}],
    } | changes


def page(tmp_path, **changes):
    path = tmp_path / "report.html"
    write_diagnosis_report(path, title="Estimator", result=result(**changes))
    return Seen(path)


def test_what_the_page_holds(tmp_path):
    seen = page(tmp_path)
    assert "Use <balanced> & 4." in seen.text
    rows = seen.table("scheme, draws")
    assert list(rows)[:3] == ["uniform, 1", "uniform, 2", "uniform, 4"]
    assert rows["balanced, 4"] == ["0.750 [0.675, 0.825]"] * 17  # the third scheme's figures
    assert "0.100 [0.0900, 0.110]" in seen.text  # wte at K = 4
    assert seen.table("scheme, draws, records")["balanced, 4, desirable"] == ["3.25 [2.93, 3.58]"] * 3
    assert seen.table("hidden share l / L") == {"0.00 to 0.17": ["99", *["5.50 [4.95, 6.05]"] * 4]}
    assert seen.key_numbers["Records"] == "32"
    assert "1,234 distinct masks" in seen.text
    assert "At the start of training." not in seen.text


def test_charts(tmp_path):
    charts = page(tmp_path).charts
    bars = "uniform: 0.250 (0.225 to 0.275). bernoulli: 0.500 (0.450 to 0.550). balanced: 0.750 (0.675 to 0.825)."
    assert charts["Variance of the gradient, 4 draws"] == charts["Variance of the reward, 4 draws"] == bars
    # Level, since these variances fall as 1 / K; without bernoulli, whose variance is infinite.
    assert charts["Variance times draws"].startswith("uniform (variance × K): 1.00 at draws (K) 1, 1.00 at draws (K) 8")
    assert "balanced (variance × K): 3.00" in charts["Variance times draws"]
    assert "bernoulli" not in charts["Variance times draws"]
    assert charts["Gradient, by label and length"] == "desirable (7 records): 3.25 (2.93 to 3.58)."
    assert charts["One draw, by hidden share of the answer"] == "0.00 to 0.17 hidden: 5.50 (4.95 to 6.05)."
    assert "uniform, second order" in charts["Bias of the loss"]
    assert len(charts) == 10


def test_rewards_that_are_zero_are_said_to_be(tmp_path):
    rows = result()["rows"]
    for row in rows:
        row["reward_variance_shared"] = figure(0.0)
        row["independent_over_shared"] = {"value": math.inf, "low": None, "high": math.nan}
    seen = page(tmp_path, rows=rows)
    assert "At the start of training." in seen.text
    assert seen.key_numbers["Sharing masks"] == "÷ –"
    assert seen.table("scheme, draws")["balanced, 4"][7] == "–"


@pytest.mark.parametrize("schemes", [("uniform",), ("uniform", "bernoulli")])
def test_few_schemes_without_a_recommendation(tmp_path, schemes):
    nothing = {"scheme": None, "draws": None, "text": "No recommendation."}
    seen = page(tmp_path, **{"rows": result(schemes)["rows"], "recommendation": nothing})
    assert "No recommendation." in seen.text
    assert seen.key_numbers == {"Scheme": "–", "Draws": "–", "Records": "32"}
    assert "Variance of the gradient, 4 draws" in seen.charts
