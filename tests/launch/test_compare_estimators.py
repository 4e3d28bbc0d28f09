"""launch/compare_estimators.py: its table, and that finished cells are not run again."""

import csv
import json

import numpy as np
import pytest

from elbo_kto_jax.runtime.errors import UserError
from launch import compare_estimators, comparison

RATES = {"uniform": [0.60, 0.70, 0.62], "balanced": [0.64, 0.73, 0.67]}


def test_table_and_resuming(tmp_path, monkeypatch):
    ran = []

    def run_cell(workdir, seed, cell, arguments):
        ran.append((seed, cell))
        scheme, draws = cell.split("-")
        assert f"--config.estimator.draws={draws}" in arguments(workdir, cell)
        file = workdir / f"seed-{seed}" / "cells" / cell / "result.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"adjusted_win_rate": RATES[scheme][seed] + int(draws) / 100, "loss": 0.4}))

    monkeypatch.setattr(comparison, "run_cell", run_cell)
    flags = [f"--workdir={tmp_path}", "--schemes=uniform,balanced", "--draws=1,2"]
    compare_estimators.main([*flags, "--seeds=0,1"])
    summary = compare_estimators.main([*flags, "--seeds=0,1,2"])
    assert len(ran) == len(set(ran)) == 12
    assert (summary["cells"], summary["run"]) == (12, 4)
    with open(summary["table"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["scheme"], row["draws"]) for row in rows] == [
        ("uniform", "1"), ("uniform", "2"), ("balanced", "1"), ("balanced", "2"),
    ]  # fmt: skip
    last = {key: float(value) for key, value in rows[-1].items() if key != "scheme"}
    assert last["adjusted_win_rate"] == pytest.approx(0.70)
    # t with two degrees of freedom: 4.303 standard errors; the differences are 4, 3 and 5 points.
    assert last["minus_uniform"] == pytest.approx(0.04)
    assert last["minus_uniform_high"] - 0.04 == pytest.approx(4.303 * 0.01 / np.sqrt(3), rel=1e-3)
    cells = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert len(cells) == 12


def test_refuses_a_seed_that_is_no_number(tmp_path):
    with pytest.raises(UserError, match=r"--seeds=0,x"):
        compare_estimators.main([f"--workdir={tmp_path}", "--seeds=0,x"])
