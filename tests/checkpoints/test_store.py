"""Checkpoints come back bit by bit, whole or not at all, and never wrong."""

import dataclasses
import gc
import grp
import json
import os
import pwd
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.arrays import ListsSizes, open_array
from elbo_kto_jax.checkpoints.folders import MANIFEST_FILE, absolute, locate
from elbo_kto_jax.checkpoints.load import load_config, load_model, open_source
from elbo_kto_jax.checkpoints.model import Model, Source
from elbo_kto_jax.checkpoints.save import chunk_shape, save_model
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints, TrainingState
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sharding import rules
from tests.published import DTYPES, same_bits, write_published, write_version_1


def assert_same_trees(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(same_bits(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture
def model(tmp_path) -> Model:
    write_published(tmp_path / "published", dtype="bfloat16", bits=True)
    return load_model(tmp_path / "published")


@pytest.fixture
def state(model) -> TrainingState:
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), model.params)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return TrainingState(params, optimizer.init(params), {"step": 7, "note": "é"})


def abstract(state: TrainingState, sharding=None) -> TrainingState:
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    as_struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return TrainingState(jax.tree.map(as_struct, state.params), jax.tree.map(as_struct, state.opt_state), {})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_model_comes_back_bit_by_bit_from_wherever_it_was_moved(tmp_path, dtype):
    write_published(tmp_path / "published", dtype=dtype, bits=True)
    model = load_model(tmp_path / "published")
    save_model(tmp_path / "saved", model)
    shutil.rmtree(tmp_path / "published")
    shutil.move(tmp_path / "saved", tmp_path / "elsewhere" / "moved")
    again = load_model(tmp_path / "elsewhere" / "moved")
    assert_same_trees(again.params, model.params)
    assert again.assets == model.assets
    assert again.assets["tokenizer.json"].endswith(b'\xc3\xa9"}\r\n')
    assert load_config(tmp_path / "elsewhere" / "moved") == (model.config, model.assets)


def test_a_saved_model_is_loaded_in_another_dtype_and_sharding(tmp_path, model, cpu_devices):
    save_model(tmp_path / "saved", model)
    mesh = jax.make_mesh((8,), ("fsdp",), devices=cpu_devices)
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "fsdp")), model.params)
    again = load_model(tmp_path / "saved", param_dtype=jnp.float32, shardings=shardings)
    assert_same_trees(again.params, jax.tree.map(lambda x: x.astype(jnp.float32), model.params))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, again.params, shardings))


def test_the_tokenizer_survives(golden_dir, tmp_path):
    model = load_model(golden_dir / "policy")
    save_model(tmp_path / "saved", model)
    tokenizer = load_model(tmp_path / "saved").tokenizer()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Grüß dich"}], tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert text.count("<|start_header_id|>") == 2
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.convert_tokens_to_ids("<|start_header_id|>")) == 2


def test_a_missing_or_damaged_tokenizer_is_refused_with_its_checkpoint(model):
    with pytest.raises(UserError, match="published"):
        model.tokenizer()
    with pytest.raises(UserError, match="here: no tokenizer"):
        build_tokenizer({}, "here")


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


def test_a_model_is_saved_and_read_in_pieces(tmp_path, model, state, monkeypatch):
    """None is more than a few rows of one published tensor, from a conversion and from a step of training."""
    monkeypatch.setattr(names, "ROWS", 5)
    source, sizes = Source.of(model), []

    def read(path, index, buffers):
        sizes.append(source.read(path, index, None).shape)
        return source.read(path, index, None)

    save_model(tmp_path / "saved", dataclasses.replace(source, read=read))
    assert {shape[0] for shape in sizes if len(shape) == 3} == {1}
    assert all(min(shape[-2:]) <= 5 for shape in sizes)
    assert_same_trees(load_model(tmp_path / "saved").params, model.params)
    checkpoints = TrainingCheckpoints(tmp_path / "work" / "checkpoints")
    checkpoints.save(1, state, model.assets)
    checkpoints.close()
    for folder, params in ((tmp_path / "saved", model.params), (tmp_path / "work", state.params)):
        opened = open_source(folder)
        buffers = opened.buffers(1, published=True)
        for name, tensor in names.published_tensors(opened.config).items():
            pieces = [piece.copy() for piece in opened.published_pieces(tensor, buffers)]
            assert all(len(piece) <= 5 for piece in pieces)
            leaf = np.asarray(names.get(params, tensor.path))
            leaf = leaf if tensor.layer is None else leaf[tensor.layer]
            assert same_bits(np.concatenate(pieces), leaf.T if tensor.transposed else leaf), name


