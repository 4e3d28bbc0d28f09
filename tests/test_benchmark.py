"""python -m elbo_kto_jax.benchmark on a tiny model: the files and figures, not their size."""

import importlib.util
import json

import numpy as np
import pytest

from elbo_kto_jax.benchmark import __main__ as benchmark
from elbo_kto_jax.errors import UserError
from launch import quickstart
from tests import runs

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed (extra `bench`)"
)


@pytest.fixture
def arguments(tiny_checkpoint, tmp_path):
    quickstart.write_data(tmp_path / "data", seed=0)
    settings = {"model.path": tiny_checkpoint, "data.train": tmp_path / "data" / "feedback.jsonl"}
    return runs.flags(
        settings, "--records=3", "--rounds=1", "--max-length=128", f"--out={tmp_path / 'out'}", "--overwrite"
    )


@pytest.mark.parametrize("with_peer", [False, pytest.param(True, marks=needs_torch)])
def test_summary_and_files(arguments, tmp_path, capsys, with_peer):
    summary = benchmark.main(arguments + ([] if with_peer else ["--no-peer"]))
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert summary.items() >= {key: result[key] for key in ("ratio", "ours", "peer", "memory")}.items()
    assert (summary["ratio"] is not None) == with_peer
    assert set(result["memory"]["ours"]) == {"K=1", "K=4", "K=8"}
    for work in ("train", "reference"):
        found = result["ours"][work]
        np.testing.assert_allclose(found["flops"] / result["setting"]["matrix_peak_flops"], found["fraction_of_peak"])
        np.testing.assert_allclose(
            found["tokens_per_second"] * found["seconds_per_example"],
            result["setting"]["mean_tokens"] * result["setting"]["draws"],
        )
    assert "training step, ours" in capsys.readouterr().out
    assert "Peak memory" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flag", "named"),
    [("--records=0", "--records"), ("--records=99999", "--records"), ("--rounds=0", "--rounds")],
)
def test_flags(arguments, flag, named):
    with pytest.raises(UserError, match=named):
        benchmark.main([*arguments, flag, "--no-peer"])


def test_different_work_is_refused():
    same = {"elbo": [1.0], "rewards": [1.0], "loss": 0.5, "grad_norm": 1.0}
    found = {f"{side}.{work}": dict(same) for side in ("ours", "true") for work in ("train", "reference")}
    benchmark._check_equal(found)
    for work, key in (("reference", "elbo"), ("train", "rewards"), ("train", "loss"), ("train", "grad_norm")):
        wrong = {name: dict(run) for name, run in found.items()}
        wrong[f"true.{work}"][key] = np.array(same[key]) * 1.1
        with pytest.raises(RuntimeError, match="differs"):
            benchmark._check_equal(wrong)
