"""Published folders are read exactly, lazily, and refused with the name of what is wrong with them."""

import json
from pathlib import Path

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from jax.sharding import NamedSharding, PartitionSpec

from elbo_kto_jax import from_hf, to_hf
from elbo_kto_jax.checkpoints import huggingface, names
from elbo_kto_jax.checkpoints.assets import read_assets, with_dtype
from elbo_kto_jax.checkpoints.load import load_config, load_model
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.registry import read_config
from elbo_kto_jax.runtime.errors import UserError
from tests.published import CONFIG, DTYPES, read_published, same_bits, write_published, write_version_1

Q_PROJ = "model.transformer.blocks.1.q_proj.weight"


ENDS = {
    "wte": ("wte", "embedding"),
    "embed_tokens": ("wte", "embedding"),
    "ln_f": ("ln_f", "scale"),
    "norm": ("ln_f", "scale"),
    "ff_out": ("head", "kernel"),
    "lm_head": ("head", "kernel"),
}
KINDS = {  # what transformers' Llama calls a matrix or a norm of a layer, where LLaDA has another name
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "o_proj": "attn_out",
    "gate_proj": "ff_proj",
    "down_proj": "ff_out",
}


def assert_holds(params: dict, tensors: dict[str, np.ndarray], config: ModelConfig) -> None:
    """Every published tensor is where the contract of the parameter tree says, by rules written out here."""
    for name, tensor in tensors.items():
        *before, kind, what = name.split(".")
        layer = next((int(part) for part in before if part.isdecimal()), None)
        if layer is None:
            path = ENDS[kind]
        else:
            kind = KINDS.get(kind, kind)
            leaf = "bias" if what == "bias" else "scale" if kind.endswith("norm") else "kernel"
            path = ("blocks", kind, leaf)
        leaf = np.asarray(names.get(params, path))
        mine = leaf if layer is None else leaf[layer]
        assert same_bits(mine, tensor.T if path[-1] == "kernel" else tensor), name
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(tensor.size for tensor in tensors.values())


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_golden_checkpoint_is_read_exactly(golden, which):
    model = load_model(golden.folder / which)
    assert_holds(model.params, read_published(golden.folder / which), model.config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_stored_dtype_is_read_bit_by_bit(tmp_path, dtype, shards):
    tensors = write_published(tmp_path, dtype=dtype, shards=shards, bits=True)
    model = load_model(tmp_path)
    assert_holds(model.params, tensors, model.config)


def test_param_dtype_rounds_to_nearest_even(tmp_path):
    tensors = write_published(tmp_path, dtype="float32")
    model = load_model(tmp_path, param_dtype="bfloat16")
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    assert_holds(model.params, rounded, model.config)


def test_a_sharded_read_reads_every_element_once(tmp_path, cpu_devices, monkeypatch):
    tensors = write_published(tmp_path)
    read_elements = []

    class Spy(huggingface.HuggingFaceFolder):
        def read(self, name, index, buffers=None):
            part = super().read(name, index, buffers)
            read_elements.append(part.size)
            return part

    monkeypatch.setattr(huggingface, "HuggingFaceFolder", Spy)
    mesh = jax.make_mesh((8,), ("fsdp",), devices=cpu_devices)
    leaves = registry.parameters(read_config(CONFIG, "test"))
    # The last axis of every leaf but the head's (48 rows of the embedding) is divisible by eight, and so is that.
    shardings = names.unflatten(
        {
            path: NamedSharding(mesh, PartitionSpec(*[None] * (len(leaf.shape) - 1), "fsdp"))
            for path, leaf in leaves.items()
        }
    )
    model = load_model(tmp_path, shardings=shardings)
    assert sum(read_elements) == sum(tensor.size for tensor in tensors.values())
    assert model.params["blocks"]["k_proj"]["kernel"].addressable_shards[0].data.shape == (2, 16, 1)
    assert_holds(model.params, tensors, model.config)


def refused(path, **kwargs) -> str:
    """The message with which loading `path` is refused: at most two lines."""
    with pytest.raises(UserError) as caught:
        load_model(path, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2, message
    return message


def test_a_missing_shard_is_named_with_a_tensor_of_it(tmp_path):
    write_published(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = refused(tmp_path)
    assert "model-00002-of-00003.safetensors" in message
    assert "model.transformer." in message


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_shard_is_named(tmp_path, keep):
    write_published(tmp_path)
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in refused(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: tensors.pop(Q_PROJ), ["missing"]),
        (lambda tensors: tensors.update({"model.transformer.rotary.inv_freq": np.ones(2, np.float32)}), ["inv_freq"]),
        (lambda tensors: tensors.update({Q_PROJ: np.ones((16, 8), np.float32)}), ["(16, 16)", "(16, 8)"]),
        (lambda tensors: tensors.update({Q_PROJ: np.ones((16, 16), np.int8)}), ["I8"]),
        (lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(np.float16)}), ["float16", "float32"]),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, edit, words, shards):
    write_published(tmp_path, edit=edit, shards=shards)
    message = refused(tmp_path)
    assert all(word in message for word in words), message
    assert "inv_freq" in words or Q_PROJ in message


