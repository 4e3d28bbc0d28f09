"""One path, one meaning: `paths.resolve`, and that every path flag and config key goes through it."""

import dataclasses
import os
import pwd
import typing
from pathlib import Path

import pytest

from elbo_kto_jax import (
    benchmark,
    chat,
    cli,
    diagnose,
    evaluate,
    from_hf,
    generate,
    plan,
    precompute,
    quickstart,
    score,
    sweep,
    to_hf,
    train,
    verify,
)
from elbo_kto_jax.runtime import config, grid, paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.flags import load_config_file
from launch import compare_estimators, random_llada, sampler_table

COMMANDS = [
    *(train, precompute, score, generate, chat, evaluate, sweep, diagnose, benchmark),
    *(from_hf, to_hf, verify, compare_estimators, plan, quickstart, random_llada, sampler_table),
]
# no paths
TEXTS = {"--prompt", "--coordinator", "--judge-model", "--schemes", "--draws", "--seeds", "--topology"}
TEXTS |= {"--license", "--push", "--revision"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_home_folder(home):
    assert paths.resolve("~", "--out") == str(home)
    assert paths.resolve("~/run/~", "--out") == f"{home}/run/~"
    assert paths.resolve(f"~{pwd.getpwuid(os.getuid()).pw_name}/x", "--out") == f"{pwd.getpwuid(os.getuid()).pw_dir}/x"


@pytest.mark.parametrize(
    "path",
    ["", "run", "./run", "/a/b", "a/~b", "a~", "trl-lib/kto-mix-14k@main:test", "s3:", "a:b", "x y", "run[1]", "日本"],
)
def test_what_is_not_changed(path):
    assert paths.resolve(path, "--out") == path


@pytest.mark.parametrize("path", ["gs://b", "s3://b/x y", "gs://b/x:test", "https://host/x.jsonl", "hf://datasets/a/b"])
def test_addresses(path):
    assert paths.resolve(path, "--out") == path
    assert paths.resolve(f"{path}/", "--out") == path
    assert str(paths.at(path)) == path
    assert isinstance(paths.at(path) / "x", Path)
    assert str((paths.at(path) / "x/y").relative_to(path)) == "x/y"


@pytest.mark.parametrize("path", ["./~", "./~/x", ".//~root", "././~x"])
def test_a_folder_whose_name_starts_with_a_tilde(path, home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = paths.resolve(path, "--out")
    assert found == os.path.abspath(path)
    assert paths.resolve(found, "--out") == found


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("GS://bucket/run", "gs://"),
        (" s3://bucket", "s3://"),
        ("gs://", "gs://BUCKET/NAME"),
        ("gs://bucket/../run", "without"),
        ("gs://bucket//run", "without"),
        ("gs://bucket/a\tb", "control characters"),
        ("gs://bucket/a\\b", "rename"),
        ("memory://x", "memory://"),
        ("file:///tmp/x", "file://"),
        ("abfs+tls.1-x://b", "abfs+tls.1-x://"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name"),
        ("a\0b", "null character"),
        ("caf\udce9", "UTF-8"),
        ("a\\b", "rename"),
        ("x/gs:/b", "rename"),
        ("gs:/b/run", "rename"),
    ],
)
def test_refused(path, named):
    with pytest.raises(UserError, match=r"^--out=") as refused:
        paths.resolve(path, "--out")
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_password_is_shown():
    with pytest.raises(UserError) as refused:
        paths.resolve("https://user:secret@host/x", "--data")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("home", ["~", "", "relative", None])
def test_without_a_home_folder(monkeypatch, home):
    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert paths.home_folder() is None
    assert cli._cache_folder() is None
    with pytest.raises(UserError, match=r"^--out=~/x: ~: "):
        paths.resolve("~/x", "--out")


def test_the_cache_of_compiled_programs(home, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    assert cli._cache_folder() == f"{home}/.cache/elbo_kto_jax/compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cli._cache_folder() == f"{tmp_path}/cache/elbo_kto_jax/compiled"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli._cache_folder() is None


class Built(Exception):
    """Raised in the place of parsing, when a command has added its flags."""


def parser_of(command, monkeypatch) -> cli.Flags:
    def built(parser, _):
        raise Built(parser)

    with monkeypatch.context() as patch:
        patch.setattr(cli.Flags, "parse_args", built)
        with pytest.raises(Built) as found:
            command.main([])
    return found.value.args[0]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_flag_that_names_files_is_resolved(command, monkeypatch, home):
    parser = parser_of(command, monkeypatch)
    named = [a for a in parser._actions if a.option_strings and a.nargs != 0 and a.choices is None]
    needed = [f"{a.option_strings[0]}=x" for a in named if a.required]
    needed += ["--prompt=x"] if command is generate else []
    checked = 0
    for action in named:
        flag = action.option_strings[0]
        if action.type in (None, str):
            assert (action.type is str) == (flag in TEXTS), flag
        if action.type is None:
            others = [word for word in needed if not word.startswith(f"{flag}=") and flag != "--prompts"]
            others += [f"{a.option_strings[0]}=x" for a in named if a.required and flag == "--prompts"]
            with pytest.raises(UserError, match=f"^{flag}=file://b: file:// addresses"):
                parser.parse_args([*others, f"{flag}=file://b"])
            assert getattr(parser.parse_args([*others, f"{flag}=gs://b/"]), action.dest) == "gs://b"
            assert getattr(parser.parse_args([*others, f"{flag}=~/x"]), action.dest) == f"{home}/x"
            checked += 1
    assert checked


def test_numbers_of_flags(monkeypatch):
    parser = parser_of(diagnose, monkeypatch)
    needed = ["--config=x", "--checkpoint=x", "--out=x"]
    for value in ("-1", str(2**31), "1" + "0" * 30, "1" + "0" * 4000, "1" + "0" * 5000, "x"):
        with pytest.raises(UserError, match="--records") as refused:
            parser.parse_args([*needed, f"--records={value}"])
        assert len(str(refused.value)) < 1200
    for value in ("nan", "inf", "-inf"):
        with pytest.raises(UserError, match="--price"):
            parser_of(plan, monkeypatch).parse_args(["--config=x", "--topology=x", f"--price={value}"])


def leaves(kind, prefix="config") -> dict[str, object]:
    """The type of every config key."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        key = f"{prefix}.{name}"
        found |= leaves(hint, key) if dataclasses.is_dataclass(hint) else {key: hint}
    return found


def test_every_config_key_that_names_files_is_resolved():
    locations = {"config.model.path", "config.data.train", "config.data.eval", "config.reference.path", "config.tasks"}
    locations |= {"config.benchmarks.table", "config.judge.prompt", "config.lora.path", "config.data.cache"}
    locations |= {f"config.sweep.{key}" for key in ("checkpoints", "tasks", "baseline", "prompts", "data")}
    found = leaves(grid.SweepConfig)
    names_of_ours = [
        "config.objective.name",
        "config.estimator.scheme",
        "config.train.keep_best",
        "config.lora.targets",
    ]
    names_of_ours += ["config.judge.name", "config.judge.model", "config.trackers"]
    assert [key for key, hint in found.items() if hint in (str, list[str])] == names_of_ours
    kinds = (paths.resolve, paths.resolve_all, paths.resolve_sources)
    of_paths = {key for key, hint in found.items() if any(kind.__name__ in str(hint) for kind in kinds)}
    assert of_paths == locations


@pytest.mark.parametrize("key", ["model.path", "data.train", "data.eval", "reference.path", "tasks"])
def test_config_keys(key, home):
    mapping = load_config_file("configs/tiny.py").to_dict()
    group, _, name = key.rpartition(".")
    (mapping[group] if group else mapping)[name] = "~/x.yaml"
    resolved = config.Config.from_mapping(mapping)
    assert getattr(getattr(resolved, group) if group else resolved, name) == f"{home}/x.yaml"
    assert config.Config.from_mapping(resolved.to_dict()) == resolved
    (mapping[group] if group else mapping)[name] = "file://b/x"
    with pytest.raises(UserError, match=f"^config.{key}=file://b/x: file:// addresses"):
        config.Config.from_mapping(mapping)
    (mapping[group] if group else mapping)[name] = "\ud800"
    with pytest.raises(UserError, match=f"config.{key}: not UTF-8"):
        config.Config.from_mapping(mapping)


def test_a_config_file_with_a_colon_in_its_name(tmp_path):
    file = tmp_path / "a:b.py"
    file.write_text("from ml_collections import ConfigDict\ndef get_config(x=1): return ConfigDict({'x': x})\n")
    assert load_config_file(str(file)).x == 1
