"""Wrong input to the real commands: one or two lines that name what is wrong and where, before any work is done."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elbo_kto_jax import cli, from_hf, generate, precompute, score, train
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from tests import runs

GOOD = runs.records(4)
PROJECT_ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "model.safetensors"


def refusal(main: Callable, argv: list[str]) -> str:
    """The message of the UserError, which must be one or two lines that can be read."""
    with pytest.raises(UserError) as refused:
        main(argv)
    message = str(refused.value)
    assert message.strip() == message
    lines = message.split("\n")
    assert 1 <= len(lines) <= 2
    assert all(lines)
    assert "Traceback" not in message
    return message


def assert_names(message: str, *words: object) -> None:
    for word in words:
        assert str(word) in message, f"{word!r} is not named in: {message}"


@pytest.fixture
def data(tmp_path) -> Path:
    return runs.write_jsonl(tmp_path / "data.jsonl", GOOD)


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


# ---- config and flags ----

WRONG_SETTINGS = [  # setting, and what the message must name
    ({"optimizer.learning_rat": 1e-3}, "config.optimizer.learning_rat", "config.optimizer.learning_rate"),
    ({"optimiser.learning_rate": 1e-3}, "config.optimiser.learning_rate"),
    ({"objective": "sft"}, "config.objective"),
    ({"optimizer.learning_rate": "fast"}, "config.optimizer.learning_rate", "fast"),
    ({"optimizer.learning_rate": -1.0}, "config.optimizer.learning_rate", "-1.0"),
    ({"optimizer.learning_rate": "1e999"}, "config.optimizer.learning_rate", "inf"),
    ({"optimizer.b1": 1.0}, "config.optimizer.b1", "1.0"),
    ({"optimizer.clip_norm": 0}, "config.optimizer.clip_norm"),
    ({"objective.name": "dpo"}, "config.objective.name", "elbo_kto", "dpo"),
    ({"objective.beta": "nan"}, "config.objective.beta"),
    ({"objective.reference_point": "median"}, "config.objective.reference_point", "global_mean"),
    ({"estimator.draws": 0}, "config.estimator.draws", "0"),
    ({"estimator.draws": 2.5}, "config.estimator.draws", "2.5"),
    ({"estimator.scheme": "sobol"}, "config.estimator.scheme", "stratified"),
    ({"data.packing": "maybe"}, "config.data.packing", "maybe"),
    ({"data.desirable_fraction": 1.5}, "config.data.desirable_fraction", "1.5"),
    ({"train.epochs": 1}, "epochs", "steps"),
    ({"train.steps": 0}, "epochs", "steps"),
    ({"train.steps": 0, "train.epochs": 10**9}, "config.train.epochs", "1000000000 steps"),
    ({"train.steps": 2**31 - 1}, "config.train.steps", "at most"),
    ({"mesh.data": -1, "mesh.fsdp": -1}, "config.mesh", "-1"),
    ({"mesh.data": 3}, "config.mesh", "3", "8 devices"),
    ({"mesh.data": 1, "mesh.tensor": 8}, "config.mesh.tensor", "n_heads"),
    ({"model.dtype": "float16"}, "config.model.dtype", "bfloat16"),
    ({"sampler.block_length": 3}, "config.sampler.block_length", "gen_length"),
    ({"lora.base_quantization": "int8"}, "config.lora.base_quantization", "config.lora.rank"),
    ({"lora.rank": 8, "reference.path": "elsewhere"}, "config.reference.path", "elsewhere"),
    ({"data.max_length": 4}, "config.data.train", "max_length"),
    ({"data.train": ""}, "--config.data.train"),
]


@pytest.mark.parametrize(("settings", "named"), [(row[0], row[1:]) for row in WRONG_SETTINGS], ids=str)
def test_config(tiny_checkpoint, data, tmp_path, settings, named):
    settings = {"model.path": tiny_checkpoint, "data.train": data, **settings}
    assert_names(refusal(train.main, runs.flags(settings, f"--workdir={tmp_path / 'run'}")), *named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], ["--config"]),
        (["--config=nowhere.py"], ["nowhere.py"]),
        ([f"--config={runs.CONFIG}", "--epochs=3"], ["--epochs"]),
        ([f"--config={runs.CONFIG}", "stray"], ["stray"]),
        ([f"--config={runs.CONFIG}", "--config.seed"], ["--config.seed"]),
        ([f"--config={runs.CONFIG}:dpo"], ["config.objective.name", "dpo"]),
        ([f"--config={runs.CONFIG.with_suffix('')}"], ["configs/tiny"]),
    ],
    ids=str,
)
def test_flags(argv, named):
    assert_names(refusal(train.main, argv), *named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("def get_config(:", ["SyntaxError"]),
        ("import not_there", ["ModuleNotFoundError", "not_there"]),
        ("x = 1", ["get_config"]),
        ("get_config = dict", ["ConfigDict"]),
        (
            "from ml_collections import ConfigDict as C\nget_config = lambda: C({'seed': 0})",
            ["config.model", "missing"],
        ),
    ],
)
def test_config_files(tmp_path, text, named):
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert_names(refusal(train.main, [f"--config={file}", f"--workdir={tmp_path / 'run'}"]), *named)


# ---- records ----


def record_with(**fields) -> dict:
    return {**GOOD[1], **fields}


WRONG_RECORDS = [  # line 2 of the file, and the field or fault that the message must name
    ('{"prompt": "a", ', "JSON"),
    ("[1, 2]", "object"),
    ({key: value for key, value in GOOD[1].items() if key != "label"}, "`label`"),
    (record_with(label="yes"), "`label`", '"yes"'),
    (record_with(label=1), "`label`"),
    (record_with(prompt=[]), "`prompt`", "empty"),
    (record_with(prompt=[{"role": "user"}]), "`prompt[0].content`"),
    (record_with(prompt=[{"role": "tool", "content": "a"}]), "`prompt[0].role`", '"tool"'),
    (record_with(prompt=7), "`prompt`"),
    (record_with(completion=[{"role": "user", "content": "a"}]), "`completion", "assistant"),
    ({"prompt": "a", "label": True}, "`completion`"),
    (record_with(id=GOOD[0]["id"]), "`id`", GOOD[0]["id"]),
    (record_with(id=[1]), "`id`"),
    (record_with(completion="\ud800"), "`completion`", "surrogate"),
]


@pytest.mark.parametrize(("row", "named"), [(row[0], row[1:]) for row in WRONG_RECORDS], ids=str)
def test_records(tiny_checkpoint, tmp_path, row, named):
    data = runs.write_jsonl(tmp_path / "data.jsonl", [GOOD[0], row, GOOD[2]])
    argv = runs.flags({"model.path": tiny_checkpoint, "data.train": data}, f"--workdir={tmp_path / 'run'}")
    assert_names(refusal(train.main, argv), f"{data}:2", *named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("none.jsonl", None), ("data.csv", "a,b"), ("data.parquet", "PAR1"), ("empty.jsonl", "\n")]
)
@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_data_files(tiny_checkpoint, data, tmp_path, key, name, content):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    settings = {"model.path": tiny_checkpoint, "data.train": data, key: file}
    message = refusal(train.main, runs.flags(settings, f"--workdir={tmp_path / 'run'}"))
    assert_names(message, file)


# ---- checkpoints ----


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def drop_layer_norm(tensors: dict) -> None:
    del tensors["model.transformer.ln_f.weight"]


def reshape_layer_norm(tensors: dict) -> None:
    tensors["model.transformer.ln_f.weight"] = np.ones(3, np.float32)


def add_bias(tensors: dict) -> None:
    tensors["model.transformer.ff_out.bias"] = np.ones(3, np.float32)


def split_and_lose_a_shard(folder: Path) -> None:
    tensors = sorted(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    for file in folder.glob("*.index.json"):
        file.unlink()
    shards = {"model-00001-of-00002.safetensors": tensors[::2], "model-00002-of-00002.safetensors": tensors[1::2]}
    weight_map = {name: file for file, part in shards.items() for name, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    first, _ = shards
    save_file(dict(shards[first]), folder / first)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def use_another_end(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token="<|eot_id|>", pad_token="<|eot_id|>")


WRONG_CHECKPOINTS = [  # damage to the folder, and what the message must name
    (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    (lambda folder: truncate(folder / WEIGHTS), WEIGHTS, "damaged"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b""), WEIGHTS, "damaged"),
    (split_and_lose_a_shard, "model-00002-of-00002.safetensors"),
    (lambda folder: edit_tensors(folder, drop_layer_norm), "model.transformer.ln_f.weight", "missing"),
    (lambda folder: edit_tensors(folder, reshape_layer_norm), "model.transformer.ln_f.weight", "(64,)", "(3,)"),
    (lambda folder: edit_tensors(folder, add_bias), "model.transformer.ff_out.bias"),
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json", "JSON"),
    (lambda folder: edit_json(folder / "config.json", alibi=True), "config.json", "`alibi`"),
    (lambda folder: edit_json(folder / "config.json", block_type="sequential"), "`block_type`", "sequential"),
    (lambda folder: edit_json(folder / "config.json", brand_new=True), "`brand_new`"),
    (lambda folder: edit_json(folder / "config.json", model_type="llama"), "`model_type`", "llama"),
    (lambda folder: edit_json(folder / "config.json", n_kv_heads=3), "`n_kv_heads`"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda folder: truncate(folder / "tokenizer.json"), "tokenizer"),
    (use_another_end, "tokenizer", "eos_token_id"),
    (lambda folder: edit_json(folder / "config.json", mask_token_id=0), "tokenizer", "mask_token_id"),
    (shutil.rmtree, "no such folder"),
]


@pytest.mark.parametrize(("damage", "named"), [(row[0], row[1:]) for row in WRONG_CHECKPOINTS])
def test_published_checkpoints(checkpoint, data, tmp_path, damage, named):
    damage(checkpoint)
    argv = runs.flags({}, f"--checkpoint={checkpoint}", f"--data={data}", f"--out={tmp_path / 'out.jsonl'}")
    assert_names(refusal(score.main, argv), checkpoint, *named)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("fault", ["lost array", "truncated", "flipped", "manifest", "tokenizer"])
def test_converted_checkpoints(tiny_checkpoint, data, tmp_path, fault):
    folder = tmp_path / "ours"
    from_hf.main([f"--source={tiny_checkpoint}", f"--out={folder}"])
    arrays = max((file for file in (folder / "params").rglob("*") if file.is_file()), key=lambda f: f.stat().st_size)
    if fault == "lost array":
        arrays.unlink()
    elif fault == "truncated":
        truncate(arrays)
    elif fault == "flipped":
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 0x40
        arrays.write_bytes(content)
    else:
        (folder / "assets" / f"{fault}.json").write_text("{")
    argv = runs.flags({}, f"--checkpoint={folder}", f"--data={data}", f"--out={tmp_path / 'out.jsonl'}")
    assert_names(refusal(score.main, argv), folder)


def test_reference_is_named_by_its_own_key(tiny_checkpoint, data, tmp_path):
    settings = {"model.path": tiny_checkpoint, "data.train": data, "reference.path": tmp_path / "gone"}
    message = refusal(precompute.main, runs.flags(settings, f"--workdir={tmp_path / 'run'}"))
    assert_names(message, "--config.reference.path", tmp_path / "gone")


# ---- what exists already ----


def test_existing_output(tiny_checkpoint, data, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    argv = runs.flags({}, f"--checkpoint={tiny_checkpoint}", f"--out={out}")
    assert_names(refusal(score.main, [*argv, f"--data={data}"]), out, "--overwrite")
    assert_names(refusal(generate.main, [*argv, f"--prompts={data}"]), out, "--overwrite")
    assert_names(refusal(from_hf.main, [f"--source={tiny_checkpoint}", f"--out={tmp_path}"]), tmp_path)
    assert out.read_text() == "precious"


@pytest.mark.parametrize("main", [train.main, precompute.main])
@pytest.mark.parametrize("content", ["a file", "foreign", "damaged"])
def test_working_folders(tiny_checkpoint, data, tmp_path, main, content):
    workdir = tmp_path / "run"
    file = workdir if content == "a file" else workdir / ("notes.txt" if content == "foreign" else "config.json")
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    argv = runs.flags({"model.path": tiny_checkpoint, "data.train": data}, f"--workdir={workdir}")
    assert_names(refusal(main, argv), workdir)
    if content != "damaged":  # --overwrite deletes runs, nothing else
        assert_names(refusal(main, [*argv, "--overwrite"]), workdir)
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "is_file"), [("tensorboard", True), ("checkpoints", True), ("reference", True), ("report.html", False)]
)
def test_things_of_another_kind_in_a_working_folder(tiny_checkpoint, data, tmp_path, name, is_file):
    workdir = tmp_path / "run"
    workdir.mkdir()
    argv = runs.flags({"model.path": tiny_checkpoint, "data.train": data}, f"--workdir={workdir}")
    resolved = train_flags(argv)
    (workdir / "config.json").write_text(json.dumps({"config": resolved.to_dict()}))
    if is_file:
        (workdir / name).write_text("precious")
    else:
        (workdir / name).mkdir()
    assert_names(refusal(train.main, argv), workdir / name, "not a folder" if is_file else "not a file")
    assert (workdir / name).exists()


def train_flags(argv: list[str]) -> Config:
    flags = cli.Flags("train", "")
    flags.add_config(workdir=True)
    return flags.parse(argv)[1]


def test_sft_has_nothing_to_precompute(tmp_path):
    argv = runs.flags({"objective.name": "sft"}, f"--workdir={tmp_path}")
    assert_names(refusal(precompute.main, argv), "config.objective.name", "sft")


# ---- as the user sees it ----


def command(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=PROJECT_ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["elbo_kto_jax.train", f"--config={runs.CONFIG}", "--config.train.epochs=1"], ["error: config.train"]),
        (["elbo_kto_jax.score", "--unknown=1"], ["error:", "--checkpoint"]),
        (
            ["elbo_kto_jax.train", f"--config={PROJECT_ROOT / 'configs' / 'kto_mix.py'}"],
            ["--config.model.path", "GSAI-ML/LLaDA-8B-Instruct", "hf download"],
        ),
    ],
    ids=["config", "flag", "no weights at hand"],
)
def test_exit_status_2_and_nothing_but_the_message(tmp_path, words, named):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    result = command(*words, f"--workdir={tmp_path / 'run'}" if "train" in words[0] else "--overwrite", **offline)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert_names(result.stderr, *named)
    _, message = result.stderr.split("error: ")  # transformers may say before that PyTorch is not installed
    assert message.count("\n") <= 2
    assert not (tmp_path / "run").exists()
