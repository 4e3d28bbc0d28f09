"""A mistake in a config or a flag is a UserError of at most two lines that names the key; every config file works."""

import pytest

from elbo_kto_jax.cli import Flags
from elbo_kto_jax.runtime.config import Config, Task, differences
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.going_on import MAY_CHANGE, changes_of_a_run
from elbo_kto_jax.runtime.grid import SweepConfig
from elbo_kto_jax.runtime.older_configs import as_written_now, with_later_keys
from tests.conftest import PROJECT_ROOT

TINY = PROJECT_ROOT / "configs" / "tiny.py"


def parse(*words: str, config: object = TINY, kind: type[Config] = Config) -> Config:
    flags = Flags("elbo_kto_jax.train", "test")
    flags.add_config(workdir=True, kind=kind)
    return flags.parse([f"--config={config}", *words])[1]


def message(error) -> str:
    text = str(error.value)
    assert len(text.splitlines()) <= 2
    return text


# ---- values ----


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("objective.betta=0.1", "did you mean `config.objective.beta`?"),
        ("estimatr.draws=1", "`config.estimatr.draws`"),
        ("lr=1", "`config.lr`"),
        ("seed.value=1", "`config.seed.value`"),
        ("model=llada", "`config.model`"),
        ("seed=1.5", "config.seed: expected int, got 1.5"),
        ("seed=True", "config.seed: expected int, got True"),
        ("seed=one", "config.seed: expected int, got 'one'"),
        ("seed=", "config.seed: expected int, got ''"),
        ("seed=-1", "config.seed: expected a number at least 0, got -1"),
        ("seed={[]: 1}", "config.seed: expected int"),
        ("data.packing=1", "config.data.packing: expected bool, got 1"),
        ("data.packing=yes", "config.data.packing: expected bool, got 'yes'"),
        ("data.max_length=0", "config.data.max_length: expected a number at least 1"),
        ("train.steps=3000000000", "config.train.steps: expected a number at most 2147483647, got 3000000000"),
        (
            "optimizer.learning_rate=1" + "0" * 400,
            "config.optimizer.learning_rate: expected a number at least 0, got inf",
        ),
        ("train.on_bad_numbers=ignore", "config.train.on_bad_numbers: expected one of 'stop', 'skip', got 'ignore'"),
        ("data.max_length=None", "config.data.max_length: expected int, got None"),
        ("data.desirable_fraction=1.1", "config.data.desirable_fraction: expected a number in [0, 1]"),
        ("objective.beta=-0.1", "config.objective.beta: expected a number at least 0"),
        ("objective.beta=nan", "config.objective.beta: expected float, got 'nan'"),
        ("objective.beta=1e999-1e999", "config.objective.beta"),
        ("objective.beta=[0.1]", "config.objective.beta: expected float, got"),
        ("objective.name=dpo", "config.objective.name: expected one of 'elbo_dpo', 'elbo_kto'"),
        ("estimator.draws=0", "config.estimator.draws: expected a number at least 1"),
        ("estimator.scheme=fixed_l", "config.estimator.scheme: expected one of 'uniform', 'bernoulli'"),
        ("model.dtype=float16", "config.model.dtype: expected one of 'float32', 'bfloat16'"),
        ("optimizer.b2=1.0", "config.optimizer.b2: expected a number in [0, 0.999999]"),
        ("optimizer.clip_norm=0", "config.optimizer.clip_norm: expected a number more than 0"),
        ("train.steps=0", "config.train: set one of `epochs` and `steps`"),
        ("train.epochs=1", "config.train: set one of `epochs` and `steps`"),
        ("mesh.fsdp=-1", "config.mesh: expected positive sizes and -1 at most once"),
        ("mesh.tensor=0", "config.mesh: expected positive sizes"),
        ("mesh.tensor=-2", "config.mesh.tensor: expected a number at least -1"),
        ("sampler.block_length=5", "config.sampler.block_length: 5 does not divide gen_length 16"),
        ("sampler.block_length=1", "config.sampler.steps: 15 steps cannot be spread evenly over 16 blocks"),
        ("lora.rank=-1", "config.lora.rank: expected a number at least 0"),
        ("lora.base_quantization=int4", "config.lora.base_quantization: expected one of 'none', 'int8'"),
    ],
)
def test_refuses_a_value(flag, said):
    sound = [
        "--config.train.epochs=0",
        "--config.train.steps=9",
        "--config.sampler.gen_length=16",
        "--config.sampler.steps=15",
        "--config.sampler.block_length=16",
    ]
    parse(*sound)
    with pytest.raises(UserError) as error:
        parse(*sound, f"--config.{flag}")
    assert said in message(error)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config.seed"], "--config.seed: a value is missing"),
        (["--overwrit"], "--overwrit"),
        (["--workdir"], "--workdir"),
        (["file.py"], "file.py"),
    ],
)
def test_refuses_a_flag(words, said):
    with pytest.raises(UserError) as error:
        parse(*words)
    assert said in message(error)


