"""launch/compare_objectives.py: as many completions for each objective, and a table over the seeds."""

import json

import pytest

from elbo_kto_jax.data import capitals
from elbo_kto_jax.data.reading import read_records
from launch import compare_objectives, comparison


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    capitals.write_data(folder, seed=0)
    return folder


@pytest.mark.parametrize("name", compare_objectives.OBJECTIVES)
def test_each_objective_sees_as_many_completions(folder, name):
    records = read_records(compare_objectives.write_data(folder, name), needs=("prompt", "completion")).records
    assert len(records) == capitals.FEEDBACK
    good = [record.label for record in records]
    assert sum(good) == (len(records) if name == "sft" else len(records) // 2)
    assert len({str(record.prompt) for record in records}) == len(records) // (2 if name == "dpo" else 1)
    assert all(bool(record.pair) == (name == "dpo") for record in records)
    for record in records[:4]:
        word = record.prompt[0]["content"].split()[1]
        answer = capitals.good_answer(word) if record.label else capitals.bad_answer(word)
        assert record.completion[0]["content"] == answer


def test_table(tmp_path, monkeypatch):
    def run_cell(workdir, seed, cell, arguments):
        file = workdir / f"seed-{seed}" / "cells" / cell / "result.json"
        file.parent.mkdir(parents=True)
        rate = {"kto": 0.7, "dpo": 0.8, "sft": 0.6}[cell[:3]] + 0.02 * seed
        file.write_text(json.dumps({"adjusted_win_rate": rate, "loss": 0.4}))

    monkeypatch.setattr(comparison, "run_cell", run_cell)
    flags = [f"--workdir={tmp_path}", "--seeds=0,1,2", "--betas=0.5,1.0"]
    summary = compare_objectives.main(flags)
    assert summary["run"] == summary["cells"] == 15  # SFT has no beta
    rates = {(row["objective"], row["beta"]): row["adjusted_win_rate"] for row in summary["rows"]}
    assert rates["dpo", "0.5"] == pytest.approx(0.82)
    assert rates["sft", ""] == pytest.approx(0.62)
    assert compare_objectives.main(flags)["run"] == 0
