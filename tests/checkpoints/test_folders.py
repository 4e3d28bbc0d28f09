"""Whatever a folder's name is, it is that folder; and none is overwritten unasked."""

import fcntl
import grp
import json
import os
import pwd
import time

import jax
import jax.numpy as jnp
import pytest

from elbo_kto_jax.checkpoints.adapters import load_base
from elbo_kto_jax.checkpoints.folders import absolute, locate
from elbo_kto_jax.checkpoints.load import load_model
from elbo_kto_jax.checkpoints.model import Model
from elbo_kto_jax.checkpoints.save import save_model
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints
from elbo_kto_jax.models import lora
from elbo_kto_jax.runtime.errors import UserError
from tests.published import abstract_state, assert_same_trees

NAMES = [
    "run[1]",
    "[!x]",
    "a*b",
    "a**b",
    "what?",
    "a b",
    "%41",
    "a#b",
    "a|b",
    "日本",
    "line\nbreak",
    "it's",
    "~",
    "-x",
    "12",
]


def test_nothing_is_overwritten_unasked_and_only_checkpoints_are(tmp_path, model):
    save_model(tmp_path / "saved", model)
    with pytest.raises(UserError, match="--overwrite"):
        save_model(tmp_path / "saved", model)
    zeros = Model(model.config, jax.tree.map(jnp.zeros_like, model.params), model.assets, "")
    save_model(tmp_path / "saved", zeros, overwrite=True)
    assert_same_trees(load_model(tmp_path / "saved").params, zeros.params)
    with pytest.raises(UserError, match="published"):
        save_model(tmp_path / "published", model, overwrite=True)
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", model)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_s_name_is_no_pattern(tmp_path, model, state, name):
    """What is saved under any name is read again, from there and not from a folder that the name would match."""
    for folder in (tmp_path / "run1" / "model", tmp_path / "a-b" / "model"):
        folder.mkdir(parents=True)
    save_model(tmp_path / name / "model", model)
    assert_same_trees(load_model(tmp_path / name / "model").params, model.params)
    for _ in range(2):  # opened again, what was saved is found
        checkpoints = TrainingCheckpoints(tmp_path / name / "checkpoints")
        if checkpoints.latest_step() is None:
            checkpoints.save(7, state, model.assets)
        checkpoints.wait()
        assert_same_trees(checkpoints.restore_latest(abstract_state(state)).opt_state, state.opt_state)
        checkpoints.close()
    assert_same_trees(load_model(tmp_path / name).params, state.params)


def test_the_best_step_of_a_run(tmp_path):
    """It is the one that the latest step names; a folder of that name is what it is."""
    best = tmp_path / "checkpoints" / "best"

    def at(step: int, progress: dict) -> None:
        file = tmp_path / "checkpoints" / str(step) / "progress" / "metadata"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(progress))

    with pytest.raises(UserError, match="no such folder"):
        locate(best, "--checkpoint", weights=True)
    at(7, {"step": 7})
    with pytest.raises(UserError, match=f"--checkpoint={best}: no step is known as the best; train with data.eval"):
        locate(best, "--checkpoint", weights=True)
    at(9, {"best_step": 8})
    with pytest.raises(UserError, match=f"--checkpoint={best}: the checkpoint of the best step, 8, is gone"):
        locate(best, "--checkpoint", weights=True)
    at(8, {"best_step": 8})
    assert locate(best, "--checkpoint", weights=True) == tmp_path / "checkpoints" / "8"
    (tmp_path / "checkpoints" / "9" / "progress" / "metadata").write_text("{")
    with pytest.raises(UserError, match="missing or damaged"):
        locate(best, "--checkpoint", weights=True)
    best.mkdir()
    assert locate(best, "--checkpoint", weights=True) == best


def test_adapters_name_the_step_that_was_the_best_when_it_was_read(tmp_path, model):
    step = tmp_path / "checkpoints" / "8"
    save_model(step, model)
    (step / "progress").mkdir()
    (step / "progress" / "metadata").write_text(json.dumps({"best_step": 8}))
    abstract = lora.abstract_base(model.params, jnp.float32, quantized=False)
    here = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
    assert load_base(step.with_name("best"), abstract, here)[1] == str(step)


def test_what_a_killed_save_left_is_removed_and_links_are_not_followed(tmp_path, model):
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "run[1].orbax-checkpoint-tmp").symlink_to(victim)
    (tmp_path / "run[1].orbax-checkpoint-tmp-1").mkdir()
    (tmp_path / "run1.orbax-checkpoint-tmp").mkdir()  # of another
    save_model(tmp_path / "run[1]", model)
    assert sorted(os.listdir(tmp_path)) == ["published", "run1.orbax-checkpoint-tmp", "run[1]", "victim"]
    assert not list(victim.iterdir())


@pytest.mark.parametrize("name", [".", "checkpoints/4"])
def test_a_step_that_was_located_is_not_removed_by_another_command(tmp_path, name):
    step = tmp_path / "checkpoints" / "4"
    step.mkdir(parents=True)
    assert str(locate(tmp_path / name, "--checkpoint", weights=True)) == str(step)
    other = os.open(step, os.O_RDONLY)  # as of another process
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_what_is_being_removed_is_no_checkpoint(tmp_path):
    removing = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp.removed"
    removing.mkdir(parents=True)
    for path in (tmp_path, removing):
        with pytest.raises(UserError, match=r"without a finished step|incomplete checkpoint"):
            locate(path, "--checkpoint", weights=True)
    checkpoints, until = TrainingCheckpoints(tmp_path / "checkpoints"), time.monotonic() + 10
    while removing.exists() and time.monotonic() < until:  # Orbax clears it away in the background
        time.sleep(0.01)
    checkpoints.close()
    assert not removing.exists()


@pytest.mark.parametrize("name", ["/gs/bucket", "/s3/x", "/hf/x", "/az/x"])
def test_local_folders_that_are_named_like_buckets(name):
    folder = absolute(name)
    assert str(folder / "a") == f"{name}/a"
    assert not folder.exists()  # without asking a cloud


def test_owners_without_a_name(tmp_path, model, monkeypatch):
    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    save_model(tmp_path / "saved", model)
    assert_same_trees(load_model(tmp_path / "saved").params, model.params)