def test_a_command_needs_its_config():
    flags = Flags("elbo_kto_jax.train", "test")
    flags.add_config()
    with pytest.raises(UserError) as error:
        flags.parse([])
    assert "--config" in message(error)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--source=--", "--source=--: expected a value"),
        ("--config.seed=1", "unrecognized arguments: --config.seed=1"),
        ("--other", "unrecognized arguments: --other"),
    ],
)
def test_a_command_without_a_config_reads_its_flags_alone(word, said):
    flags = Flags("conversion.verify", "test")
    flags.add_argument("--source", type=str)
    assert flags.parse_flags(["--source=here"]).source == "here"
    with pytest.raises(UserError) as error:
        flags.parse_flags([word])
    assert said in message(error)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("checkpoints=llada", "config.sweep.checkpoints: expected a list, got 'llada'"),
        ("checkpoints=['a', 1]", "config.sweep.checkpoints[1]: expected str, got 1"),
        ("sampler=[{}, 'steps']", "config.sweep.sampler[1]: expected dict, got 'steps'"),
        ("draws=[0]", "config.sweep.draws[0]: expected a number at least 1, got 0"),
        ("drows=[1]", "did you mean `config.sweep.draws`?"),
    ],
)
def test_refuses_a_grid(flag, said):
    with pytest.raises(UserError) as error:
        parse(f"--config.sweep.{flag}", config=TINY.with_name("eval_sweep.py"), kind=SweepConfig)
    assert said in message(error)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shots": 5}, "unknown config key `tasks.py: gsm8k.shots`"),
        ({"num_fewshot": -2}, "tasks.py: gsm8k.num_fewshot: expected a number at least -1, got -2"),
        ({"sampler": "greedy"}, "tasks.py: gsm8k.sampler: expected dict, got 'greedy'"),
        ({"draws": 0}, "tasks.py: gsm8k.draws: expected a number at least 1, got 0"),
    ],
)
def test_refuses_a_row_of_the_table_of_tasks(changes, said):
    row = {"num_fewshot": 5, "chat_template": True, "sampler": {"steps": 8}, "draws": 128, "executes_code": False}
    assert Task.table({"gsm8k": row}, "tasks.py")["gsm8k"].sampler == {"steps": 8}
    with pytest.raises(UserError) as error:
        Task.table({"gsm8k": {**row, **changes}}, "tasks.py")
    assert said in message(error)


def test_sampler_keys_are_replaced_and_checked_together():
    config = parse()
    changed = config.with_sampler({"gen_length": 8, "steps": 4, "block_length": 8}, "here")
    assert (changed.sampler.gen_length, changed.sampler.steps) == (8, 4)
    assert differences(config.to_dict(), changed.with_sampler(config.to_dict()["sampler"], "back").to_dict()) == []
    for overrides, said in (({"step": 1}, "`config.sampler.step`"), ({"steps": 5, "block_length": 3}, "5 steps")):
        with pytest.raises(UserError) as error:
            config.with_sampler(overrides, "row 7")
        assert message(error).startswith("row 7: ")
        assert said in message(error)