def test_arrays_are_stored_layer_by_layer(tmp_path, model, cpu_devices):
    """In a step of training each device's part of it; in a converted model in chunks that no mesh need share."""
    sharding = NamedSharding(jax.make_mesh((4, 2), ("x", "y"), devices=cpu_devices), PartitionSpec(None, "x", "y"))
    kernel = jax.device_put(jnp.zeros((3, 2048, 1024)), sharding)
    checkpoints = TrainingCheckpoints(tmp_path / "checkpoints")
    checkpoints.save(1, TrainingState({"kernel": kernel}, {"n": jnp.zeros(1)}, {}), model.assets)
    checkpoints.close()
    array = open_array(locate(tmp_path, "", True) / "params", ("kernel",))
    assert array.chunk_layout.read_chunk.shape == (1, 512, 512)
    big = {("blocks", "ff_proj", "kernel"): (1, 64, 4096), ("blocks", "ff_out", "kernel"): (1, 4096, 64)}
    for path, chunk in big.items():
        axes = rules.axes_of("/".join(path), model.config)
        assert chunk_shape(axes, (32, 4096, 12288) if chunk[1] == 64 else (32, 12288, 4096)) == chunk


def test_a_save_that_fails_leaves_nothing_that_loads(tmp_path, model, monkeypatch):
    def fail(self, directory):
        raise OSError("disk full")

    monkeypatch.setattr(ListsSizes, "finalize", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path / "saved", model)
    assert not (tmp_path / "saved").exists()
    for left in tmp_path.glob("saved*"):
        with pytest.raises(UserError):
            load_model(left)
    monkeypatch.undo()
    save_model(tmp_path / "saved", model)
    assert_same_trees(load_model(tmp_path / "saved").params, model.params)


def test_a_checkpoint_from_unknown_devices_is_loaded(tmp_path, model, state):
    checkpoints = TrainingCheckpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, model.assets)
    checkpoints.close()
    file = tmp_path / "checkpoints" / "1" / "params" / "_sharding"  # Orbax's note of where the arrays were
    before = file.read_text()
    assert "cpu:0" in before
    file.write_text(before.replace("cpu:0", "tpu:9"))
    assert_same_trees(load_model(tmp_path).params, state.params)


# Orbax reads arrays concurrently and leaves the failures after the first one unawaited.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["remove", "truncate", "flip"])
def test_a_damaged_file_is_refused_or_harmless(tmp_path, model, damage):
    save_model(tmp_path / "saved", model)
    original = tmp_path / "saved"
    refused = {}
    for file in sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file()):
        copy = tmp_path / "copy"
        shutil.copytree(original, copy)
        content = bytearray((copy / file).read_bytes())
        if damage == "remove" or not content:
            (copy / file).unlink()
        elif damage == "truncate":
            (copy / file).write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 0x55
            (copy / file).write_bytes(content)
        try:
            loaded = load_model(copy)
        except UserError as error:
            refused[str(file)] = str(error)
        else:
            assert_same_trees(loaded.params, model.params)
        shutil.rmtree(copy)
    gc.collect()
    assert all(str(copy) in message and len(message.splitlines()) <= 2 for message in refused.values())
    # What is missing or cut is named itself; what has the wrong content may be named by the tree that it belongs to.
    assert damage == "flip" or all(str(copy / file) in message for file, message in refused.items())
    assert any(file.startswith("params/ocdbt.process_0/d/") for file in refused)  # where the values are
    assert "params/manifest.ocdbt" in refused
    assert damage == "flip" or "assets/config.json" in refused


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, model):
    save_model(tmp_path / "saved", model)
    file = tmp_path / "saved" / "assets" / "config.json"
    original = file.read_text()
    file.write_text(original.replace("500000", "500001"))
    with pytest.raises(UserError, match=r"config\.json: damaged: .* checksum"):
        load_model(tmp_path / "saved")
    manifest = file.with_name(MANIFEST_FILE)  # that of an earlier version, whose assets had no checksums
    write_version_1(manifest, "checksums")
    for key, value, named in (("n_layers", 3, "attn_norm"), ("mlp_hidden_size", 32, "ff_")):
        config = json.loads(model.assets["config.json"]) | {key: value}
        file.write_text(json.dumps(config))
        with pytest.raises(UserError, match=named):
            load_model(tmp_path / "saved")


