"""The command `diagnose`: its files and its summary, and the mistakes that it refuses."""

import csv
import json

import pytest

from elbo_kto_jax import diagnose
from elbo_kto_jax.runtime.errors import UserError
from tests import runs


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory):
    data = runs.write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", runs.records(6))
    return {"model.path": tiny_checkpoint, "data.train": data, "train.microbatch_tokens": 64}


def test_files_and_summary(tiny_checkpoint, settings, tmp_path):
    schemes, draws = ("uniform", "bernoulli", "balanced"), (1, 2)
    flags = runs.flags(
        settings,
        f"--checkpoint={tiny_checkpoint}",
        f"--out={tmp_path}",
        "--records=4",
        "--repeats=2",
        "--schemes=balanced,bernoulli",
        "--draws=2,1",
    )
    summary = diagnose.main(flags)
    assert summary.keys() >= {"table", "report", "scheme", "draws"}
    assert (summary["records"], summary["repeats"]) == (4, 2)
    result = json.loads((tmp_path / "diagnosis.json").read_text())
    with open(summary["table"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["scheme"], int(row["draws"])) for row in rows] == [(s, k) for s in schemes for k in draws]
    for row, figures in zip(rows, result["rows"], strict=True):
        # Policy and reference are the same model.
        assert float(row["reward_variance_shared"]) == float(row["loss_bias"]) == 0
        assert 0 <= float(row["gradient_variance_low"]) <= float(row["gradient_variance"])
        assert float(row["gradient_variance"]) == figures["gradient_variance"]["value"]
        assert float(row["flops"]) > 0
        groups = figures["gradient_variance_by_group"]
        assert groups.keys() >= {"wte", "q_proj", "ff_out", "head"}
        assert sum(figure["value"] for figure in groups.values()) == pytest.approx(
            figures["gradient_variance"]["value"]
        )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "At the start of training." in page
    with pytest.raises(UserError, match="exists already"):
        diagnose.main(flags)


def test_pairs(tiny_checkpoint, tmp_path):
    """Of ELBO-DPO the units are pairs: bias through -log sigmoid, the gradient's variance, a recommendation."""
    rows = [
        {"prompt": f"Capitals {word}:", "chosen": f" {word.upper()}", "rejected": f" {word}"}
        for word in ("abc", "dcb", "eaf", "ggb")
    ]
    data = runs.write_jsonl(tmp_path / "pairs.jsonl", rows)
    settings = {"model.path": tiny_checkpoint, "data.train": data, "objective.name": "elbo_dpo"}
    out = tmp_path / "out"
    given = [f"--checkpoint={tiny_checkpoint}", f"--out={out}", "--records=6", "--repeats=2"]
    summary = diagnose.main(runs.flags(settings, *given, "--schemes=uniform", "--draws=1,2"))
    assert summary["records"] == 6
    result = json.loads((out / "diagnosis.json").read_text())
    for row in result["rows"]:
        assert row["loss_bias"]["value"] == row["reference_point_variance"]["value"] == 0  # policy and reference alike
        assert row["gradient_variance"]["value"] > 0
    assert {part["bin"] for part in result["breakdown"] if part["by"] == "label"} == {"desirable", "undesirable"}


@pytest.mark.parametrize(
    ("changes", "flag", "said"),
    [
        ({}, "--records=1", "--records: expected at least 2"),
        ({}, "--repeats=1", "--repeats: expected at least 2"),
        ({}, "--schemes=sobol", "--schemes=sobol: expected some of uniform"),
        ({}, "--draws=1,0", "--draws=1,0: expected numbers of at least 1"),
        ({}, f"--draws={10**30}", "expected numbers of at least 1"),
        ({}, "--draws=" + "1" * 5000, "expected numbers of at least 1"),
        ({}, "--draws=99999999", "masks (6 records"),
        ({}, "--repeats=1000000000", "masks (6 records"),
        ({"objective.name": "sft"}, "--records=2", "config.objective.name: 'sft'"),
        ({"model.path": ""}, "--records=2", "--config.model.path"),
    ],
)
def test_refuses(tiny_checkpoint, settings, tmp_path, changes, flag, said):
    with pytest.raises(UserError) as error:
        diagnose.main(
            runs.flags({**settings, **changes}, f"--checkpoint={tiny_checkpoint}", f"--out={tmp_path / 'out'}", flag)
        )
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert not (tmp_path / "out").exists()
