"""Folders of the architectures beside LLaDA: there and back bit by bit, tied heads, and tensors that do not fit."""

import json
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest

from elbo_kto_jax import from_hf, to_hf, verify
from elbo_kto_jax.checkpoints import huggingface, names, random_folder
from elbo_kto_jax.checkpoints.load import load_model, manifest_digest, open_source
from elbo_kto_jax.checkpoints.tiny import write_untrained
from elbo_kto_jax.models import registry
from elbo_kto_jax.runtime.errors import UserError
from launch import random_llada
from tests import families
from tests.families import FAMILIES
from tests.published import read_published, same_bits

TIED = ("illada", "a2d_qwen3")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def refusal(call, *arguments) -> str:
    """The message, which has at most two lines."""
    with pytest.raises(UserError) as refused:
        call(*arguments)
    assert str(refused.value).count("\n") <= 1
    return str(refused.value)


# ---- conversion ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_bit_by_bit(tmp_path, monkeypatch, family, dtype):
    """In pieces of seven rows, which no dimension is a multiple of."""
    monkeypatch.setattr(names, "ROWS", 7)
    tensors = families.write(tmp_path / "source", family, dtype=dtype, changes={"dtype": dtype, "torch_dtype": dtype})
    from_hf.main([f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'ours'}"])
    to_hf.main([f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}", "--shard-size=2KB"])
    found = read_published(tmp_path / "theirs")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensors[name]) for name in tensors)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    for folder in ("source", "theirs"):
        verified = verify.main([f"--source={tmp_path / folder}", f"--checkpoint={tmp_path / 'ours'}"])
        assert verified == {"tensors": len(tensors), "equal": True, "different": 0}
    assert (tmp_path / "theirs" / "config.json").read_bytes() == (tmp_path / "source" / "config.json").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_lands_where_the_published_network_has_it(tmp_path, family):
    tensors = families.write(tmp_path, family)
    params = load_model(tmp_path).params
    layer = "model.layers.1.self_attn."
    np.testing.assert_array_equal(params["wte"]["embedding"], tensors[EMBEDDING])
    np.testing.assert_array_equal(params["blocks"]["q_proj"]["kernel"][1], tensors[f"{layer}q_proj.weight"].T)
    np.testing.assert_array_equal(params["blocks"]["attn_out"]["kernel"][1], tensors[f"{layer}o_proj.weight"].T)
    for ours, theirs in {"ff_proj": "gate", "up_proj": "up", "ff_out": "down"}.items():
        expected = tensors[f"model.layers.1.mlp.{theirs}_proj.weight"].T
        np.testing.assert_array_equal(params["blocks"][ours]["kernel"][1], expected)
    if family == "dream":
        np.testing.assert_array_equal(params["blocks"]["k_proj"]["bias"][1], tensors[f"{layer}k_proj.bias"])
        np.testing.assert_array_equal(params["head"]["kernel"], tensors[HEAD].T)
    if family == "a2d_qwen3":
        np.testing.assert_array_equal(params["blocks"]["q_norm"]["scale"][1], tensors[f"{layer}q_norm.weight"])
    assert ("head" in params) == (family == "dream")


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_names_the_tensor_that_differs(tmp_path, capsys, family):
    name = "model.layers.1.self_attn." + {"dream": "v_proj.bias", "illada": "v_proj.weight"}.get(
        family, "k_norm.weight"
    )
    families.write(tmp_path / "source", family)
    families.write(
        tmp_path / "other", family, edit=lambda tensors: tensors[name].reshape(-1).__setitem__(3, np.float32(0.25))
    )
    from_hf.main([f"--source={tmp_path / 'other'}", f"--out={tmp_path / 'ours'}"])
    command = [f"--source={tmp_path / 'source'}", f"--checkpoint={tmp_path / 'ours'}"]
    assert "1 of" in refusal(verify.main, command)
    assert f"{name}: 1 of" in capsys.readouterr().err


# ---- a tied head ----


def add_head(tensors, change=lambda head: head) -> None:
    tensors[HEAD] = change(tensors[EMBEDDING].copy())


