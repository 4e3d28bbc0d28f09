"""reports/diagnosis.py: every number and the recommendation reach the page, missing ones as a dash."""

import math

import pytest

from elbo_kto_jax.reports.diagnosis import write_diagnosis_report

FIGURES = [
    *"""elbo_variance elbo_bias reward_variance_shared reward_variance_independent independent_over_shared
    loss_variance loss_bias loss_bias_predicted reference_point_variance reference_point_bias gradient_variance
    gradient_signal flops seconds gradient_variance_times_flops gradient_variance_times_seconds over_uniform
    over_uniform_twice""".split()  # noqa: SIM905
]


def figure(value):
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def result(schemes=("uniform", "bernoulli", "balanced"), draws=(1, 2, 4, 8), **changes):
    rows = [
        {
            "scheme": scheme,
            "draws": k,
            "finite_variance": scheme != "bernoulli",
            **{name: figure((1 + s) / k) for name in FIGURES},
            "gradient_variance_by_group": {"wte": figure(0.4 / k), "head": figure(0.6 / k)},
        }
        for s, scheme in enumerate(schemes)
        for k in draws
    ]
    return {
        "records": 32,
        "repeats": 8,
        "masks": 1234,
        "batch_size": 16,
        "recommendation": {
            "scheme": "balanced",
            "draws": 4,
            "noise_over_signal": figure(0.5),
            "text": "Use <balanced> & 4.",
        },
        "rows": rows,
        "breakdown": [
            {
                "scheme": row["scheme"],
                "draws": row["draws"],
                "by": "label",
                "bin": "desirable",
                "records": 7,
                **{name: figure(3.25) for name in ("elbo_variance", "reward_variance_shared", "gradient_variance")},
            }
            for row in rows
        ],
        "by_count": [
            {
                "hidden": "0.00 to 0.17",
                "draws": 99,
                **{n: figure(5.5) for n in ("elbo_mean", "elbo_variance", "reward_variance", "gradient_square")},
            }
        ],
        "config": {"seed": 0},
    } | changes


def page(tmp_path, **changes):
    path = tmp_path / "report.html"
    write_diagnosis_report(path, title="Estimator", result=result(**changes))
    return path.read_text(encoding="utf-8")


def test_what_the_page_holds(tmp_path):
    text = page(tmp_path)
    assert "Use &lt;balanced&gt; &amp; 4." in text
    for row in ("uniform, 1", "balanced, 8"):
        assert text.count(f'<th scope="row">{row}</th>') == 2  # in both tables of settings
    assert "0.750 [0.675, 0.825]" in text  # the third scheme's figures at K = 4
    assert "0.100 [0.0900, 0.110]" in text  # wte at K = 4
    assert "balanced, 4, desirable" in text
    assert "1,234 distinct masks" in text
    assert "At the start of training." not in text


def test_rewards_that_are_zero_are_said_to_be(tmp_path):
    rows = result()["rows"]
    for row in rows:
        row["reward_variance_shared"] = figure(0.0)
        row["independent_over_shared"] = {"value": math.inf, "low": None, "high": math.nan}
    text = page(tmp_path, rows=rows)
    assert "At the start of training." in text
    assert "inf" not in text.replace("information", "")


@pytest.mark.parametrize("schemes", [("uniform",), ("uniform", "bernoulli")])
def test_few_schemes_without_a_recommendation(tmp_path, schemes):
    nothing = {"scheme": None, "draws": None, "text": "No recommendation."}
    text = page(tmp_path, **{"rows": result(schemes)["rows"], "recommendation": nothing})
    assert "No recommendation." in text
    assert "Variance of the gradient, 4 draws" in text
