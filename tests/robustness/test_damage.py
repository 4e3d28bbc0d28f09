"""Damaged, cut, missing and foreign files: named, never trained on, and the newest whole checkpoint is offered."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from elbo_kto_jax import train
from elbo_kto_jax.checkpoints.folders import MANIFEST_FILE
from elbo_kto_jax.checkpoints.load import load_config, load_model
from elbo_kto_jax.checkpoints.model import Model
from elbo_kto_jax.checkpoints.save import save_model
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints, TrainingState
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.training import loop
from tests import runs
from tests.published import read_published, same_bits, write_published, write_version_1
from tests.robustness import kill_driver
from tests.share import WHOLE, share

DAMAGE = ("missing", "empty", "cut", "flipped", "foreign")


def damage(file: Path, kind: str, rng: random.Random, foreign: bytes) -> None:
    content = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "cut":
        file.write_bytes(content[: rng.randrange(len(content))] if content else b"")
    elif kind == "flipped" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif kind == "foreign":
        file.write_bytes(foreign)


def cases(folder: Path, bounded: int, seed: int) -> Iterator[tuple[Path, str, random.Random]]:
    """(file relative to `folder`, kind of damage, random numbers for it): all of them, or a sample."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    every = [(file, kind) for file in files for kind in DAMAGE for _ in range(5 if WHOLE and kind == "flipped" else 1)]
    rng = random.Random(seed)
    for file, kind in every if WHOLE else rng.sample(every, bounded):
        yield file, kind, rng


def same_trees(a, b) -> bool:
    return all(same_bits(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture
def model(tmp_path) -> Model:
    write_published(tmp_path / "published", dtype="bfloat16", bits=False)
    return load_model(tmp_path / "published")


@pytest.fixture
def state(model) -> TrainingState:
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), model.params)
    return TrainingState(params, optax.adamw(1e-3).init(params), {"step": 7, "seconds": 1.5})


def abstract(state: TrainingState) -> TrainingState:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    as_struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return TrainingState(jax.tree.map(as_struct, state.params), jax.tree.map(as_struct, state.opt_state), {})