def test_a_newer_format_is_refused(tmp_path, model):
    save_model(tmp_path / "saved", model)
    file = tmp_path / "saved" / "assets" / MANIFEST_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 3}))
    with pytest.raises(UserError, match="version 3; convert the model again"):
        load_model(tmp_path / "saved")


def test_training_resumes_bit_by_bit_on_another_mesh(tmp_path, model, state, cpu_devices):
    checkpoints = TrainingCheckpoints(tmp_path / "work" / "checkpoints", keep=2)
    assert checkpoints.latest_step() is None
    expected = jax.tree.map(np.array, state)
    for step in (1, 5, 7):
        checkpoints.save(step, state, model.assets)
    # The next training step reuses the memory while the save is still running.
    jax.jit(lambda params: jax.tree.map(lambda x: x * 0, params), donate_argnums=0)(state.params)
    checkpoints.close()
    assert sorted(os.listdir(tmp_path / "work" / "checkpoints")) == ["5", "7"]

    checkpoints = TrainingCheckpoints(tmp_path / "work" / "checkpoints")
    assert checkpoints.latest_step() == 7
    mesh = jax.make_mesh((8,), ("fsdp",), devices=cpu_devices)
    again = checkpoints.restore(7, abstract(state, NamedSharding(mesh, PartitionSpec())))
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
        checkpoints.restore(3, abstract(state))
    assert len(str(caught.value).splitlines()) <= 2
    checkpoints.close()


def test_a_state_of_another_form_is_refused(tmp_path, model, state):
    checkpoints = TrainingCheckpoints(tmp_path / "checkpoints")
    checkpoints.save(7, state, model.assets)
    checkpoints.wait()
    other_optimizer = abstract(state)._replace(opt_state=abstract(state).opt_state[1])
    with pytest.raises(UserError, match="opt_state"):
        checkpoints.restore(7, other_optimizer)
    wider = abstract(state)
    wider.params["ln_f"]["scale"] = jax.ShapeDtypeStruct((17,), jnp.float32)
    with pytest.raises(UserError, match="ln_f/scale"):
        checkpoints.restore(7, wider)
    checkpoints.close()


@pytest.mark.parametrize("content", [None, b"{", b'{"model": {}}'], ids=["absent", "not-json", "not-a-tokenizer"])
def test_unreadable_tokenizer(content):
    assets = {} if content is None else {"tokenizer.json": content}
    with pytest.raises(UserError, match=r"^some/model: .*tokenizer"):
        build_tokenizer(assets, "some/model")


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
        assert_same_trees(checkpoints.restore_latest(abstract(state)).opt_state, state.opt_state)
        checkpoints.close()
    assert_same_trees(load_model(tmp_path / name).params, state.params)


def test_what_a_killed_save_left_is_removed_and_links_are_not_followed(tmp_path, model):
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "run[1].orbax-checkpoint-tmp").symlink_to(victim)
    (tmp_path / "run[1].orbax-checkpoint-tmp-1").mkdir()
    (tmp_path / "run1.orbax-checkpoint-tmp").mkdir()  # of another
    save_model(tmp_path / "run[1]", model)
    assert sorted(os.listdir(tmp_path)) == ["published", "run1.orbax-checkpoint-tmp", "run[1]", "victim"]
    assert not list(victim.iterdir())


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


def test_a_copy_of_a_step_under_another_number_is_refused(tmp_path, model, state):
    steps = tmp_path / "checkpoints"
    checkpoints = TrainingCheckpoints(steps)
    checkpoints.save(7, state, model.assets)
    checkpoints.close()
    shutil.copytree(steps / "7", steps / "9")
    checkpoints = TrainingCheckpoints(steps)
    with pytest.raises(UserError, match=r"checkpoints/9: not step 9[^\n]*\n.*whole is 7: remove .*checkpoints/9"):
        checkpoints.restore_latest(abstract(state))
    checkpoints.close()
