"""Adapters in PEFT's form: what is written is what PEFT computes with, and what is read is what PEFT wrote."""

import dataclasses
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elbo_kto_jax import from_hf, to_hf
from elbo_kto_jax.checkpoints import hub, names, peft
from elbo_kto_jax.checkpoints.adapters import find_adapters
from elbo_kto_jax.checkpoints.digest import params_digest
from elbo_kto_jax.checkpoints.folders import locate
from elbo_kto_jax.checkpoints.load import check_weights, load_config, load_model, manifest_digest, weight_files
from elbo_kto_jax.checkpoints.manifest import Adaptation
from elbo_kto_jax.checkpoints.model import Model
from elbo_kto_jax.checkpoints.training_state import TrainingCheckpoints, TrainingState
from elbo_kto_jax.models import lora
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.network import MaskPredictor
from elbo_kto_jax.runtime.errors import UserError
from tests import families
from tests.published import assert_same_trees, read_published, write_published
from tests.share import cases

RANK, ALPHA = 3, 7.0
FAMILIES = ("llada", *families.FAMILIES)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapted(NamedTuple):
    """A published base, a run with a step of adapters on it, the model of the two, and the adapters' export."""

    base: Path
    step: Path
    model: Model
    peft: Path
    summary: dict


def gaussian(tensors: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    for name, tensor in tensors.items():
        tensors[name] = rng.normal(size=tensor.shape).astype(tensor.dtype)


def train_on(base: Path, folder: Path, **changes) -> Path:
    """A step of training random adapters on the model at `base`; `changes` are of its `Adaptation`."""
    model, rng = load_model(base), np.random.default_rng(0)
    adaptation = Adaptation(RANK, ALPHA, str(base), params_digest(model.params))
    adaptation = dataclasses.replace(adaptation, **changes)
    abstract = lora.abstract_adapters(model.params, RANK, np.float32, adaptation.targets)
    tree = jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype)), abstract)
    checkpoints = TrainingCheckpoints(folder / "checkpoints", adaptation, model.config)
    checkpoints.save(1, TrainingState(tree, {"n": jax.device_put(np.zeros(1, np.float32))}, {"step": 1}), model.assets)
    checkpoints.close()
    return folder