@pytest.mark.parametrize("family", TIED)
def test_a_head_that_equals_the_embedding_is_accepted_and_published_once(tmp_path, monkeypatch, family):
    """As transformers' save_pretrained does."""
    monkeypatch.setattr(names, "ROWS", 7)
    tensors = families.write(tmp_path / "source", family, edit=add_head)
    assert HEAD in tensors
    summary = from_hf.main([f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'ours'}"])
    assert summary["tensors"] == len(tensors) - 1
    assert verify.main([f"--source={tmp_path / 'source'}", f"--checkpoint={tmp_path / 'ours'}"])["equal"]
    to_hf.main([f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}"])
    found = read_published(tmp_path / "theirs")
    assert found.keys() == tensors.keys() - {HEAD}
    assert same_bits(found[EMBEDDING], tensors[EMBEDDING])
    # One parameter, one digest: with or without the second copy.
    families.write(tmp_path / "once", family)
    from_hf.main([f"--source={tmp_path / 'once'}", f"--out={tmp_path / 'same'}"])
    assert manifest_digest(tmp_path / "same") == manifest_digest(tmp_path / "ours")


CHANGES = {
    "first": lambda head: _with(head, 0),
    "last": lambda head: _with(head, -1),
    "dtype": lambda head: head.astype(ml_dtypes.bfloat16),
}


def _with(head, place):
    head.reshape(-1)[place] = 0.125
    return head


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("change", CHANGES)
def test_a_head_that_differs_from_the_embedding_is_refused(tmp_path, monkeypatch, family, change):
    monkeypatch.setattr(names, "ROWS", 7)
    families.write(tmp_path / "source", family, edit=lambda tensors: add_head(tensors, CHANGES[change]))
    for call in (huggingface.open_folder, load_model, open_source):
        message = refusal(call, tmp_path / "source")
        assert f"tensor {HEAD} differs from {EMBEDDING}" in message
        assert "tie_word_embeddings" in message
    assert "differs" in refusal(from_hf.main, [f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'ours'}"])
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_its_own_is_read_where_the_file_says_so(tmp_path, family):
    tensors = families.write(tmp_path / "source", family, changes={"tie_word_embeddings": False})
    assert not np.array_equal(tensors[HEAD], tensors[EMBEDDING])
    from_hf.main([f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'ours'}"])
    to_hf.main([f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}"])
    found = read_published(tmp_path / "theirs")
    assert all(same_bits(found[name], tensors[name]) for name in tensors)


# ---- tensors that do not fit ----


def rename(old: str, new: str):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


BAD = {
    "embedding missing": (lambda t: t.pop(EMBEDDING), EMBEDDING),
    "norm missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "layer missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
    "one layer too many": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["model.layers.1.mlp.up_proj.weight"]}),
        "model.layers.2.mlp.up_proj.weight",
    ),
    "bias of the output": (
        lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": np.zeros(16, np.float32)}),
        "model.layers.0.self_attn.o_proj.bias",
    ),
    "bias of the MLP": (
        lambda t: t.update({"model.layers.0.mlp.gate_proj.bias": np.zeros(24, np.float32)}),
        "model.layers.0.mlp.gate_proj.bias",
    ),
    "LLaDA's name": (rename("model.norm.weight", "model.transformer.ln_f.weight"), "model.transformer.ln_f.weight"),
    "no prefix": (rename(EMBEDDING, "embed_tokens.weight"), "embed_tokens.weight"),
    "transposed": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].T.copy()}),
        "model.layers.0.mlp.up_proj.weight",
    ),
    "more rows": (lambda t: t.update({EMBEDDING: np.zeros((49, 16), np.float32)}), EMBEDDING),
    "one axis": (lambda t: t.update({EMBEDDING: np.zeros(48 * 16, np.float32)}), EMBEDDING),
    "whole numbers": (lambda t: t.update({"model.norm.weight": np.zeros(16, np.int32)}), "model.norm.weight"),
    "NaN": (
        lambda t: t["model.layers.1.input_layernorm.weight"].__setitem__(3, np.nan),
        "model.layers.1.input_layernorm.weight",
    ),
}
OWN = {
    "illada": {
        "q norm": (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.zeros(4, np.float32)}),
            "model.layers.0.self_attn.q_norm.weight",
        ),
        "head of another shape": (lambda t: t.update({HEAD: np.zeros((47, 16), np.float32)}), HEAD),
    },
    "dream": {
        "no q bias": (
            lambda t: t.pop("model.layers.1.self_attn.q_proj.bias"),
            "model.layers.1.self_attn.q_proj.bias",
        ),
        "no biases": (
            lambda t: [t.pop(name) for name in list(t) if name.endswith("bias")],
            "model.layers.0.self_attn.q_proj.bias",
        ),
        "bias of another shape": (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.bias": np.zeros(16, np.float32)}),
            "model.layers.0.self_attn.k_proj.bias",
        ),
        "no head": (lambda t: t.pop(HEAD), HEAD),
    },
    "a2d_qwen3": {
        "no q norm": (
            lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"),
            "model.layers.1.self_attn.q_norm.weight",
        ),
        "norm over all heads": (
            lambda t: t.update({"model.layers.0.self_attn.k_norm.weight": np.zeros(16, np.float32)}),
            "model.layers.0.self_attn.k_norm.weight",
        ),
        "bias": (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}),
            "model.layers.0.self_attn.q_proj.bias",
        ),
        "head of another shape": (lambda t: t.update({HEAD: np.zeros((47, 16), np.float32)}), HEAD),
    },
}


