"""python -m elbo_kto_jax.benchmark on a tiny model: the files and figures, not their size."""

import importlib.util
import io
import json
import sys

import numpy as np
import pytest

from elbo_kto_jax import cli
from elbo_kto_jax.benchmark import __main__ as benchmark
from elbo_kto_jax.benchmark import worker
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
        settings, "--records=12", "--rounds=1", "--max-length=32", f"--out={tmp_path / 'out'}", "--overwrite"
    )


@pytest.mark.parametrize(
    ("flag", "variant", "labels", "with_peer"),
    [
        ("train.microbatch_tokens=2048", None, ["ours"], False),  # the batch is one micro-batch
        ("train.one_pass_microbatches=99", "two_passes", ["ours, one pass", "ours, two passes"], False),
        pytest.param(
            "train.one_pass_microbatches=1",
            "one_pass",
            ["ours, two passes", "ours, one pass"],
            True,
            marks=needs_torch,
        ),
    ],
)
def test_summary_and_files(arguments, tmp_path, capsys, monkeypatch, flag, variant, labels, with_peer):
    """As configured and, where a batch is several micro-batches, in the other number of passes."""
    draws = (4,) if variant else benchmark.MEMORY_DRAWS  # each takes a process of its own, which is what takes time
    monkeypatch.setattr(benchmark, "MEMORY_DRAWS", draws)
    summary = benchmark.main([*arguments, f"--config.{flag}", *([] if with_peer else ["--no-peer"])])
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert summary.items() >= {key: result[key] for key in ("ratio", "ours", "variants", "peer", "memory")}.items()
    assert (summary["ratio"] is not None) == with_peer
    variants = {variant} if variant else set()
    peers = {"padded", "true"} if with_peer else set()
    assert result["variants"].keys() == variants
    assert result["ratios"].keys() == variants | peers
    assert result["memory"].keys() == {"ours", *variants, *({"peer"} if with_peer else ())}
    assert all(set(sizes) == {f"K={k}" for k in draws} for sizes in result["memory"].values())
    for found in result["variants"].values():
        assert found["ratios"].keys() == peers
    for found in (*result["ours"].values(), *(found["train"] for found in result["variants"].values())):
        np.testing.assert_allclose(found["flops"] / result["setting"]["matrix_peak_flops"], found["fraction_of_peak"])
        np.testing.assert_allclose(
            found["tokens_per_second"] * found["seconds_per_example"],
            result["setting"]["mean_tokens"] * result["setting"]["draws"],
        )
    text, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    steps = [line for line in text.splitlines() if line.startswith("training step, ours")]
    for label, step in zip(labels, steps, strict=True):
        assert step.startswith(f"training step, {label}  ")
        assert f"peak memory, {label}  " in text
        assert f"{label}, K=4" in page
    assert "reference pass, ours  " in text


@pytest.mark.parametrize(("most", "expected"), [(1, [False, True, False]), (99, [True, True, False])])
def test_the_worker_takes_the_passes_that_it_is_asked_for(tiny_checkpoint, tmp_path, monkeypatch, most, expected):
    """As configured, one, two."""
    settings = {
        "model.path": tiny_checkpoint,
        "data.train": runs.write_jsonl(tmp_path / "data.jsonl", runs.records(20)),
        "train.global_batch_size": 20,
        "train.one_pass_microbatches": most,
    }
    flags = cli.Flags("test", "")
    flags.add_config()
    _, config = flags.parse(runs.flags(settings))
    one_pass = []

    def train_step(programs, state, batch, reference):
        assert len(batch.micro_batches) > 1
        one_pass.append(programs.takes_one_pass(batch.micro_batches))
        return state, {"reward": np.zeros(20)}

    train = {"do": "train", "elbo_ref": [0.0] * 20}
    requests = [
        {"config": config.to_dict(), "records": 20},
        train,
        {**train, "one_pass": True},
        {**train, "one_pass": False},
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(request) + "\n" for request in requests)))
    monkeypatch.setattr(worker, "train_step", train_step)
    worker.main()
    assert one_pass == expected


@pytest.mark.parametrize(
    ("flag", "named"),
    [("--records=0", "--records"), ("--records=99999", "--records"), ("--rounds=0", "--rounds")],
)
def test_flags(arguments, flag, named):
    with pytest.raises(UserError, match=named):
        benchmark.main([*arguments, flag, "--no-peer"])


@pytest.mark.parametrize("variant", ["one_pass", "two_passes"])
def test_different_work_is_refused(variant):
    same = {"elbo": [1.0], "rewards": [1.0], "loss": 0.5, "grad_norm": 1.0}
    runs = ("ours.reference", "true.reference", "ours.train", "true.train", f"{variant}.train")
    found = {run: dict(same) for run in runs}
    benchmark._check_equal(found)
    for run in runs:
        for key in ("elbo",) if run.endswith("reference") else ("rewards", "loss", "grad_norm"):
            wrong = found | {run: same | {key: np.array(same[key]) * 1.1}}
            with pytest.raises(RuntimeError, match="differs"):
                benchmark._check_equal(wrong)