def export(source: Path, out: Path, *more: str) -> dict:
    return to_hf.main([f"--source={source}", f"--out={out}", "--adapter", *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Adapted]:
    @functools.cache
    def of_family(family: str) -> Adapted:
        folder = tmp_path_factory.mktemp(family)
        base, step, out = folder / "base", folder / "run", folder / "peft"
        if family == "llada":
            write_published(base, edit=gaussian)
        else:
            families.write(base, family, edit=gaussian, changes={"mask_token_id": 39})
        summary = export(train_on(base, step), out)
        return Adapted(base, step, load_model(step), out, summary)

    return of_family


@pytest.fixture
def llada(made) -> Adapted:
    return made("llada")


def assert_published(params: dict, config: ModelConfig, expected: Mapping[str, np.ndarray], atol: float = 1e-5) -> None:
    """The tensors of the published model, in our tree, but for those that are not expected."""
    for name, tensor in names.published_tensors(config).items():
        leaf = np.asarray(names.get(params, tensor.path))
        leaf = leaf if tensor.layer is None else leaf[tensor.layer]
        if name in expected:
            np.testing.assert_allclose(leaf.T if tensor.transposed else leaf, expected[name], atol=atol)


def with_adapters(base: Path, tensors: Mapping[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """W + scale B A for each published tensor of `base` whose adapters are among `tensors`, by PEFT's names."""
    merged = read_published(base)
    for name in merged:
        a, b = (tensors.get(f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight") for part in "AB")
        if a is not None:
            merged[name] = merged[name] + scale * b @ a
    return merged


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as refused:
        call(*arguments)
    assert str(refused.value).count("\n") <= 1
    return str(refused.value)


def modules_that_peft_takes(said: dict, modules: set[str]) -> set[str]:
    """By the rule of PEFT's `check_target_module_exists` for a list of names."""
    targets = said["target_modules"]
    return {name for name in modules if name in targets or any(name.endswith(f".{target}") for target in targets)}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_peft_adds(made, family):
    """W + lora_alpha / r B A under PEFT's names and in its orientation is our model, and nothing else is."""
    base, _, model, folder, summary = made(family)
    said, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    assert (said["peft_type"], said["bias"], said["r"], said["lora_alpha"]) == ("LORA", "none", RANK, ALPHA)
    assert said["base_model_name_or_path"] == str(base)
    linear = {name.removesuffix(".weight") for name, tensor in read_published(base).items() if tensor.ndim == 2}
    taken = modules_that_peft_takes(said, linear)
    assert len(taken) == 7 * 2  # matrices of two layers: neither the embedding nor the head
    assert tensors.keys() == {f"base_model.model.{name}.lora_{part}.weight" for name in taken for part in "AB"}
    assert summary["tensors"] == len(tensors)
    assert summary["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert_published(model.params, model.config, with_adapters(base, tensors, said["lora_alpha"] / said["r"]))


@pytest.mark.parametrize("family", cases(["llada", "dream"], ["illada", "a2d_qwen3"]))
def test_there_and_back_bit_by_bit(made, family, tmp_path):
    _, step, ours, folder, _ = made(family)
    theirs = load_model(folder)
    assert_same_trees(ours.params, theirs.params)
    assert (ours.config, ours.assets) == (theirs.config, theirs.assets)
    assert load_config(folder) == (ours.config, dict(ours.assets))
    found, back = (find_adapters(locate(place, "", True)) for place in (step, folder))
    assert back.adaptation == found.adaptation
    export(folder, tmp_path / "again")
    for file in (CONFIG, WEIGHTS, "tokenizer.json"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS, "tokenizer.json", "README.md"}


def test_commands_that_read_without_computing(llada, tmp_path):
    check_weights(llada.peft)
    assert manifest_digest(llada.peft) == ""
    assert {file.name for file in weight_files(llada.peft)} == {
        WEIGHTS, *(file.name for file in llada.base.glob("*.safetensors"))
    }  # fmt: skip
    from_hf.main([f"--source={llada.peft}", f"--out={tmp_path / 'whole'}"])
    assert_same_trees(load_model(tmp_path / "whole").params, llada.model.params)


def test_some_matrices_on_an_int8_base_with_a_mask_of_the_user_s(llada, tmp_path, caplog):
    """PEFT cannot say two of these, the file's metadata do."""
    run = train_on(llada.base, tmp_path / "run", base_quantization="int8", targets=("k_proj", "ff_out"))
    manifest = tmp_path / "run" / "checkpoints" / "1" / "assets" / "manifest.json"
    said = json.loads(manifest.read_text()) | {"version": 1, "mask_token_id": 5}
    manifest.write_text(json.dumps({key: value for key, value in said.items() if key != "checksum"}))
    export(run, tmp_path / "peft", "--dtype=bfloat16")
    assert "int8" in caplog.text
    ours, theirs = load_model(run), load_model(tmp_path / "peft")
    assert theirs.config == ours.config
    assert theirs.config.mask_token_id == 5
    rounded = lora.rounded(load_model(llada.base).params["blocks"]["q_proj"]["kernel"])
    np.testing.assert_array_equal(theirs.params["blocks"]["q_proj"]["kernel"], rounded)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=0.3), theirs.params, ours.params)  # bfloat16
    targets = json.loads((tmp_path / "peft" / CONFIG).read_text())["target_modules"]
    assert targets == ["k_proj", *(f"model.transformer.blocks.{i}.ff_out" for i in range(2))]
    assert find_adapters(locate(tmp_path / "peft", "", True)).adaptation.targets == ("ff_out", "k_proj")


def test_peft_gets_a_base_that_it_can_read(llada, tmp_path):
    from_hf.main([f"--source={llada.base}", f"--out={tmp_path / 'converted'}"])
    run, out = train_on(tmp_path / "converted", tmp_path / "run"), tmp_path / "peft"
    assert "--base=" in refusal(export, run, out)
    assert not out.exists()
    export(run, out, "--base=GSAI-ML/LLaDA-8B-Instruct@abc")
    said = json.loads((out / CONFIG).read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == ("GSAI-ML/LLaDA-8B-Instruct", "abc")
    card = (out / "README.md").read_text()
    for line in ('base_model: "GSAI-ML/LLaDA-8B-Instruct"', 'base_model_relation: "adapter"', 'library_name: "peft"'):
        assert f"\n{line}\n" in card
    assert peft.read_config(locate(out, "", True)).adaptation.base_path == "GSAI-ML/LLaDA-8B-Instruct@abc"
    export(run, out, f"--base={llada.base}", "--overwrite")
    assert_same_trees(load_model(out).params, llada.model.params)


def test_flags(llada, tmp_path):
    assert "whole model" in refusal(export, llada.base, tmp_path / "out")
    copy = shutil.copytree(llada.base, tmp_path / "whole")
    assert "not a checkpoint" in refusal(export, llada.step, copy, "--overwrite")
    assert "--overwrite" in refusal(export, llada.step, llada.peft)


# ---- what others wrote ----


def foreign(folder: Path, base: Path, *, edit_config=None, edit=None) -> dict[str, np.ndarray]:
    """A folder of PEFT's with adapters of q_proj and v_proj, and its tensors."""
    said = {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": str(base), "bias": "none",
        "corda_config": None, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.05,
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "r": 4,
        "rank_pattern": {}, "revision": None, "target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM",
        "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    }  # fmt: skip
    rng, tensors = np.random.default_rng(2), {}
    for layer in range(2):
        for name, rows in (("q_proj", 16), ("v_proj", 8)):
            module = f"base_model.model.model.transformer.blocks.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = rng.normal(size=(4, 16)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.normal(size=(rows, 4)).astype(np.float32)
    said |= edit_config or {}
    if edit is not None:
        edit(tensors)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(said))
    save_file(tensors, folder / WEIGHTS)
    return tensors


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_of_others_are_their_model(llada, tmp_path, use_rslora):
    tensors = foreign(tmp_path / "peft", llada.base, edit_config={"use_rslora": use_rslora, "rank_pattern": {"q": 4}})
    model, scale = load_model(tmp_path / "peft"), 16 / math.sqrt(4) if use_rslora else 16 / 4
    assert_published(model.params, model.config, with_adapters(llada.base, tensors, scale))


def test_a_tokenizer_beside_the_adapters_is_theirs(llada, tmp_path):
    foreign(tmp_path / "peft", llada.base)
    (tmp_path / "peft" / "tokenizer.json").write_text("another")
    assets = load_config(tmp_path / "peft")[1]
    assert assets["tokenizer.json"] == b"another"
    assert assets["config.json"] == (llada.base / "config.json").read_bytes()


def rename(old: str, new: str):
    def edit(tensors):
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


def drop(tensors) -> None:
    del tensors["base_model.model.model.transformer.blocks.1.q_proj.lora_B.weight"]


def cut(tensors) -> None:
    name = "base_model.model.model.transformer.blocks.1.q_proj.lora_B.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:-1])


def as_float16(tensors) -> None:
    name = "base_model.model.model.transformer.blocks.1.q_proj.lora_A.weight"
    tensors[name] = tensors[name].astype(np.float16)


@pytest.mark.parametrize(
    ("edit_config", "edit", "named"),
    [
        ({"peft_type": "IA3"}, None, "`peft_type`: 'IA3'"),
        ({"use_dora": True}, None, "`use_dora`"),
        ({"bias": "lora_only"}, None, "`bias`"),
        ({"lora_bias": True}, None, "`lora_bias`"),
        ({"modules_to_save": ["ff_out"]}, None, "`modules_to_save`"),
        ({"rank_pattern": {"q_proj": 8}}, None, "`rank_pattern`"),
        ({"alpha_pattern": {"q_proj": 8}}, None, "`alpha_pattern`"),
        ({"rank_pattern": [1]}, None, "`rank_pattern`"),
        ({"layer_replication": [[0, 2]]}, None, "`layer_replication`"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "`init_lora_weights`"),
        ({"use_qalora": True}, None, "`use_qalora`"),
        ({"trainable_token_indices": [1]}, None, "`trainable_token_indices`"),
        ({"r": 0}, None, "`r`"),
        ({"r": True}, None, "`r`"),
        ({"lora_alpha": "a"}, None, "`lora_alpha`"),
        ({"base_model_name_or_path": None}, None, "`base_model_name_or_path`"),
        ({"base_model_name_or_path": "/no/where"}, None, "adapter_config.json (base_model_name_or_path)"),
        ({"r": 8}, None, "expected shape (8, 16), got (4, 16)"),
        (None, rename("blocks.1.q_proj", "ff_out"), "model.transformer.ff_out.lora_"),
        (None, rename("q_proj.lora_A.weight", "q_proj.lora_magnitude_vector"), "lora_magnitude_vector"),
        (None, rename("blocks.1", "blocks.2"), "blocks.2"),
        (None, dict.clear, "no adapters"),
        (None, drop, "blocks.1.q_proj.lora_B.weight is missing"),
        (None, cut, "expected shape (16, 4), got (15, 4)"),
        (None, as_float16, "float16"),
    ],
)
def test_what_cannot_be_represented_is_refused(llada, tmp_path, edit_config, edit, named):
    foreign(tmp_path / "peft", llada.base, edit_config=edit_config, edit=edit)
    assert named in refusal(load_config, tmp_path / "peft")


def test_damaged_folders(llada, tmp_path):
    for name, content, named in (
        (CONFIG, b"{", "not readable"),
        (CONFIG, b"[]", "JSON object"),
        (CONFIG, b"{}", "peft_type"),
        (WEIGHTS, b"", "damaged"),
        (WEIGHTS, None, "missing"),
    ):
        folder = shutil.copytree(llada.peft, tmp_path / "copy")
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        assert named in refusal(load_config, folder)
        shutil.rmtree(folder)
    folder, weights = shutil.copytree(llada.peft, tmp_path / "copy"), llada.peft / WEIGHTS
    for old, new in ((b"base_digest", b"base_dig_st"), (b'"none', b'"nane')):
        (folder / WEIGHTS).write_bytes(weights.read_bytes().replace(old, new, 1))
        assert "metadata" in refusal(load_config, folder)


def test_another_base_is_refused_where_its_bits_are_known(llada, tmp_path):
    other, folder = tmp_path / "other", shutil.copytree(llada.peft, tmp_path / "peft")
    write_published(other)
    for base, named in ((other, "another base"), (llada.peft, "holds adapters itself")):
        said = json.loads((llada.peft / CONFIG).read_text()) | {"base_model_name_or_path": str(base)}
        (folder / CONFIG).write_text(json.dumps(said))
        assert named in refusal(load_model, folder)


def test_adapters_come_from_the_hub_with_their_weights(monkeypatch, tmp_path):
    """Their headers are read where the weights of a whole model are not."""
    wanted = []

    def snapshot(name, **options):
        wanted.extend(options["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    hub.download("a/b", "--checkpoint", weights=False)
    assert {CONFIG, WEIGHTS} <= set(wanted)
    assert "*.safetensors" not in wanted


# ---- the library itself ----


def torch_and_peft():
    library = pytest.importorskip("peft", reason="the library peft is not installed (pip install peft)")
    return pytest.importorskip("torch"), library


def modules_of(base: Path):
    """A tree of linear modules with the names and the weights of the published model at `base`."""
    torch, _ = torch_and_peft()
    root = torch.nn.Module()
    for name, tensor in read_published(base).items():
        if tensor.ndim == 2:
            *path, leaf = name.removesuffix(".weight").split(".")
            node = root
            for part in path:
                if not hasattr(node, part):
                    node.add_module(part, torch.nn.Module())
                node = getattr(node, part)
            node.add_module(leaf, torch.nn.Linear(*tensor.shape[::-1], bias=False))
            getattr(node, leaf).weight.data = torch.from_numpy(tensor)
    return root


def merged_by_peft(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}


def test_peft_computes_the_merged_model(llada):
    torch, library = torch_and_peft()
    from tests.peer.torch_elbo_kto import LLaDA

    class Published(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Module()
            self.model.transformer = LLaDA.load(llada.base)

        def forward(self, ids):
            return self.model.transformer(ids)

    model, ids = library.PeftModel.from_pretrained(Published(), llada.peft), np.arange(24).reshape(2, 12)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).numpy()
    network = MaskPredictor(llada.model.config)
    ours = np.asarray(network.apply({"params": llada.model.params}, jax.device_put(ids), method=MaskPredictor.logits))
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_finds_the_modules_of_every_architecture(made, family):
    _, library = torch_and_peft()
    base, _, model, folder, _ = made(family)
    merged = merged_by_peft(library.PeftModel.from_pretrained(modules_of(base), folder))
    assert sum(bool(re.search(r"\.\d+\.", name)) for name in merged) == 14
    assert_published(model.params, model.config, merged)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_peft_saves_is_read_as_its_model(llada, tmp_path, use_rslora):
    torch, library = torch_and_peft()
    torch.manual_seed(0)
    options = library.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_rslora=use_rslora, init_lora_weights=False
    )
    model = library.get_peft_model(modules_of(llada.base), options)
    model.peft_config["default"].base_model_name_or_path = str(llada.base)
    model.save_pretrained(tmp_path / "peft")
    ours = load_model(tmp_path / "peft")
    assert_published(ours.params, ours.config, merged_by_peft(model))
