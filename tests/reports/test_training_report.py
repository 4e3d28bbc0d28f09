import math
import os

import numpy as np
import pytest

from elbo_kto_jax.reports.training import _smoothed, write_training_report
from tests.reports.seen import Seen, words


def _kto_line(step):
    slopes = {
        "reward_desirable": 0.02, "reward_undesirable": -0.01, "reward_margin": 0.03, "reference_point": 0.001,
        "examples": 8, "tokens": 1000, "seconds": 0.5,
    }  # fmt: skip
    level = {"saturated_fraction": 0.0, "grad_norm": 1.0, "learning_rate": 1e-6, "real_token_fraction": 0.9}
    return {"step": step, "loss": 0.5 - 0.001 * step, **{key: each * step for key, each in slopes.items()}, **level}


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
    return Seen(path)


def test_structure(tmp_path):
    seen = _report(tmp_path)
    assert "Interrupted." not in seen.text
    assert list(seen.charts) == [
        "Rewards", "Reward margin", "Loss", "Saturated examples",
        "Gradient norm", "Learning rate", "Throughput", "Useful tokens",
    ]  # fmt: skip
    assert "In 10 steps over 80 examples, the reward margin went from 0.0300 to 0.300 nats and the loss" in seen.text
    assert seen.key_numbers["Reward margin"] == "0.300 nats"
    assert seen.key_numbers["Tokens / second"] == "2,000"
    assert seen.sections == ["Curves", "Samples", "Details"]
    assert "1 of 1 answers changed" in seen.text
    assert seen.table("Key") == {"seed": ["0"], "model.path": ["m"]}
    assert seen.table("step")["10"][:2] == ["0.490", "0.200"]


def test_numbers_on_top_are_means_over_the_end(tmp_path):
    """The last 3 of 30 margins are 9, 10 and 11: whatever a single step says, the headline is 10."""
    margins = [*[0.0] * 27, 9.0, 10.0, 11.0]
    metrics = [{"step": i + 1, "loss": 0.5, "reward_margin": margin} for i, margin in enumerate(margins)]
    seen = _report(tmp_path, metrics=metrics, summary={"reward_margin": 11.0})
    assert seen.key_numbers["Reward margin"] == "10.0 nats"
    assert "mean of the last 3 logged steps; 0 at step 1" in seen.text
    assert "the reward margin went from 0 to 10.0 nats" in seen.text


def test_every_chart_can_be_downloaded(tmp_path):
    seen = _report(tmp_path)
    assert len(seen.downloads) == len(seen.charts)
    drawing = seen.downloads["reward-margin.svg"]
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    style = words(drawing.find("{*}style"))
    assert "#0072b2" in style
    assert "var(" not in style  # the file stands alone
    assert "Reward margin" in words(drawing)
    drawn = next(one for one in seen.root.iter("svg") if one.get("aria-label", "").startswith("Reward margin"))
    assert len(drawing.findall(".//{*}path")) == len(list(drawn.iter("path")))


def test_a_saved_chart_says_what_lies_outside_of_it(tmp_path):
    metrics = [{"step": i, "loss": 0.5, "grad_norm": 1e6 if i in (7, 9) else 1.0 + i} for i in range(300)]
    drawing = _report(tmp_path, metrics=metrics).downloads["gradient-norm.svg"]
    assert "2 values lie outside the picture and are drawn at its edge the farthest is 1,000,000." in " ".join(
        words(text) for text in drawing.findall(".//{*}text")
    )


def test_sft_has_no_rewards(tmp_path):
    metrics = [{"step": i, "loss": 2.0 / i, "grad_norm": 1.0, "learning_rate": 1e-5} for i in (1, 2)]
    seen = _report(tmp_path, metrics=metrics, summary={"steps": 2}, samples=[])
    assert list(seen.charts) == ["Loss", "Gradient norm", "Learning rate"]
    assert "In 2 steps, the loss went from 2.00 to 1.00." in seen.text
    assert "eward" not in seen.text


def test_what_was_lost_of_the_data_is_told(tmp_path):
    counts = {"records": 9, "skipped": 0, "dropped": 2, "left_out": 3, "cut": 1, "examples": 4}
    seen = _report(tmp_path, summary={"epochs": 2.5, "data": counts, "eval_data": counts | {"dropped": 0, "cut": 0}})
    assert "2 of 9 records were dropped, 1 of 4 examples were cut at data.max_length" in seen.text
    assert "Held-out data" not in seen.text
    assert seen.key_numbers["Epochs"] == "2.50"