@pytest.mark.parametrize(
    ("key", "before", "now", "said"),
    [
        ("draws", [1, 4], [8, 4, 1], []),
        ("sampler", [{}], [{}, {"steps": 4}], []),
        ("prompts", "", "/prompts.jsonl", []),
        ("draws", [1, 4], [4], ["config.sweep.draws: [1, 4] -> [4]"]),
        ("draws", [], [4], ["config.sweep.draws: [] -> [4]"]),
        ("data", "/a.jsonl", "/b.jsonl", ["config.sweep.data: '/a.jsonl' -> '/b.jsonl'"]),
        ("limit", 0, 10, ["config.sweep.limit: 0 -> 10"]),
    ],
)
def test_a_grid_may_grow_and_no_more(key, before, now, said):
    old, new = ({"seed": 0, "sweep": {"limit": 0, "tasks": ["elbo"], key: value}} for value in (before, now))
    assert changes_of_a_run(old, new) == said


@pytest.mark.parametrize(
    ("key", "old", "new", "free"),
    [
        ("train.steps", 5, 8, True),
        ("train.steps", 8, 5, False),
        ("train.steps", 5, 0, False),
        ("train.steps", 0, 5, False),
        ("train.epochs", 1, 2, True),
        ("mesh.fsdp", 1, -1, True),
        ("train.keep_best", "eval_loss", "", True),
        ("train.patience", 3, 1, True),
        ("train.microbatch_tokens", 64, 32, False),
        ("optimizer.schedule", "cosine", "constant", False),
    ],
)
def test_what_a_run_may_change(key, old, new, free):
    before, after = parse().to_dict(), parse().to_dict()
    group, name = key.split(".")
    before[group][name], after[group][name] = old, new
    assert changes_of_a_run(before, after) == ([] if free else [f"config.{key}: {old!r} -> {new!r}"])
    named = name in MAY_CHANGE or group in MAY_CHANGE.replace("train", "")
    assert named or not free


def test_only_a_sweep_has_a_grid():
    with pytest.raises(UserError) as error:
        parse(config=TINY.with_name("eval_sweep.py"))
    assert "unknown config key `config.sweep`" in message(error)


# ---- mappings ----


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tree: tree["optimizer"].pop("b1"), "config key `config.optimizer.b1` is missing"),
        (lambda tree: tree.pop("mesh"), "config key `config.mesh` is missing"),
        (lambda tree: tree.update(model="path"), "config.model: expected a group of keys, got 'path'"),
        (lambda tree: tree.update(model=None), "config.model: expected a group of keys, got None"),
        (lambda tree: tree["objective"].update(beta=float("nan")), "config.objective.beta: expected a number"),
        (
            lambda tree: tree["data"].update(train=3),
            "config.data.train: expected the name of a data set, or a list of such",
        ),
        (lambda tree: tree["train"].update(learning_rate=1), "unknown config key `config.train.learning_rate`"),
        (lambda tree: tree.update({7: 1}), "unknown config key `config.7`"),
    ],
)
def test_refuses_a_mapping(edit, said):
    tree = parse().to_dict()
    edit(tree)
    with pytest.raises(UserError) as error:
        Config.from_mapping(tree)
    assert said in message(error)


# ---- files ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", "SyntaxError"),
        ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError"),
        ("x = 1", "get_config"),
        ("def get_config():\n    return {'seed': 0}", "ConfigDict"),
        (
            "from ml_collections import ConfigDict, config_dict\n"
            "def get_config():\n    return ConfigDict({'seed': config_dict.required_placeholder(int)})",
            "RequiredValueError",
        ),
    ],
)
def test_refuses_a_file(tmp_path, text, said):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse(config=file)
    assert str(file) in message(error)
    assert said in message(error)


@pytest.mark.parametrize("name", ["absent.py", "notes.txt", "."])
def test_refuses_what_is_no_config_file(tmp_path, name):
    (tmp_path / "notes.txt").write_text("seed = 1")
    with pytest.raises(UserError) as error:
        parse(config=tmp_path / name)
    assert str(tmp_path) in message(error)


