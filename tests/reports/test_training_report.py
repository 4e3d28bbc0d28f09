import math
import os
import re

import numpy as np
import pytest

from elbo_kto_jax.reports.training import _smoothed, write_training_report

HOSTILE = "</article><script>alert('x')</script><img src=x onerror=alert(1)>\"'&\ud800\x00"


def _kto_line(step):
    return {
        "step": step,
        "loss": 0.5 - 0.001 * step,
        "reward_desirable": 0.02 * step,
        "reward_undesirable": -0.01 * step,
        "reward_margin": 0.03 * step,
        "reference_point": 0.001 * step,
        "saturated_fraction": 0.0,
        "grad_norm": 1.0,
        "learning_rate": 1e-6,
        "examples": 8 * step,
        "tokens": 1000 * step,
        "real_token_fraction": 0.9,
        "seconds": 0.5 * step,
    }


def _report(tmp_path, **changes):
    arguments = {
        "title": "Run",
        "config": {"seed": 0, "model": {"path": "m"}},
        "metrics": [_kto_line(step) for step in range(1, 11)],
        "samples": [{"prompt": "p", "before": "b", "after": "a"}],
        "summary": {"steps": 10, "examples": 80, "loss": 0.49, "reward_margin": 0.3, "tokens_per_second": 2000.0},
    }
    path = tmp_path / "report.html"
    write_training_report(path, **(arguments | changes))
    return path.read_text(encoding="utf-8")


def _headings(text):
    return re.findall(r"<figure><h3>([^<]*)", text)


def _tiles(text):
    return dict(re.findall(r"<dt>([^<]*)</dt><dd class=\"value\">([^<]*)", text))


def test_structure(tmp_path):
    text = _report(tmp_path)
    assert _headings(text) == [
        "Rewards", "Reward margin", "Loss", "Saturated examples",
        "Gradient norm", "Learning rate", "Throughput", "Useful tokens",
    ]  # fmt: skip
    assert "In 10 steps over 80 examples, the reward margin went from 0.0300 to 0.300 nats and the loss" in text
    assert _tiles(text)["Reward margin"] == "0.300 nats"
    assert _tiles(text)["Tokens / second"] == "2,000"
    assert re.findall(r"<h2>([^<]*)", text) == ["Curves", "Samples", "Details"]
    assert "1 of 1 answers changed" in text
    assert "model.path" in text


def test_sft_has_no_rewards(tmp_path):
    metrics = [{"step": i, "loss": 2.0 / i, "grad_norm": 1.0, "learning_rate": 1e-5} for i in (1, 2)]
    text = _report(tmp_path, metrics=metrics, summary={"steps": 2}, samples=[])
    assert _headings(text) == ["Loss", "Gradient norm", "Learning rate"]
    assert "In 2 steps, the loss went from 2.00 to 1.00." in text
    assert "eward" not in text.split("</style>")[1]


def test_everything_is_escaped(tmp_path):
    text = _report(
        tmp_path,
        title=HOSTILE,
        config={HOSTILE: {HOSTILE: HOSTILE}},
        metrics=[{**_kto_line(1), HOSTILE: HOSTILE, "loss": HOSTILE}],
        samples=[{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}],
        summary={"checkpoint": HOSTILE, "steps": HOSTILE, "interrupted": HOSTILE},
    )
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)") >= 8


def test_values_that_are_not_finite_are_reported(tmp_path):
    metrics = [_kto_line(step) for step in range(1, 11)]
    metrics[3]["loss"], metrics[5]["loss"], metrics[7]["loss"] = math.nan, None, math.inf
    text = _report(tmp_path, metrics=metrics)
    assert "loss is missing, NaN or infinite at 3 of 10 logged steps, first at step 4." in text
    assert not re.search(r"\bnan\b|\binf\b", text.split("</style>")[1])


def test_a_batch_without_one_label_is_no_alarm(tmp_path):
    metrics = [_kto_line(step) for step in range(1, 11)]
    metrics[3]["reward_desirable"] = None
    assert "Not finite" not in _report(tmp_path, metrics=metrics)
    for line in metrics:
        line["reward_desirable"] = None
    assert "reward_desirable is missing" in _report(tmp_path, metrics=metrics)


