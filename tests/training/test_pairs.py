"""Whole runs of `train` with ELBO-DPO on pairs: what they log, that they go on, and what they refuse."""

import jax
import numpy as np
import pytest

from elbo_kto_jax import train
from elbo_kto_jax.checkpoints.load import load_model
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.training import loop
from tests import runs

pytestmark = pytest.mark.usefixtures("shared_programs")

STEPS = 4


def pairs(num, first=0):
    """Each prompt with its digits in order, and in the reverse."""
    return [
        {
            "id": record["id"],
            "prompt": record["prompt"],
            "chosen": [{"role": "assistant", "content": "".join(sorted(digits))}],
            "rejected": [{"role": "assistant", "content": "".join(sorted(digits, reverse=True)) + "0"}],
        }
        for record in runs.records(num, first)
        for digits in [record["prompt"][0]["content"].split()[1]]
    ]


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return {
        "model.path": tiny_checkpoint,
        "objective.name": "elbo_dpo",
        "data.train": runs.write_jsonl(folder / "train.jsonl", pairs(6)),
        "data.eval": runs.write_jsonl(folder / "eval.jsonl", pairs(3, first=6)),
        "train.global_batch_size": 4,
        "train.steps": STEPS,
        "train.eval_every": 2,
        "train.checkpoint_every": 1,
        "optimizer.learning_rate": 1e-3,
    }


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, train.main(runs.flags(settings, f"--workdir={workdir}"))


def rows_of(workdir):
    return runs.read_jsonl(workdir / "metrics.jsonl")


def test_metrics_and_report(whole):
    workdir, summary = whole
    rows = rows_of(workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)  # at the start, rewards are 0
    assert rows[0]["reward_margin"] == rows[0]["accuracy"] == 0
    assert rows[-1]["reward_margin"] == rows[-1]["reward_desirable"] - rows[-1]["reward_undesirable"] != 0
    assert rows[-1]["examples"] == 4 + 4 + 4 + 4
    assert {"saturated_fraction", "accuracy", "grad_norm"} <= rows[-1].keys()
    assert "reference_point" not in rows[-1]
    assert {"eval_loss", "eval_reward_margin", "eval_accuracy"} <= rows[1].keys()
    assert 0 <= rows[-1]["eval_accuracy"] <= 1
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "Accuracy" in page
    assert summary["steps"] == STEPS


def test_the_same_command_goes_on_with_the_same_bits(settings, whole, tmp_path, monkeypatch):
    stops, real = [], loop.train_step

    def stopped(*arguments, **options):
        stops.append(1)
        if len(stops) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", stopped)
    argv = runs.flags(settings, f"--workdir={tmp_path / 'run'}")
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train.main(argv)
    monkeypatch.setattr(loop, "train_step", real)
    assert train.main(argv)["steps"] == STEPS
    mine, theirs = (load_model(workdir).params for workdir in (tmp_path / "run", whole[0]))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "changes",
    [
        {"reference.mode": "online"},
        {"train.residuals": "recompute"},
        {"mesh.data": 2, "mesh.fsdp": 4},
    ],
    ids=["online", "two passes", "another mesh"],
)
def test_however_the_work_is_done(settings, whole, tmp_path, changes):
    train.main(runs.flags({**settings, **changes}, f"--workdir={tmp_path / 'run'}"))
    names = ("loss", "reward_margin", "grad_norm", "eval_loss", "accuracy")
    for found, expected in zip(rows_of(tmp_path / "run"), rows_of(whole[0]), strict=True):
        for name in names:
            if name in expected:
                np.testing.assert_allclose(found[name], expected[name], rtol=2e-3, atol=2e-4)


def test_adapters(settings, tmp_path):
    """Their reference is the base; at the start rewards are exactly 0."""
    changes = {"lora.rank": 2, "lora.alpha": 2.0, "train.steps": 2, "train.eval_every": 0}
    train.main(runs.flags({**settings, **changes}, f"--workdir={tmp_path / 'run'}"))
    first, last = rows_of(tmp_path / "run")
    assert first["reward_desirable"] == first["reward_undesirable"] == 0
    assert first["grad_norm"] > 0
    assert np.isfinite(last["loss"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.global_batch_size": 3}, "config.train.global_batch_size: 3 completions are no whole pairs"),
        ({"data.desirable_fraction": 0.5}, "config.data.desirable_fraction: 0.5 is not undesirable_fraction 1.0"),
        ({"objective.label_smoothing": 0.5}, "config.objective.label_smoothing: expected a number"),
    ],
)
def test_refuses(settings, tmp_path, changes, said):
    with pytest.raises(UserError) as error:
        train.main(runs.flags({**settings, **changes}, f"--workdir={tmp_path / 'run'}"))
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_unpaired_data_is_refused(settings, tmp_path):
    data = runs.write_jsonl(tmp_path / "unpaired.jsonl", runs.records(6))
    with pytest.raises(UserError, match="has no pairs"):
        train.main(runs.flags({**settings, "data.train": data}, f"--workdir={tmp_path / 'run'}"))


def test_a_reference_cache_of_unpaired_batches_is_not_used(settings, whole, tmp_path):
    """The same completions in other batches stand in other rows."""
    changes = {"objective.name": "elbo_kto", "train.eval_every": 0}
    train.main(runs.flags({**settings, **changes}, f"--workdir={tmp_path / 'run'}"))
    keys = [{part.name for part in (folder / "reference").iterdir()} for folder in (tmp_path / "run", whole[0])]
    assert not keys[0] & keys[1]