def test_refuses_an_argument_that_the_file_does_not_know():
    with pytest.raises(UserError) as error:
        parse(config=f"{TINY}:dpo")
    assert "config.objective.name" in message(error)


# ---- what is right ----


@pytest.mark.parametrize(
    ("flag", "group", "expected"),
    [
        ("seed=12", None, 12),
        ("objective.beta=1", "objective", 1.0),
        ("optimizer.learning_rate=1e-6", "optimizer", 1e-6),
        ("data.packing=false", "data", False),
        ("data.packing=True", "data", True),
        ("data.train=0123", "data", "0123"),  # a string stays one, whatever it looks like
        ("data.train=true", "data", "true"),
        ("data.eval=", "data", ""),
        ("model.path=a=b, c", "model", "a=b, c"),
        ("estimator.scheme=uniform", "estimator", "uniform"),
        ("mesh.data=-1", "mesh", -1),
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["joined", "apart"])
def test_override(flag, group, expected, apart):
    key, _, value = flag.partition("=")
    config = parse(*([f"--config.{key}", value] if apart else [f"--config.{flag}"]))
    found = getattr(getattr(config, group) if group else config, key.rpartition(".")[2])
    assert found == expected
    assert type(found) is type(expected)


def test_the_last_override_wins_and_the_rest_stays():
    before, after = parse("--config.seed=0"), parse("--config.seed=1", "--config.seed=2", "--workdir=x")
    assert differences(before.to_dict(), after.to_dict()) == ["config.seed: 0 -> 2"]


def test_workdir_is_named_after_the_config():
    flags = Flags("elbo_kto_jax.train", "test")
    flags.add_config(workdir=True)
    assert flags.parse([f"--config={TINY}:sft"])[0].workdir == "runs/tiny"
    assert flags.parse([f"--config={TINY}", "--workdir=here"])[0].workdir == "here"


# configs/tasks.py is the table of the tasks (tests/evaluation/test_harness.py).
CONFIG_FILES = sorted(path for path in TINY.parent.glob("*.py") if path.name not in ("__init__.py", "tasks.py"))


@pytest.mark.parametrize("spec", [*map(str, CONFIG_FILES), f"{TINY}:sft"], ids=lambda spec: spec.rpartition("/")[2])
def test_every_config_file_resolves(spec):
    kind = SweepConfig if spec.endswith("sweep.py") else Config
    config = parse(config=spec, kind=kind)
    assert kind.from_mapping(config.to_dict()) == config
    objective = {":sft": "sft", "dpo.py": "elbo_dpo"}
    assert config.objective.name == next((objective[end] for end in objective if spec.endswith(end)), "elbo_kto")


def test_the_config_of_an_earlier_version_means_what_it_did():
    now = parse().to_dict()
    earlier = {key: dict(value) if isinstance(value, dict) else value for key, value in now.items()}
    del earlier["model"]["mask_token_id"], earlier["objective"]["label_smoothing"]
    assert with_later_keys(earlier) == now
    assert "mask_token_id" not in earlier["model"]


@pytest.mark.parametrize(("most", "residuals"), [(1, "recompute"), (8, "device")])
def test_a_key_that_is_gone(most, residuals):
    """A recipe that states it is told what does; the config of a run folder is read as it was meant."""
    tree = parse().to_dict()
    tree["train"]["one_pass_microbatches"] = most
    with pytest.raises(UserError, match=r"`config.train.one_pass_microbatches` is gone; set config.train.residuals"):
        Config.from_mapping(tree)
    del tree["train"]["residuals"]
    assert Config.from_mapping(as_written_now(tree)).train.residuals == residuals
    assert "one_pass_microbatches" in tree["train"]


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("illada_kto_mix.py", {"model.path"}),
        ("dream_kto_mix.py", {"model.path", "data.max_length", "sampler.block_length"}),
    ],
)
def test_a_recipe_for_another_model_keeps_the_rest_of_kto_mix(name, own):
    trees = [parse(config=TINY.with_name(file)).to_dict() for file in ("kto_mix.py", name)]
    assert {line.partition(":")[0].removeprefix("config.") for line in differences(*trees)} == own
