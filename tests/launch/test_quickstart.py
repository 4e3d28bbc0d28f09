"""The quickstart as a user runs it: ELBO-KTO gains where its labels say something, and not otherwise.

One process per case, all in one working folder: the fine-tuned base model is made once. With 500 prompts the standard
error of a win rate is at most 0.5 / sqrt(500) = 2.24 points, and a bound of 4 of them is crossed by chance once in
16,000 times.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elbo_kto_jax import quickstart
from elbo_kto_jax.data import capitals
from elbo_kto_jax.runtime.errors import UserError
from tests.conftest import PROJECT_ROOT
from tests.runs import read_jsonl
from tests.share import cases

FOUR_STANDARD_ERRORS = 4 * 0.5 / capitals.HELD_OUT**0.5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the script with more flags, in the folder of the runs before; returns its summary."""
    workdir, cache = tmp_path_factory.mktemp("quickstart") / "run", tmp_path_factory.mktemp("cache")
    # As users have it: not the eight CPU devices, the compiler's flags and the cache of the other tests. The platform
    # stays, since libtpu may be installed where there is no TPU.
    dropped = ("XLA_", "JAX_COMPILATION", "JAX_PERSISTENT")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    environment |= {"PYTHON": sys.executable, "XDG_CACHE_HOME": str(cache)}

    def run(*flags: str) -> dict:
        shutil.rmtree(workdir / "aligned", ignore_errors=True)
        command = ["bash", str(PROJECT_ROOT / "launch" / "quickstart.sh"), f"--workdir={workdir}", *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def aligned(run) -> dict:
    return run()


def test_the_aligned_model_beats_the_base_model(aligned):
    assert 0.25 < aligned["base_accuracy"] < 0.6  # it has learnt good and bad answers alike
    assert aligned["aligned_accuracy"] > aligned["base_accuracy"] + 0.2
    assert aligned["adjusted_win_rate"] > 0.659  # of LLaDA-8B-Instruct in the paper; here there is more to gain
    assert aligned["ci95"][0] > 0.5
    assert aligned["comparisons"] == capitals.HELD_OUT
    assert Path(aligned["report"]).is_file()


@pytest.mark.usefixtures("aligned")  # it makes the base model
@pytest.mark.parametrize("flag", cases(["--shuffle-labels"], ["--config.objective.beta=0"]))
def test_without_information_there_is_nothing_to_gain(run, flag):
    assert abs(run(flag)["adjusted_win_rate"] - 0.5) < FOUR_STANDARD_ERRORS


def test_data_are_distinct_and_depend_on_the_seed_alone(tmp_path):
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        capitals.write_data(tmp_path / name, seed)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["demonstrations.jsonl", "feedback-shuffled.jsonl", "feedback.jsonl", "prompts.jsonl"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "b" / file).read_bytes()
    prompts = [
        json.dumps(row["prompt"])
        for file in files
        if "shuffled" not in file
        for row in read_jsonl(tmp_path / "a" / file)
    ]
    assert len(set(prompts)) == len(prompts)


def test_labels_are_of_good_answers_until_shuffled(tmp_path):
    capitals.write_data(tmp_path, 0)
    feedback, shuffled = read_jsonl(tmp_path / "feedback.jsonl"), read_jsonl(tmp_path / "feedback-shuffled.jsonl")
    for row in feedback:
        digits, answer = row["prompt"][0]["content"].split()[-1], row["completion"][0]["content"]
        assert (answer == capitals.good_answer(digits)) == row["label"]
    without = lambda rows: [{**row, "label": None} for row in rows]  # noqa: E731
    assert without(shuffled) == without(feedback)
    agree = sum(a["label"] == b["label"] for a, b in zip(feedback, shuffled, strict=True))
    assert abs(agree / len(feedback) - 0.5) < 4 * 0.5 / len(feedback) ** 0.5
    assert sum(row["label"] for row in shuffled) == sum(row["label"] for row in feedback)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not the folder of a quickstart"):
        quickstart.main([f"--workdir={tmp_path}", "--overwrite"])
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_with_another_seed_is_kept_unless_asked(tmp_path):
    (tmp_path / "quickstart.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match=r'with other settings .*"seed": 1.*\n.*--overwrite'):
        quickstart.main([f"--workdir={tmp_path}", "--seed=0"])
