"""planning/dry_run.py: what `train --dry-run` says of runs that are not made; test_loop.py compares it with one."""

import dataclasses
import shlex
import shutil

import jax
import pytest

from elbo_kto_jax import train
from elbo_kto_jax.models import registry
from elbo_kto_jax.planning import chips, dry_run
from elbo_kto_jax.reports.dry_run import as_text
from elbo_kto_jax.runtime import lock, recipes
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.training import residuals, setup
from tests import runs
from tests.training.test_pairs import pairs


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory):
    """A model whose weights are damaged."""
    folder = tmp_path_factory.mktemp("dry")
    model = shutil.copytree(tiny_checkpoint, folder / "model")
    (model / "model.safetensors").write_bytes(b"damaged")
    return {
        "model.path": model,
        "data.train": runs.write_jsonl(folder / "train.jsonl", runs.records(6)),
        "data.eval": "",
        "train.eval_every": 0,
    }


@pytest.fixture
def dry(settings, tmp_path):
    """The summary of a dry run with some settings and flags."""

    def run(more=(), **changes) -> dict:
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        found = train.main(runs.flags({**settings, **changes}, f"--workdir={tmp_path / 'run'}", "--dry-run", *more))
        assert not (tmp_path / "run").exists()
        return found

    return run


def test_parts_of_the_memory_add_up(dry):
    found = dry(train__residuals="recompute")["memory"]
    parts = [found[part] for part in ("parameters", "optimizer", "gradients", "residuals", "working")]
    assert found["bytes_per_device"] == pytest.approx(sum(parts), abs=len(parts))
    assert found["optimizer"] == 2 * found["parameters"] == found["gradients"] > 0  # all in float32
    assert (found["base"], found["reference"], found["fits"]) == (0, 0, True)
    assert (found["host_bytes"], found["device_has"]) == (0, found["host_has"] // len(jax.devices()))


def test_an_online_reference_is_held_beside_the_policy(dry):
    online, adapters = (dry(reference__mode="online", lora__rank=rank, mesh__fsdp=1)["memory"] for rank in (0, 2))
    assert online["reference"] == online["parameters"]
    assert (adapters["reference"], adapters["base"]) == (0, online["reference"])  # the tiny recipe's dtypes are one
    assert dry(reference__mode="online", objective__name="sft")["memory"]["reference"] == 0


def test_auto_decides_as_the_run_would_and_the_host_holds_what_waits(dry, monkeypatch):
    for module in (setup, dry_run):
        monkeypatch.setattr(module, "memory_of", lambda _: residuals.Memory(device=1.0, host=1e15, devices=8))
    found = dry(model__remat="full")
    assert found["residuals"] == "host"
    assert found["memory"]["host_bytes"] == 8 * found["micro_batches_per_step"] * found["memory"]["residuals"]
    assert not found["memory"]["fits"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("elbo_dpo", {"pairs": 6, "examples": 12, "desirable": None}),
        ("sft", {"pairs": None, "examples": 12, "desirable": None}),
        ("elbo_kto", {"pairs": None, "examples": 12, "desirable": 6, "undesirable": 6}),
    ],
)
def test_objectives(dry, tmp_path, name, expected):
    found = dry(objective__name=name, data__train=runs.write_jsonl(tmp_path / "pairs.jsonl", pairs(6)))
    assert {key: found[key] for key in expected} == expected
    assert as_text(found)


def test_bad_records_are_refused_or_counted(dry, tmp_path):
    data = runs.write_jsonl(tmp_path / "bad.jsonl", [*runs.records(3), '{"prompt": 1}'])
    with pytest.raises(UserError, match=r"bad\.jsonl:4"):
        dry(data__train=data)
    found = dry(["--skip-bad-records"], data__train=data)
    assert (found["records"], found["data"]["skipped"]) == (3, 1)
    assert "1 bad records skipped" in as_text(found)


def test_trackers_are_checked(settings, tmp_path, monkeypatch):
    def check(names):
        raise UserError(f"{names}: no login")

    monkeypatch.setattr(dry_run.tracking, "check", check)
    with pytest.raises(UserError, match="no login"):
        train.main(runs.flags(settings, f"--workdir={tmp_path}", "--dry-run"))


def test_a_folder_in_use_is_refused_and_left_as_it_is(settings, tmp_path):
    argv = runs.flags(settings, f"--workdir={tmp_path}", "--dry-run")
    with lock.inside(tmp_path, "--workdir"):
        before = (tmp_path / lock.LOCK_FILE).read_bytes()
        with pytest.raises(UserError, match="in use by process"):
            train.main(argv)
        assert (tmp_path / lock.LOCK_FILE).read_bytes() == before
    train.main(argv)
    (tmp_path / lock.LOCK_FILE).write_text("left by a command that was killed")
    train.main(argv)
    (tmp_path / "notes.txt").write_text("no run")
    with pytest.raises(UserError, match="is not the folder of a run"):
        train.main(argv)


@pytest.mark.parametrize("weights", [[], [0.9, 0.1]], ids=["each once", "by weights"])
def test_only_some_steps_of_a_long_run_are_packed(dry, settings, tmp_path, monkeypatch, weights):
    """All of its tokens are counted, of a mixture too, in which an example may be met twice before another."""
    more = runs.write_jsonl(tmp_path / "more.jsonl", runs.records(5, first=6))
    mixture = {"data__train": [str(settings["data.train"]), str(more)], "data__weights": weights, "train__steps": 9}
    whole = dry(**mixture)
    monkeypatch.setattr(dry_run, "_DRAWS", 17)  # two steps of four examples with two draws
    part = dry(**mixture)
    assert (whole["steps_packed"], part["steps_packed"]) == (9, 2)
    assert part["tokens_of_run"] == whole["tokens_of_run"]
    assert "in the first 2" in as_text(part)


def test_the_time_where_the_peak_of_the_devices_is_known(dry, monkeypatch):
    """The gradient takes three passes, the estimates before it one more, and so does the reference."""
    monkeypatch.setattr(dry_run, "peak_flops", lambda _: 1e9)
    found, sft = dry(train__residuals="recompute"), dry(objective__name="sft")
    assert found["seconds"] / sft["seconds"] == pytest.approx(5 / 3)
    assert "assumed: 35% of" in found["seconds_from"]


def test_peaks_are_those_of_the_slices():
    assert chips.peak_flops("TPU v5 lite") == chips.CHIPS["v5e"].flops
    assert chips.peak_flops("TPU v4") == 2 * chips.CHIPS["v4"].flops
    assert chips.peak_flops("cpu") is None


def test_what_is_next_can_be_typed(dry, caplog):
    with caplog.at_level("INFO"):
        found = dry(["--overwrite"])
    run, plan = caplog.messages[-2:]
    assert shlex.split(run)[3] == "elbo_kto_jax.train"
    assert "--dry-run" not in run
    words = shlex.split(plan.rpartition(": ")[2])
    assert words[2] == "launch.plan"
    assert words[-1] == f"--topology={found['slices'][0]}"
    assert all(word.startswith("--config") for word in words[3:-1])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["v4:2x2x2", "v5e:4x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1"]),
        ({"fsdp": 64}, ["v4:2x4x4", "v5e:8x8", "v5p:4x4x4", "v6e:8x8", "tpu7x:2x4x4"]),
        ({"fsdp": 3}, []),
    ],
)
def test_the_smallest_slices_that_hold_a_step(changes, expected):
    config = Config.from_mapping(recipes.load("kto_mix").to_dict())
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **changes))
    assert dry_run.smallest_slices(config, registry.architectures()["llada"].sizes["8b"]) == expected
