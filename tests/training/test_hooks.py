"""training/hooks.py: which checkpoints of a run stay."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.checkpoints import training_state
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints
from elbo_kto_jax.objectives.protocol import Feedback
from elbo_kto_jax.runtime import recipes
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.training import hooks
from elbo_kto_jax.training.progress import Progress
from elbo_kto_jax.training.state import TrainState
from elbo_kto_jax.training.step import Batch

LAST = 5
NO_BATCH = Batch(Feedback(np.zeros(1, bool), np.zeros(1, bool), np.zeros(1, np.int32)), (), 0)
LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 0.5}


@pytest.fixture
def removed(monkeypatch):
    """The steps that were removed, each with those that were complete right before."""
    found, real = [], training_state.remove_step

    def remove(steps, step):
        found.append((step, present(steps)))
        real(steps, step)

    monkeypatch.setattr(training_state, "remove_step", remove)
    return found


def present(steps: Path) -> set[int]:
    return {int(folder.name) for folder in steps.iterdir() if folder.name.isdecimal()}


def take(folder: Path, first: int, last: int, progress: Progress, **options) -> Progress:
    """The steps `first` to `last` of a run, as `loop.take_steps` shows them to the hook."""
    recipe = Config.from_mapping(recipes.load("tiny").to_dict()).train
    train = dataclasses.replace(recipe, **{"checkpoint_every": 3, "keep_checkpoints": 1, **options})
    checkpoints, state = TrainingCheckpoints(folder), TrainState({"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    best, hook = hooks.BestSoFar(train, progress), hooks.Checkpoints(train, {}, checkpoints, progress)
    progress.plan(LAST)
    for number in range(first, last + 1):
        progress.step = number
        step = hooks.Step(number, NO_BATCH, {"eval_loss": LOSSES[number]}, {}, is_last=number == LAST)
        best.measure(step, state)
        if hook.wants_rest(step):
            hook.rest(step, state)
        if step.is_last:
            break
    hook.close()
    checkpoints.close()
    return progress


def test_the_latest_and_the_best_stay_and_go_once_there_is_a_newer_one(tmp_path, removed):
    take(tmp_path, 1, 3, Progress())
    assert present(tmp_path) == {2, 3}
    assert removed == [(1, {1, 2})]
    saved = Progress.restored(json.loads((tmp_path / "3" / "progress" / "metadata").read_text()))
    assert (saved.best_step, saved.best_value) == (2, 1.0)
    assert take(tmp_path, 4, 5, saved).best_step == 5
    assert removed[1:] == [(2, {2, 3, 5}), (3, {3, 5})]  # 2 was the best until 5 was complete
    assert present(tmp_path) == {5}


def test_all_stay_if_none_are_counted(tmp_path, removed):
    take(tmp_path, 1, 5, Progress(), keep_checkpoints=0, keep_best="")
    assert (present(tmp_path), removed) == ({3, 5}, [])


def test_a_step_that_is_a_link_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "1").symlink_to(tmp_path / "elsewhere")
    take(tmp_path / "steps", 3, 5, Progress(), keep_best="")
    assert present(tmp_path / "steps") == {1, 5}


@pytest.mark.parametrize(("metric", "best"), [("eval_loss", 2), ("eval_accuracy", 3)])
def test_losses_are_best_low_and_all_else_high(metric, best):
    progress = Progress()
    for step, value in enumerate((2.0, 1.0, 3.0, 1.0), start=1):
        progress.notice_best(metric, step, value)
    assert progress.best_step == best
    progress.notice_best("eval_other", 9, -1.0)  # another metric begins anew
    assert (progress.best_step, progress.best_value, progress.waited) == (9, -1.0, 0)


@pytest.mark.parametrize(("patience", "last"), [(0, 5), (1, 3), (2, 4), (3, 5)])
def test_a_run_ends_where_patience_does_and_its_state_is_saved(tmp_path, patience, last):
    """Step 2 is the best of the first four; the loss of step 4 is not finite, and so no better one."""
    progress = take(tmp_path, 1, 5, Progress(), patience=patience)
    assert (progress.step, progress.is_out_of(patience)) == (last, 0 < last < 5)
    assert present(tmp_path) == {5} if last == 5 else {2, last}
    saved = Progress.restored(json.loads((tmp_path / str(last) / "progress" / "metadata").read_text()))
    assert saved == progress


def test_a_longer_run_is_waited_for_anew():
    progress = Progress(best_metric="eval_loss", best_step=2, waited=2, planned=5)
    progress.plan(5)
    assert progress.is_out_of(2)
    assert not progress.is_out_of(3)
    progress.plan(6)
    assert not progress.is_out_of(1)
    assert progress.best_step == 2


def test_nothing_is_best_where_no_value_is_finite():
    progress = Progress()
    for step in (1, 2):
        progress.notice_best("eval_loss", step, float("nan"))
    assert (progress.best_step, progress.waited) == (0, 2)
    progress.notice_best("eval_loss", 3, 7.0)
    assert (progress.best_step, progress.waited) == (3, 0)
