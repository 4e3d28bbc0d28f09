import json
import math

import pytest

from elbo_kto_jax.reports.sweep import write_sweep_report
from tests.reports.seen import HOSTILE, Seen


def _row(checkpoint, task="gsm8k", metric="acc,none", value=0.5, sampler=None, draws=None, low=None, high=None, **more):
    row = {"checkpoint": checkpoint, "task": task, "metric": metric, "value": value, "sampler": sampler, "draws": draws}
    return {**row, "cell": f"{checkpoint} {task} {sampler} {draws}", "low": low, "high": high, "seconds": 1800, **more}


ROWS = [
    *[_row(name, sampler=s, value=v, low=v - 0.1, high=v + 0.1)
      for name, v in (("a/base", 0.5), ("a/tuned", 0.75)) for s in ("{}", '{"steps": 8}')],
    *[_row(name, task="elbo", metric="mean_elbo", value=-10.0 - k, draws=k)
      for name in ("a/base", "a/tuned") for k in (8, 1)],
    *[_row("a/base", task="ifeval", sampler=s) for s in ('{"steps": 8, "temperature": 1.0}', "{}")],
    *[_row("a/base", task="win_rate", sampler=f'{{"threshold": {t}}}', value=t) for t in (0.9, 0.5)],
    _row("a/base", task="tasks/mine.yaml", value=math.nan),
]  # fmt: skip


def _report(tmp_path, rows=ROWS, cells=9, done=9):
    path = tmp_path / "report.html"
    write_sweep_report(path, title="Sweep", config={"seed": 0}, rows=rows, cells=cells, done=done)
    return Seen(path)


def test_charts(tmp_path):
    """Lines along numbers, bars for what cannot be ordered, and nothing drawn of what is no number."""
    drawn = _report(tmp_path).charts
    assert drawn["gsm8k: acc,none, As configured"] == "base: 0.500 (0.400 to 0.600). tuned: 0.750 (0.650 to 0.850)."
    assert drawn["gsm8k: acc,none, steps=8"] == drawn["gsm8k: acc,none, As configured"]
    assert drawn["ifeval: acc,none"] == "steps=8, temperature=1.0: 0.500. As configured: 0.500."
    assert "base (mean_elbo): −11.0 at draws K 1, −18.0 at draws K 8" in drawn["elbo: mean_elbo"]
    assert "base (acc,none): 0.500 at threshold 0.500, 0.900 at threshold 0.900" in drawn["win_rate: acc,none"]
    assert drawn["mine.yaml: acc,none"] == "No finite value."


def test_figures_and_table(tmp_path):
    seen = _report(tmp_path, rows=[_row("a", value=0.75, low=0.65, high=0.85), _row("b", sampler="{}", draws=4)])
    assert seen.key_numbers == {"Cells": "9", "Checkpoints": "2", "Tasks": "1", "Hours": "1.00"}
    assert "9 of 9 evaluations done: 2 checkpoints, 1 task." in seen.text
    assert "Not complete" not in seen.text
    assert seen.table("Checkpoint") == {
        "a": ["gsm8k", "–", "–", "acc,none", "0.750", "0.650 to 0.850", "1,800"],
        "b": ["gsm8k", "K=4", "4", "acc,none", "0.500", "–", "1,800"],
    }


def test_nothing_is_done_yet(tmp_path):
    seen = _report(tmp_path, rows=[], cells=3, done=0)
    assert "0 of 3 evaluations done" in seen.text
    assert "3 of 3 cells are still to be evaluated" in seen.text
    assert seen.charts == {}


def test_checkpoints_of_one_name_are_told_apart(tmp_path):
    assert list(_report(tmp_path, rows=[_row("a/run"), _row("b/run")]).charts.values()) == [
        "a/run: 0.500. b/run: 0.500."
    ]


def test_more_cells_than_a_chart_holds(tmp_path):
    seen = _report(tmp_path, rows=[_row(f"run {i}") for i in range(40)], cells=40, done=40)
    assert "The first 24 of 40." in seen.text
    assert len(seen.table("Checkpoint")) == 40


def test_everything_is_escaped(tmp_path):
    sampler = json.dumps({HOSTILE: HOSTILE})
    seen = _report(tmp_path, rows=[_row("a", task=f"a {HOSTILE}", metric=HOSTILE, sampler=sampler)])
    assert seen.table("Checkpoint")["a"][1] == f"{HOSTILE}={HOSTILE}"
    assert seen.text.count(HOSTILE) >= 6


@pytest.mark.parametrize("checkpoints", [4, 5])
def test_lines_only_while_they_can_be_told_apart(tmp_path, checkpoints):
    rows = [_row(f"run {i}", task="elbo", draws=k) for i in range(checkpoints) for k in (1, 2)]
    assert ("draws K" in _report(tmp_path, rows=rows).text) == (checkpoints == 4)
