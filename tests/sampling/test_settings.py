"""The settings that commands take where the user names no config."""

import json
import shutil

import pytest

from elbo_kto_jax import api, evaluate, generate, score
from elbo_kto_jax.runtime import recipes
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling.settings import settings_of


def write_config(folder, tree) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps({"config": tree, "versions": {}}))


@pytest.fixture
def run(tmp_path, tiny_checkpoint):
    """The working folder of a run with settings of its own, on a machine of 512 devices, and a model inside it."""
    tree = recipes.load("tiny").to_dict()
    tree["sampler"] |= {"gen_length": 10, "steps": 10, "block_length": 5}
    tree["mesh"] = {"data": 512, "fsdp": 1, "tensor": 1}
    del tree["judge"]  # of an earlier version
    write_config(tmp_path / "run", tree)
    shutil.copytree(tiny_checkpoint, tmp_path / "run" / "exported" / "model")
    return tmp_path / "run"


@pytest.mark.parametrize("inside", ["", "checkpoints/40", "checkpoints/best", "exported/model"])
def test_a_run_has_its_own_settings(run, inside):
    (run / "checkpoints" / "40").mkdir(parents=True)
    found = settings_of(str(run / inside), "--checkpoint")
    assert (found["sampler"]["gen_length"], found["sampler"]["block_length"]) == (10, 5)
    assert (found["seed"], found["data"]["append_eot"], found["judge"]["name"]) == (0, True, "verifiable")
    assert found["mesh"] == {"data": 1, "fsdp": -1, "tensor": 1}  # of whatever machine this is


@pytest.mark.parametrize("parse", [generate, evaluate], ids=lambda module: module.__name__)
def test_commands_take_them_and_flags_come_on_top(run, parse):
    needed = ["--prompt=x"] if parse is generate else ["--out=o"]
    flags, config = parse._parser().parse([f"--checkpoint={run / 'exported' / 'model'}", *needed])
    assert (config.sampler.gen_length, config.sampler.temperature) == (10, 1.0)
    words = [f"--checkpoint={flags.checkpoint}", *needed, "--config.sampler.temperature=0"]
    assert parse._parser().parse(words)[1].sampler.temperature == 0
    given = parse._parser().parse([f"--checkpoint={flags.checkpoint}", *needed, "--config=kto_mix"])[1]
    assert given.sampler.gen_length == 256


def test_score_takes_them_too(run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(score, "score_records", lambda _, config: seen.append(config) or [{"elbo": -1.0}])
    score.main([f"--checkpoint={run / 'exported' / 'model'}", "--data=d.jsonl", f"--out={tmp_path / 'o'}"])
    assert (seen[0].estimator.scheme, seen[0].data.append_eot) == ("stratified", True)


def test_a_model_without_a_run_gets_lengths_that_it_takes(tiny_checkpoint):
    model = api.load(tiny_checkpoint)
    longest, sampler = model.checkpoint.model.config.max_sequence_length, model.config.sampler
    assert 0 < sampler.gen_length <= longest // 2
    assert sampler.block_length <= sampler.gen_length == sampler.steps
    assert model.config.data.max_length <= longest
    assert model.config.sampler.remasking == "low_confidence"


def test_each_architecture_has_its_recipe(golden_dir):
    folder = golden_dir.parent / "golden-dream" / "policy"
    if not folder.is_dir():
        pytest.skip("no golden values of Dream")
    found = settings_of(str(folder), "--checkpoint")
    assert found["model"]["path"] == recipes.load("dream_kto_mix").model.path
    assert found["sampler"]["block_length"] == found["sampler"]["gen_length"]


def test_what_is_wrong_with_a_run_is_named(run, tiny_checkpoint, tmp_path):
    tree = json.loads((run / "config.json").read_text())["config"]
    write_config(run, {**tree, "seed": "one"})
    with pytest.raises(UserError, match=r"run/config\.json: config\.seed: expected int.*pass a --config"):
        settings_of(str(run / "exported"), "--checkpoint")
    write_config(run, {**tree, "sweep": {}})  # the folder of a sweep is no run
    assert settings_of(str(run / "exported" / "model"), "--checkpoint")["sampler"]["gen_length"] != 10
    with pytest.raises(UserError, match="--checkpoint: missing"):
        generate.main(["--prompt=x"])
    with pytest.raises(UserError, match="--checkpoint=nowhere: no such folder"):
        generate.main(["--prompt=x", "--checkpoint=nowhere"])
