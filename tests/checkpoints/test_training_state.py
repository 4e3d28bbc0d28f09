"""A step of training comes back bit by bit, whole or not at all."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from elbo_kto_jax.checkpoints.load import load_model
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints
from elbo_kto_jax.runtime.errors import UserError
from tests.published import abstract_state, assert_same_trees


def test_training_resumes_bit_by_bit_on_another_mesh(tmp_path, model, state, cpu_devices):
    checkpoints = TrainingCheckpoints(tmp_path / "work" / "checkpoints")
    assert checkpoints.latest_step() is None
    expected = jax.tree.map(np.array, state)
    for step in (1, 5, 7):
        checkpoints.save(step, state, model.assets)
    # The next training step reuses the memory while the save is still running.
    jax.jit(lambda params: jax.tree.map(lambda x: x * 0, params), donate_argnums=0)(state.params)
    checkpoints.keep_latest(2, besides=0)
    checkpoints.close()
    assert sorted(os.listdir(tmp_path / "work" / "checkpoints")) == ["5", "7"]

    checkpoints = TrainingCheckpoints(tmp_path / "work" / "checkpoints")
    assert checkpoints.latest_step() == 7
    mesh = jax.make_mesh((8,), ("fsdp",), devices=cpu_devices)
    again = checkpoints.restore(7, abstract_state(state, NamedSharding(mesh, PartitionSpec())))
    assert again.progress == state.progress
    assert_same_trees(again.params, expected.params)
    assert_same_trees(again.opt_state, expected.opt_state)
    assert again.params["wte"]["embedding"].sharding.device_set == set(cpu_devices)
    checkpoints.close()


def test_a_step_and_a_workdir_load_as_models(tmp_path, model, state):
    work = tmp_path / "work"
    checkpoints = TrainingCheckpoints(work / "checkpoints")
    work.joinpath("config.json").write_text('{"seed": 0}')  # the workdir's own, which is no architecture
    with pytest.raises(UserError, match="without a finished step"):
        load_model(work)
    checkpoints.save(9, state, model.assets)
    later = state._replace(params=jax.tree.map(lambda x: x + 1, state.params))
    checkpoints.save(10, later, model.assets)
    checkpoints.wait()
    assert_same_trees(load_model(work / "checkpoints" / "9").params, state.params)
    latest = load_model(work)
    assert_same_trees(latest.params, later.params)
    assert latest.assets == model.assets
    assert latest.source == str(work / "checkpoints" / "10")
    checkpoints.close()


def test_an_interrupted_save_is_neither_latest_nor_loaded(tmp_path, model, state):
    steps = tmp_path / "work" / "checkpoints"
    checkpoints = TrainingCheckpoints(steps)
    checkpoints.save(3, state, model.assets)
    checkpoints.close()
    partial = steps / "5.orbax-checkpoint-tmp"
    shutil.copytree(steps / "3", partial)
    assert load_model(tmp_path / "work").source == str(steps / "3")
    with pytest.raises(UserError, match="incomplete"):
        load_model(partial)
    checkpoints = TrainingCheckpoints(steps)
    assert checkpoints.latest_step() == 3
    checkpoints.save(4, state, model.assets)
    checkpoints.close()
    assert sorted(os.listdir(steps)) == ["3", "4"]


@pytest.mark.parametrize("piece", ["params", "opt_state", "progress", "assets", "opt_state/manifest.ocdbt"])
def test_a_missing_piece_of_a_step_is_named(tmp_path, model, state, piece):
    steps = tmp_path / "checkpoints"
    checkpoints = TrainingCheckpoints(steps)
    checkpoints.save(3, state, model.assets)
    checkpoints.wait()
    path = steps / "3" / piece
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=str(steps / "3")) as caught:
        checkpoints.restore(3, abstract_state(state))
    assert len(str(caught.value).splitlines()) <= 2
    checkpoints.close()


def test_a_state_of_another_form_is_refused(tmp_path, model, state):
    checkpoints = TrainingCheckpoints(tmp_path / "checkpoints")
    checkpoints.save(7, state, model.assets)
    checkpoints.wait()
    other_optimizer = abstract_state(state)._replace(opt_state=abstract_state(state).opt_state[1])
    with pytest.raises(UserError, match="opt_state"):
        checkpoints.restore(7, other_optimizer)
    wider = abstract_state(state)
    wider.params["ln_f"]["scale"] = jax.ShapeDtypeStruct((17,), jnp.float32)
    with pytest.raises(UserError, match="ln_f/scale"):
        checkpoints.restore(7, wider)
    checkpoints.close()


def test_a_copy_of_a_step_under_another_number_is_refused(tmp_path, model, state):
    steps = tmp_path / "checkpoints"
    checkpoints = TrainingCheckpoints(steps)
    checkpoints.save(7, state, model.assets)
    checkpoints.close()
    shutil.copytree(steps / "7", steps / "9")
    checkpoints = TrainingCheckpoints(steps)
    with pytest.raises(UserError, match=r"checkpoints/9: not step 9[^\n]*\n.*whole is 7: remove .*checkpoints/9"):
        checkpoints.restore_latest(abstract_state(state))
    checkpoints.close()


def test_a_checkpoint_from_unknown_devices_is_loaded(tmp_path, model, state):
    checkpoints = TrainingCheckpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, model.assets)
    checkpoints.close()
    file = tmp_path / "checkpoints" / "1" / "params" / "_sharding"  # Orbax's note of where the arrays were
    before = file.read_text()
    assert "cpu:0" in before
    file.write_text(before.replace("cpu:0", "tpu:9"))
    assert_same_trees(load_model(tmp_path).params, state.params)
