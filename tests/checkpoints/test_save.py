"""Models come back bit by bit, whole or not at all, and never wrong."""

import contextlib
import dataclasses
import gc
import json
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.checkpoints.arrays import ListsSizes, open_array
from elbo_kto_jax.checkpoints.folders import MANIFEST_FILE, locate
from elbo_kto_jax.checkpoints.load import load_config, load_model, open_source
from elbo_kto_jax.checkpoints.model import Source
from elbo_kto_jax.checkpoints.save import chunk_shape, save_model
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints, TrainingState
from elbo_kto_jax.models import axes
from elbo_kto_jax.runtime.errors import UserError
from tests.published import DTYPES, assert_same_trees, same_bits, write_published, write_version_1


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
        names = axes.axes_of("/".join(path), model.config)
        assert chunk_shape(names, (32, 4096, 12288) if chunk[1] == 64 else (32, 12288, 4096)) == chunk


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


def test_an_interrupted_save_waits_for_its_threads(tmp_path, model, monkeypatch):
    """Orbax's threads may go on writing after the signal; nothing of theirs stays, and the interruption is told."""
    folder, ended = tmp_path / "model.orbax-checkpoint-tmp" / "params", threading.Event()

    def goes_on():
        for number in range(40):
            with contextlib.suppress(FileNotFoundError):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / str(number)).write_text("late")
            time.sleep(0.01)
        ended.set()

    def interrupted(*_, **__):
        threading.Thread(target=goes_on, daemon=True).start()
        raise KeyboardInterrupt

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "model", model)
    assert ended.is_set()
    assert not list(tmp_path.glob("model*"))


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