# Orbax reads arrays concurrently and leaves the failures after the first one unawaited.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_step_is_refused_or_exactly_what_was_saved(tmp_path, model, state):
    """Every file of a step, every kind of damage; the other files of the step before are the foreign ones."""
    checkpoints = TrainingCheckpoints(tmp_path / "whole")
    for step, scale in ((3, 0.5), (5, 1.0)):
        params = jax.tree.map(lambda x, scale=scale: x * scale, state.params)
        checkpoints.save(step, TrainingState(params, state.opt_state, {"step": step}), model.assets)
    checkpoints.close()
    refused: list[str] = []
    for file, kind, rng in cases(tmp_path / "whole" / "5", 25, seed=0):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "whole", copy)
        other = copy / "3" / file
        damage(copy / "5" / file, kind, rng, other.read_bytes() if other.is_file() else b"foreign")
        checkpoints = TrainingCheckpoints(copy)
        try:
            restored = checkpoints.restore_latest(abstract(state))
        except UserError as error:
            refused.append(str(error))
        else:
            assert restored.progress == {"step": 5}, (file, kind)
            assert same_trees((restored.params, restored.opt_state), (state.params, state.opt_state)), (file, kind)
        checkpoints.close()
        shutil.rmtree(copy)
    assert len(refused) > 12
    offer = f"The newest step that is whole is 3: remove {copy / '5'}, and the same command goes on from it"
    assert all(str(copy / "5") in message and message.split("\n")[1:] == [offer] for message in refused)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_flipped_bit_of_a_value_is_found_in_whatever_dtype_it_is_wanted(tmp_path, model, dtype):
    save_model(tmp_path / "saved", model)
    values = max((tmp_path / "saved" / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(values.read_bytes())
    content[len(content) // 2] ^= 1
    values.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        load_model(tmp_path / "saved", param_dtype=dtype)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_all_steps_damaged(tmp_path, model, state):
    checkpoints = TrainingCheckpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, state._replace(progress={"step": step}), model.assets)
    checkpoints.wait()
    for step in (3, 2):
        (tmp_path / str(step) / "progress" / "metadata").write_text('{"step": 8, "seconds": 1.5}')
    with pytest.raises(UserError, match=f"whole is 1: remove {tmp_path / '3'}, {tmp_path / '2'}, and"):
        checkpoints.restore_latest(abstract(state))
    (tmp_path / "1" / "assets" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"remove {tmp_path} to start again"):
        checkpoints.restore_latest(abstract(state))
    checkpoints.close()


def test_a_checkpoint_of_an_earlier_version_has_no_checksums_and_is_read(tmp_path, model, state):
    checkpoints = TrainingCheckpoints(tmp_path)
    checkpoints.save(7, state, model.assets)
    checkpoints.wait()
    file = tmp_path / "7" / "assets" / MANIFEST_FILE
    write_version_1(file, "checksums", "progress")
    assert checkpoints.restore_latest(abstract(state)).progress == state.progress
    checkpoints.close()


# ---- published checkpoints ----


def test_a_damaged_header_of_safetensors_is_refused_or_harmless(tmp_path):
    """The header is where names, types, shapes and places of the tensors are; the values carry no checksum."""
    tensors = write_published(tmp_path / "whole", shards=1)
    file = tmp_path / "whole" / "model.safetensors"
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    rng, refused, number = random.Random(0), 0, share(60, 4000)
    for _ in range(number):
        changed = bytearray(content)
        changed[rng.randrange(length)] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        try:
            load_model(tmp_path / "whole")
        except UserError as error:
            refused += str(tmp_path / "whole") in str(error)
        else:
            number -= 1
            found = read_published(tmp_path / "whole")
            assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    assert refused == number > share(30, 2000)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", ""])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, name):
    write_published(tmp_path / "folder", shards=2)
    file = tmp_path / "folder" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    moved = next(iter(index["weight_map"]))
    index["weight_map"][moved] = name
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: .* is not the name of a file in this folder"):
        load_model(tmp_path / "folder")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", ""])
def test_assets_outside_of_the_checkpoint_are_refused(tmp_path, model, name):
    (tmp_path / "outside").write_text("secret")
    save_model(tmp_path / "saved", model)
    file = tmp_path / "saved" / "assets" / MANIFEST_FILE
    write_version_1(file, "checksums")
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "assets": [*manifest["assets"], name]}))
    with pytest.raises(UserError, match="damaged"):
        load_config(tmp_path / "saved")


# ---- working folders ----


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory) -> tuple[Path, list[str]]:
    """A finished run and the settings that made it."""
    folder = tmp_path_factory.mktemp("damage")
    settings = {
        "model.path": tiny_checkpoint,
        "data.train": runs.write_jsonl(folder / "train.jsonl", runs.records(6)),
        "train.steps": 2,
        "train.checkpoint_every": 1,
        "train.samples": 1,
    }
    train.main(runs.flags(settings, f"--workdir={folder / 'run'}"))
    return folder / "run", runs.flags(settings)


# Orbax reads arrays concurrently and leaves the failures after the first one unawaited.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_working_folder_is_refused_or_gives_the_same(run, tmp_path, monkeypatch):
    """No step is taken in any case: the run is finished, and what is damaged is not trained on."""
    whole, argv = run
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: pytest.fail("a step was taken"))
    before = load_model(whole / "checkpoints" / "2").params
    refused: dict[tuple[Path, str], str] = {}
    for file, kind, rng in cases(whole, 10, seed=1):
        if kind == "missing" and file.parts[0] == "config.json":
            continue  # that is no run any more, test_user_errors.py
        workdir = tmp_path / "copy"
        shutil.copytree(whole, workdir)
        damage(workdir / file, kind, rng, b'{"foreign": 1}')
        try:
            train.main([*argv, f"--workdir={workdir}"])
        except UserError as error:
            refused[file, kind] = str(error)
        else:
            assert file.parts[:2] != ("checkpoints", "2") or same_trees(load_model(workdir).params, before)
            assert kill_driver.cached(workdir) == kill_driver.cached(whole)
        shutil.rmtree(workdir)
    assert any(file.parts[0] == "checkpoints" for file, _ in refused)
    assert all(str(workdir) in message and len(message.split("\n")) <= 2 for message in refused.values())