@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for family in FAMILIES for case in BAD | OWN[family]], ids=str
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, family, case):
    edit, named = (BAD | OWN[family])[case]
    families.write(tmp_path, family, edit=edit)
    message = refusal(load_model, tmp_path)
    assert str(tmp_path) in message
    assert named in message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_another_architecture_is_refused(tmp_path, family):
    """Its config.json was copied from elsewhere."""
    families.write(tmp_path, family)
    for other in set(FAMILIES) - {family}:
        (tmp_path / "config.json").write_text(json.dumps(families.CONFIGS[other]))
        assert "tensor" in refusal(load_model, tmp_path)


# ---- folders that the project makes ----


def small(monkeypatch):
    sizes = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "n_layers": 2, "mlp_hidden_size": 48}
    monkeypatch.setattr(random_folder, "_SMALL", random_folder._SMALL | sizes | {"embedding_size": 128})


@pytest.mark.parametrize("family", FAMILIES)
def test_random_folders_load(tiny_checkpoint, tmp_path, monkeypatch, family):
    small(monkeypatch)
    flags = [f"--tokenizer={tiny_checkpoint}", f"--architecture={family}", "--dtype=bfloat16", "--layers=3"]
    summary = random_llada.main([*flags, f"--out={tmp_path / 'out'}"])
    model = load_model(tmp_path / "out")
    assert (model.config.architecture, model.config.n_layers, model.config.embedding_size) == (family, 3, 128)
    assert summary["bytes"] == 2 * sum(row.size for row in registry.parameters(model.config).values())
    norm, bias = (np.unique(np.float32(x)) for x in (model.params["ln_f"]["scale"], _bias(model.params)))
    assert (norm.tolist(), bias.tolist()) == ([1.0], [0.0])
    # 4096 and more normal values: 6 standard deviations, false alarms 2e-9.
    values = np.float32(model.params["wte"]["embedding"])
    assert abs(np.mean(values**2) / 0.02**2 - 1) < 6 * np.sqrt(2 / values.size)


def _bias(params):
    with suppress(KeyError):
        return params["blocks"]["q_proj"]["bias"]
    return np.zeros(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_each_and_no_others(family):
    known = registry.architectures()[family].sizes
    for size, model in known.items():
        assert random_folder.dimensions(size, family)["d_model"] == model.d_model
    message = refusal(random_folder.dimensions, "70b", family)
    assert all(size in message for size in [random_folder.SMALL, *known])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_quickstart_s_model_of_each_loads(tmp_path, family):
    more = {"head_dim": 48} if family == "a2d_qwen3" else {}
    write_untrained(tmp_path / "source", 0, family, **more)
    model = load_model(tmp_path / "source")
    assert model.config.architecture == family
    assert model.config.head_dim == more.get("head_dim", 32)
    assert (HEAD in read_published(tmp_path / "source")) == (family == "dream")