def test_layers_of_different_dtypes_load_where_one_is_asked_for(tmp_path):
    write_published(tmp_path, edit=lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(np.float16)}))
    model = load_model(tmp_path, param_dtype=np.float32)
    assert model.params["blocks"]["q_proj"]["kernel"].dtype == np.float32


def test_a_tensor_that_the_index_puts_elsewhere_is_named(tmp_path):
    write_published(tmp_path)
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"][Q_PROJ] = "model-00001-of-00002.safetensors"
    index_file.write_text(json.dumps(index))
    message = refused(tmp_path)
    assert Q_PROJ in message
    assert "model-00001-of-00002.safetensors" in message


@pytest.mark.parametrize("content", ["", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"metadata": {}}'])
def test_a_damaged_index_is_named(tmp_path, content):
    write_published(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_config_is_named_before_weights_are_looked_at(tmp_path, content):
    write_published(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "config.json").write_text(content)
    assert str(tmp_path / "config.json") in refused(tmp_path)
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(tmp_path)


def test_weights_in_pytorch_files_are_refused_by_name(tmp_path):
    write_published(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    assert "safetensors" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "PyTorch .bin" in refused(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_value_too_large_for_float16_is_refused(tmp_path, dtype):
    def edit(tensors):
        tensors[Q_PROJ][2, 3] = 1e6

    write_published(tmp_path, dtype=dtype, edit=edit)
    assert Q_PROJ in refused(tmp_path, param_dtype="float16")


def test_no_such_folder(tmp_path):
    message = refused(tmp_path / "nowhere", flag="--source")
    assert "--source" in message
    assert "nowhere" in message
    file = tmp_path / "file.safetensors"
    file.touch()
    assert str(file) in refused(file)
    assert str(tmp_path) in refused(tmp_path)  # an empty folder


def test_a_hub_id_that_cannot_be_had_says_what_to_download(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("offline\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refused("GSAI-ML/LLaDA-8B-Instruct", flag="--config.model.path")
    assert "hf download GSAI-ML/LLaDA-8B-Instruct --local-dir" in message
    assert "--config.model.path" in message


def test_a_hub_id_is_loaded_from_its_snapshot(monkeypatch, tmp_path):
    tensors = write_published(tmp_path / "snapshot")
    asked = []

    def snapshot(hub_id, revision, allow_patterns):
        asked.append((hub_id, "*.safetensors" in allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    config, _ = load_config("somebody/LLaDA-tiny")
    model = load_model("somebody/LLaDA-tiny")
    assert asked == [("somebody/LLaDA-tiny", False), ("somebody/LLaDA-tiny", True)]  # a config needs no weights
    assert model.config == config
    assert_holds(model.params, tensors, config)


@pytest.mark.parametrize("name", ["x" * 100_000, "\x1b[31mred", "a\nb"])
def test_names_from_files_are_shown_short_and_printable(tmp_path, name):
    write_published(tmp_path, shards=1, edit=lambda tensors: tensors.update({name: np.ones(2, np.float32)}))
    message = refused(tmp_path)
    assert "is not a tensor of the model" in message
    assert message.isprintable()
    assert len(message) < 1000
    write_published(tmp_path / "other")
    index_file = tmp_path / "other" / "model.safetensors.index.json"
    for weight_map in ({name: "model-00001-of-00002.safetensors"}, {"a": f"{name}/b"}, {name: "nowhere.safetensors"}):
        index_file.write_text(json.dumps({"weight_map": weight_map}))
        message = refused(tmp_path / "other")
        assert message.isprintable()
        assert len(message) < 1000


# ---- links ----


def foreign_file(folder: Path) -> Path:
    folder.mkdir()
    (folder / "passwd").write_text("root:x:0:0:root")
    return folder / "passwd"


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "config.json", "modeling_llada.py"])
@pytest.mark.parametrize("through", ["file", "relative", "chain", "folder"])
def test_a_link_out_of_the_folder_is_neither_read_nor_published(tmp_path, name, through):
    target, folder = foreign_file(tmp_path / "etc"), tmp_path / "model"
    write_published(folder)
    (folder / name).unlink(missing_ok=True)
    if through == "chain":
        (folder / "inner").symlink_to(target)
        target = folder / "inner"
    elif through == "folder":
        (folder / "inner").symlink_to(target.parent)
        target = folder / "inner" / target.name
    (folder / name).symlink_to(f"../etc/{target.name}" if through == "relative" else target)
    message = refused(folder)
    assert str(folder / name) in message
    assert "outside of the checkpoint" in message
    assert "root:" not in message
    with pytest.raises(UserError, match="outside"):
        from_hf.main([f"--source={folder}", f"--out={tmp_path / 'ours'}"])
    with pytest.raises(UserError, match="outside"):
        to_hf.main([f"--source={folder}", f"--out={tmp_path / 'theirs'}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["etc", "model"]


def test_a_link_among_the_assets_of_our_form_is_not_followed(tmp_path):
    """Nor where the manifest is of a version that had no checksums."""
    target = foreign_file(tmp_path / "etc")
    write_published(tmp_path / "model")
    from_hf.main([f"--source={tmp_path / 'model'}", f"--out={tmp_path / 'ours'}"])
    assets = tmp_path / "ours" / "assets"
    (assets / "tokenizer.json").unlink()
    (assets / "tokenizer.json").symlink_to(target)
    for missing in ((), ("checksums",)):
        write_version_1(assets / "manifest.json", *missing)
        assert "outside of the checkpoint" in refused(tmp_path / "ours")


def test_links_within_a_folder_to_a_folder_and_of_the_hubs_cache_are_read(tmp_path):
    write_published(tmp_path / "plain")
    expected = read_assets(tmp_path / "plain")
    (tmp_path / "plain" / "template.txt").write_text("{{ messages }}")
    (tmp_path / "plain" / "chat_template.jinja").symlink_to("template.txt")
    (tmp_path / "link").symlink_to("plain")
    assert read_assets(tmp_path / "link") == expected | {"chat_template.jinja": b"{{ messages }}"}
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        (cache / "blobs" / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert read_assets(snapshot) == read_assets(tmp_path / "plain")
    load_model(snapshot)
    (cache / "blobs" / "0").unlink()  # chat_template.jinja's
    (cache / "blobs" / "0").symlink_to(foreign_file(tmp_path / "etc"))
    assert "outside of the checkpoint" in refused(snapshot)


# ---- config.json says what the tensors are ----


@pytest.mark.parametrize(
    ("said", "dtypes", "expected"),
    [
        ({}, ["float32"], {}),
        ({"torch_dtype": None}, ["float32"], {"torch_dtype": None}),
        ({"torch_dtype": "bfloat16"}, ["float32"], {"torch_dtype": "float32"}),
        ({"dtype": "float32"}, ["bfloat16"], {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32", "dtype": "bfloat16"}, ["float16"], {"torch_dtype": "float16", "dtype": "float16"}),
        ({"torch_dtype": "torch.float32"}, ["float32"], {"torch_dtype": "torch.float32"}),
        ({"torch_dtype": "float32"}, ["float32", "bfloat16", "bfloat16"], {"torch_dtype": "float32"}),
        ({"torch_dtype": "float32"}, ["float32", *["bfloat16"] * 3], {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": ["x"]}, ["float32"], {"torch_dtype": "float32"}),
    ],
)
def test_config_json_names_the_dtype_of_the_tensors(said, dtypes, expected):
    assets = {"config.json": json.dumps(CONFIG | said).encode(), "tokenizer.json": b"{}"}
    tensors = {str(i): jax.ShapeDtypeStruct((4,), dtype) for i, dtype in enumerate(dtypes)}
    found = with_dtype(assets, tensors)
    assert json.loads(found["config.json"]) == CONFIG | expected
    assert list(json.loads(found["config.json"])) == [*CONFIG, *said]
    assert found == assets or expected != said