@pytest.mark.parametrize("kind", ["cut", "flipped", "foreign values", "renamed"])
def test_a_damaged_reference_cache_is_named(run, tmp_path, kind):
    workdir = Path(shutil.copytree(run[0], tmp_path / "copy"))
    part, *_ = sorted((workdir / "reference").glob("*/steps-*.npy"))
    values = np.load(part)
    if kind == "cut":
        part.write_bytes(part.read_bytes()[:-4])
    elif kind == "flipped":
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes(content)
    elif kind == "foreign values":  # the right shape and dtype, of another model
        np.save(part, values + 1)
    else:  # to other steps
        word, first, last, checksum = part.name.split("-")
        part = part.rename(part.with_name(f"{word}-{int(first) + 1:08d}-{int(last) + 1:08d}-{checksum}"))
    with pytest.raises(UserError, match="damaged part of the reference cache") as refused:
        train.main([*run[1], f"--workdir={workdir}"])
    assert str(part) in str(refused.value)
    part.unlink()
    if kind == "renamed":
        assert train.main([*run[1], f"--workdir={workdir}"])["steps"] == 2
        assert kill_driver.cached(workdir) == kill_driver.cached(run[0])


def test_an_old_or_damaged_description_of_another_cache_does_no_harm(run, tmp_path, caplog):
    workdir = Path(shutil.copytree(run[0], tmp_path / "copy"))
    for name, text in (("a", "{"), ("b", "[1]"), ("c", '{"seed": 1}')):
        folder = workdir / "reference" / name
        folder.mkdir()
        (folder / "fingerprint.json").write_text(text)
    caplog.set_level("INFO")
    assert train.main([*run[1], f"--workdir={workdir}"])["steps"] == 2
    assert caplog.text.count("its description is damaged") == 2


def test_damaged_metrics_are_counted_out_and_told(run, tmp_path, caplog):
    workdir = Path(shutil.copytree(run[0], tmp_path / "copy"))
    first, second = (workdir / "metrics.jsonl").read_bytes().splitlines()
    (workdir / "metrics.jsonl").write_bytes(first[:20] + b"\xff\n" + second + b"\n" + b'{"step"')
    assert train.main([*run[1], f"--workdir={workdir}"])["steps"] == 2
    assert "metrics.jsonl:1: damaged line" in caplog.text
    assert "metrics.jsonl:3" not in caplog.text  # a crash may cut the last one


@pytest.mark.parametrize("content", ["{", "[]", '{"config": 5}', '{"config": null}', "\xff"])
def test_a_damaged_config_of_a_run(run, tmp_path, content):
    workdir = Path(shutil.copytree(run[0], tmp_path / "copy"))
    (workdir / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        train.main([*run[1], f"--workdir={workdir}"])


def test_what_a_kill_leaves_in_a_new_folder_does_not_make_it_foreign(run, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / ".config.json.123.tmp").write_text("{")
    assert train.main([*run[1], f"--workdir={workdir}"])["steps"] == 2
    assert not list(workdir.rglob("*.tmp"))


def test_a_kill_while_an_old_run_is_deleted_leaves_it_known_as_a_run(run, tmp_path, monkeypatch):
    workdir = Path(shutil.copytree(run[0], tmp_path / "copy"))

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main([*run[1], f"--workdir={workdir}", "--overwrite"])
    assert train.main([*run[1], f"--workdir={workdir}", "--overwrite"])["steps"] == 2
