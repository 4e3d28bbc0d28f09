"""Losses and gradients that are not finite: the state stays, the step and the examples are named; and warnings."""

import json
import random

import jax
import numpy as np
import pytest

from elbo_kto_jax import train
from elbo_kto_jax.checkpoints.load import load_model
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.training import loop
from elbo_kto_jax.training.health import Health, divergence
from tests import runs
from tests.published import same_bits

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory):
    data = tmp_path_factory.mktemp("numbers") / "train.jsonl"
    return {
        "model.path": tiny_checkpoint,
        "data.train": runs.write_jsonl(data, runs.records(6)),
        "train.checkpoint_every": 1,
    }


@pytest.fixture
def bad_steps(monkeypatch):
    """Makes the weights of one example's hidden tokens infinite or NaN in the given steps (from 1)."""

    def arrange(steps, value=np.nan) -> list[int]:
        calls, real = [], loop.train_step

        def step(programs, state, batch, *more, **options):
            calls.append(1)
            if len(calls) in steps:
                batch = batch._replace(micro_batches=[spoil(rows, value) for rows in batch.micro_batches])
            return real(programs, state, batch, *more, **options)

        monkeypatch.setattr(loop, "train_step", step)
        return calls

    def spoil(rows, value):
        """The tokens of example 1 of the batch (two draws each) get the weight `value`."""
        slots = np.take_along_axis(rows.slot_index, rows.target_slot, axis=1)
        return rows._replace(target_weight=np.where(slots // 2 == 1, np.float32(value), rows.target_weight))

    return arrange


def params_at(workdir, step):
    return load_model(workdir / "checkpoints" / str(step)).params


def same(a, b) -> bool:
    return all(same_bits(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_stop(settings, tmp_path, bad_steps):
    calls = bad_steps([4])
    argv = runs.flags({**settings, "train.steps": 6}, f"--workdir={tmp_path}")
    with pytest.raises(UserError) as stop:
        train.main(argv)
    first, second = str(stop.value).split("\n")
    assert first.startswith("step 4: loss nan, gradient norm nan, from the examples ")
    assert "on_bad_numbers" in second
    assert len(calls) == 4  # a checkpoint was due
    rows = runs.read_jsonl(tmp_path / "not_finite" / "4.jsonl")
    named = [row for row in rows if repr(row["id"]) in first.split("examples ")[1].split(":")[0]]
    assert [row["reward"] for row in named] == [None]
    assert sum(row["reward"] is None for row in rows) == 1
    assert same(load_model(tmp_path / "not_finite" / "4").params, params_at(tmp_path, 3))
    assert not (tmp_path / "checkpoints" / "4").exists()
    # The machine's fault, say: the same command goes on from the step before and finishes.
    assert train.main(argv)["steps"] == 6


def test_stop_between_checkpoints_keeps_the_state_of_the_step(settings, tmp_path, bad_steps):
    """The host learns of step 3 when step 4 is on its way, which must not move the state any more."""
    calls = bad_steps([3], value=np.inf)
    settings = {**settings, "objective.name": "sft", "train.checkpoint_every": 2, "train.steps": 8}
    with pytest.raises(UserError, match="step 3: "):
        train.main(runs.flags(settings, f"--workdir={tmp_path}"))
    assert len(calls) == 4
    assert sum(row["elbo"] is None for row in runs.read_jsonl(tmp_path / "not_finite" / "3.jsonl")) == 1
    assert same(load_model(tmp_path / "not_finite" / "3").params, params_at(tmp_path, 2))


def test_skip(settings, tmp_path, bad_steps, caplog):
    bad_steps([3])
    argv = runs.flags({**settings, "train.on_bad_numbers": "skip"}, f"--workdir={tmp_path}")
    summary = train.main(argv)
    assert (summary["steps"], summary["skipped_steps"]) == (5, 1)
    assert same(params_at(tmp_path, 3), params_at(tmp_path, 2))
    assert not same(params_at(tmp_path, 4), params_at(tmp_path, 3))
    rows = {row["step"]: row for row in runs.read_jsonl(tmp_path / "metrics.jsonl")}
    assert rows[3]["loss"] is None
    assert all(rows[step]["loss"] is not None for step in (1, 2, 4, 5))
    assert "step 3: loss nan" in caplog.text
    assert "(1 such steps so far)" in caplog.text
    # The count outlives the process.
    progress = json.loads((tmp_path / "checkpoints" / "5" / "progress" / "metadata").read_text())
    assert progress["skipped"] == 1
    assert train.main(argv)["skipped_steps"] == 1


def test_skipping_everything_stops(settings, tmp_path, bad_steps):
    calls = bad_steps(range(2, 99))
    settings = {**settings, "train.on_bad_numbers": "skip", "train.steps": 20, "train.checkpoint_every": 20}
    with pytest.raises(UserError, match="step 12: loss nan"):
        train.main(runs.flags(settings, f"--workdir={tmp_path}"))
    assert len(calls) <= 13


# ---- warnings ----


def watch(losses, saturated=0.0) -> list[str]:
    health = Health()
    return [
        warning
        for step, loss in enumerate(losses, start=1)
        for warning in health.warnings(step, {"loss": loss, "saturated_fraction": saturated})
    ]


def test_a_spike_is_told_once_and_noise_is_not():
    rng = random.Random(0)
    calm = [0.5 + 0.01 * rng.gauss(0, 1) for _ in range(2000)]  # a false alarm has a chance of 1e-20
    assert watch(calm) == []
    assert watch([3 - step / 100 for step in range(250)]) == []
    assert watch([float("nan")] * 100) == []
    (warning,) = watch([*calm[:60], 2.0, 2.0, 2.0, *calm[60:100]])
    assert warning.startswith("step 61: the loss jumped to 2 from a median of 0.")
    assert "config.optimizer.learning_rate" in warning
    assert len(watch([*calm[:60], 2.0, *calm[60:160], 2.0])) == 2


def test_saturation_is_told_every_fifty_steps_with_what_to_change():
    assert watch([0.5] * 100, saturated=0.4) == []
    warnings = watch([0.5] * 100, saturated=0.75)
    assert [warning.split(":")[0] for warning in warnings] == ["step 20", "step 70"]
    assert "75% of the examples are saturated" in warnings[0]
    assert "config.objective.beta" in warnings[0]


@pytest.mark.parametrize(
    ("per_token", "weights_rms", "said"),
    [
        ([-1.0, -2.0, -3.0], 0.02, ""),
        ([-1.0, -2.0, -3000.0], 0.02, ""),  # one draw of a scheme with heavy tails
        ([-20.0, -24.0, -22.0], 1.0, ""),  # log(128) is 4.85
        ([-20.0, -25.0, -30.0], 1.0, "-25 nats per token"),
        ([], 0.02, ""),  # a batch without good completions
        ([-4.85, -4.85], 500.0, "root mean square of 500"),
        ([-4.85, -4.85], np.inf, "root mean square of inf"),
        ([-4.85, -4.85], np.nan, "root mean square of nan"),
    ],
)
def test_what_counts_as_diverged(per_token, weights_rms, said):
    found = divergence(np.array(per_token), weights_rms, 128)
    assert said in found
    assert bool(found) == bool(said)