def test_empty_and_single(tmp_path):
    nothing = _report(tmp_path, metrics=[], samples=[], summary={}, config={})
    assert "No step has been logged yet." in nothing
    assert _headings(nothing) == []
    one = _report(tmp_path, metrics=[_kto_line(1)], summary={})
    assert "In 1 step over 8 examples, the reward margin was 0.0300 nats and the loss was 0.499." in one
    assert "<circle" in one


def test_interrupted_is_said(tmp_path):
    assert "Interrupted." in _report(tmp_path, summary={"interrupted": True})
    assert "Interrupted." not in _report(tmp_path, summary={"interrupted": False})


def test_a_step_logged_twice_counts_once_as_logged_last(tmp_path):
    metrics = [_kto_line(1), {**_kto_line(2), "loss": 98765.0}, {**_kto_line(2), "loss": 0.25}, _kto_line(3)]
    text = _report(tmp_path, metrics=metrics, summary={})
    assert "98,765" not in text.split("</style>")[1]
    assert "3 of 3 logged steps" in text


def test_throughput_is_the_difference_of_the_totals(tmp_path):
    text = _report(tmp_path)
    drawing = re.search(r'aria-label="Throughput\. ([^"]*)"', text)[1]
    assert "lowest 2,000, highest 2,000" in drawing
    # The totals start again after a restart: no speed can be told there, least of all a negative one.
    metrics = [*(_kto_line(step) for step in range(1, 6)), {**_kto_line(6), "tokens": 10, "seconds": 0.1}]
    drawing = re.search(r'aria-label="Throughput\. ([^"]*)"', _report(tmp_path, metrics=metrics))[1]
    assert "lowest 2,000, highest 2,000" in drawing


def test_held_out_values_are_joined_across_the_steps_between(tmp_path):
    metrics = [_kto_line(step) for step in range(1, 11)]
    assert "held out" not in _report(tmp_path, metrics=metrics).split('aria-label="Loss', 1)[1]
    for line in metrics[4::5]:
        line["eval_loss"] = 0.4
    text = _report(tmp_path, metrics=metrics)
    loss = text[text.index("<h3>Loss</h3>") : text.index("<h3>Saturated examples</h3>")]
    assert "held out (loss per example): 0.400 at step 5, 0.400 at step 10" in loss
    assert loss.count('class="line s1"') == 2  # in the legend and as one unbroken line
    assert "<circle" not in loss


def test_long_runs_are_smoothed_and_stay_small(tmp_path):
    metrics = [_kto_line(step) for step in range(1, 2001)]
    text = _report(tmp_path, metrics=metrics)
    assert "Bold: mean over" in text
    assert len(text) < 700_000


@pytest.mark.parametrize("window", [3, 5])
def test_smoothing_is_the_mean_over_the_window_and_keeps_gaps(window):
    values = np.array([1.0, 5.0, np.nan, 2.0, 4.0, 9.0])
    found = _smoothed("a", np.arange(6), values, window)
    half = window // 2
    for i, value in enumerate(values):
        inside = values[max(0, i - half) : i + half + 1]
        expected = np.nan if np.isnan(value) else np.nanmean(inside)
        np.testing.assert_allclose(found.y[i], expected)
    np.testing.assert_array_equal(found.raw, values)


def test_unicode_survives(tmp_path):
    assert "日本語 ü \ufffd" in _report(tmp_path, title="日本語 ü \ud800")


def test_a_report_replaces_the_one_before_and_a_failed_write_keeps_it(tmp_path, monkeypatch):
    _report(tmp_path, title="first")
    assert "<h1>second" in _report(tmp_path, title="second")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        _report(tmp_path, title="third")
    assert "<h1>second" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_unchanged_samples_are_marked(tmp_path):
    text = _report(tmp_path, samples=[{"prompt": "p", "before": "x", "after": "x"}])
    assert ">unchanged<" in text
    assert "0 of 1 answers changed" in text


def test_prompts_of_samples_are_messages(tmp_path):
    messages = [{"role": "system", "content": "<s>"}, {"role": "user", "content": "hi"}]
    text = _report(tmp_path, samples=[{"prompt": messages, "before": "a", "after": "b"}])
    assert '<div class="role">system</div><div class="text" dir="auto">&lt;s&gt;</div>' in text
    assert '<div class="role">user</div><div class="text" dir="auto">hi</div>' in text
