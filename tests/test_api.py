"""api.py: the example of docs/python.md as it stands there, and that its numbers are those of the commands."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from elbo_kto_jax import api, score, train
from elbo_kto_jax.data.capitals import write_data
from elbo_kto_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("shared_programs")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "python.md"
SHORT = {"steps": 2, "global_batch_size": 4, "microbatch_tokens": 1024, "samples": 0}  # a row for each device


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tmp_path_factory):
    """What the example needs."""
    made = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_checkpoint, made / "base")
    write_data(made, seed=0)
    lines = (made / "feedback.jsonl").read_text().splitlines(keepends=True)
    (made / "feedback.jsonl").write_text("".join(lines[:8]))
    return made


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A folder with what the example needs, and in it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return code


def test_the_example_runs_and_is_short(folder, capsys, monkeypatch):
    recipe = api.recipe

    def shorter(name):
        config = recipe(name)
        config["train"].update(SHORT)
        return config

    monkeypatch.setattr(api, "recipe", shorter)
    assert len([line for line in example().splitlines() if line.strip()]) <= 15
    exec(compile(example(), str(PAGE), "exec"), {})
    scored, before, metrics, after = [
        line for line in capsys.readouterr().out.splitlines() if line[:1] in "[-0123456789"
    ]
    assert '"elbo"' in scored.replace("'", '"')
    assert math.isfinite(float(metrics.split()[0]))
    assert before != ""
    assert after != ""
    assert (folder / "runs" / "aligned" / "report.html").is_file()


def test_it_gives_the_numbers_of_the_commands(folder, tmp_path):
    config = api.recipe("tiny")
    config["model"]["path"], config["data"]["train"] = "base", "feedback.jsonl"
    config["train"].update(SHORT)
    record = {"id": "a", "prompt": "Capitals abc", "completion": "ABC"}
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    changes = [f"--config.train.{key}={value}" for key, value in SHORT.items()]
    score.main(["--config=tiny", *changes, "--checkpoint=base", "--data=records.jsonl", "--out=scores.jsonl"])
    expected = json.loads((tmp_path / "scores.jsonl").read_text())
    assert api.load("base", config).score([record]) == [expected]
    assert api.load("base", config).score("records.jsonl") == [expected]

    changes += ["--config.model.path=base", "--config.data.train=feedback.jsonl"]
    summary = train.main(["--config=tiny", *changes, "--workdir=command"])
    run = api.train(config, "library")
    assert run.summary["loss"] == summary["loss"]
    assert [row["step"] for row in run.metrics] == [1, 2]


def test_a_wrong_key_is_refused_by_name(folder):
    config = api.recipe("tiny")
    config["model"]["pth"] = "base"
    with pytest.raises(UserError, match=r"config.model.pth"):
        api.load("base", config)