def test_values_that_are_not_finite_are_reported(tmp_path):
    metrics = [_kto_line(step) for step in range(1, 11)]
    metrics[3]["loss"], metrics[5]["loss"], metrics[7]["loss"] = math.nan, None, math.inf
    seen = _report(tmp_path, metrics=metrics)
    assert "loss is missing, NaN or infinite at 3 of 10 logged steps, first at step 4." in seen.text
    assert [seen.table("step")[step][0] for step in ("3", "4", "6", "8")] == ["0.497", "–", "–", "–"]


def test_a_batch_without_one_label_is_no_alarm(tmp_path):
    metrics = [_kto_line(step) for step in range(1, 11)]
    metrics[3]["reward_desirable"] = None
    assert "Not finite" not in _report(tmp_path, metrics=metrics).text
    for line in metrics:
        line["reward_desirable"] = None
    assert "reward_desirable is missing" in _report(tmp_path, metrics=metrics).text


def test_empty_and_single(tmp_path):
    nothing = _report(tmp_path, metrics=[], samples=[], summary={}, config={})
    assert "No step has been logged yet." in nothing.text
    assert nothing.charts == {}
    one = _report(tmp_path, metrics=[_kto_line(1)], summary={})
    assert "In 1 step over 8 examples, the reward margin was 0.0300 nats and the loss was 0.499." in one.text
    assert one.of_class("dot")


def test_a_step_logged_twice_counts_once_as_logged_last(tmp_path):
    metrics = [_kto_line(1), {**_kto_line(2), "loss": 98765.0}, {**_kto_line(2), "loss": 0.25}, _kto_line(3)]
    seen = _report(tmp_path, metrics=metrics, summary={"interrupted": True})
    assert "Interrupted." in seen.text
    assert [cells[0] for cells in seen.table("step").values()] == ["0.499", "0.250", "0.497"]
    assert "3 of 3 logged steps" in seen.text


def test_throughput_is_the_difference_of_the_totals(tmp_path):
    assert "lowest 2,000, highest 2,000" in _report(tmp_path).charts["Throughput"]
    # The totals start again after a restart: no speed can be told there, least of all a negative one.
    metrics = [*(_kto_line(step) for step in range(1, 6)), {**_kto_line(6), "tokens": 10, "seconds": 0.1}]
    assert "lowest 2,000, highest 2,000" in _report(tmp_path, metrics=metrics).charts["Throughput"]


def test_held_out_values_are_joined_across_the_steps_between(tmp_path):
    metrics = [_kto_line(step) for step in range(1, 11)]
    assert "held out" not in _report(tmp_path, metrics=metrics).charts["Loss"]
    for line in metrics[4::5]:
        line["eval_loss"] = 0.4
    seen = _report(tmp_path, metrics=metrics)
    assert "held out (loss per example): 0.400 at step 5, 0.400 at step 10" in seen.charts["Loss"]
    loss = seen.root.findall(".//figure")[list(seen.charts).index("Loss")]
    assert len(loss.findall("svg/path[@class='line s1']")) == 1  # unbroken


def test_long_runs_are_smoothed_and_stay_small(tmp_path):
    seen = _report(tmp_path, metrics=[_kto_line(step) for step in range(1, 2001)])
    assert "Bold: mean over 67 logged steps" in seen.text
    assert seen.size < 700_000


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


def test_a_failed_write_keeps_the_report_before(tmp_path, monkeypatch):
    _report(tmp_path, title="first")
    monkeypatch.setattr(os, "replace", lambda *paths: os.rename("", ""))
    with pytest.raises(FileNotFoundError):
        _report(tmp_path, title="second")
    assert "first" in Seen(tmp_path / "report.html").text


def test_samples(tmp_path):
    """Those that did not change are marked; a prompt may be messages."""
    messages = [{"role": "system", "content": "<s>"}, {"role": "user", "content": "hi"}]
    same, changed = {"prompt": "p", "before": "x", "after": "x"}, {"prompt": messages, "before": "a", "after": "b"}
    seen = _report(tmp_path, samples=[same, changed, changed])
    assert "2 of 3 answers changed" in seen.text
    assert "Prompt p unchanged" in seen.text
    assert "Prompt system <s> user hi Before a After b" in seen.text
