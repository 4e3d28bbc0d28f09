"""What tells checkpoints apart, and files of an earlier evaluation that are damaged."""

import json
import shutil

import pytest

from elbo_kto_jax.evaluation import kept
from elbo_kto_jax.runtime.errors import UserError
from tests import runs


def test_a_checkpoint_is_its_content(tiny_checkpoint, tmp_path):
    """Not its place, the age of its files or what a download noted; but every byte, and every file's name."""
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    content = kept.pin(str(tiny_checkpoint), "--checkpoint").content
    (copy / ".cache").mkdir()
    (copy / ".cache" / "note").write_text("now")
    assert kept.pin(str(copy), "--checkpoint").content == content
    config = (copy / "config.json").read_bytes()
    runs.replace_keeping_age(copy / "config.json", config.swapcase())
    assert kept.pin(str(copy), "--checkpoint").content != content
    (copy / "config.json").write_bytes(config)
    (copy / "tokenizer_config.json").rename(copy / "tokenizer_config.jsom")
    assert kept.pin(str(copy), "--checkpoint").content != content


def test_a_run_that_goes_on_is_the_step_that_it_was(tmp_path):
    for step in ("2", "10"):
        runs.write_jsonl(tmp_path / "checkpoints" / step / "assets" / "manifest.json", [step])
    pinned = kept.pin(str(tmp_path), "--checkpoint")
    assert pinned.folder == str(tmp_path / "checkpoints" / "10")
    assert pinned.source == str(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"asked": 3, "done": {}, "settings": []}', "[" * 100_000])
def test_a_damaged_record_is_none(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    (tmp_path / "report.html").write_text("earlier")
    assert not kept.is_unfinished(tmp_path)
    part = {"win_rate": kept.Part([tmp_path / "report.html"], {"seed": 0})}
    with pytest.raises(UserError, match=r"report\.html exists already; "):
        kept.Progress(tmp_path, part, overwrite=False)
    kept.Progress(tmp_path, part, overwrite=True)
    assert kept.is_unfinished(tmp_path)


def test_results_of_other_commands_keep_their_settings(tmp_path):
    first = kept.Progress(tmp_path, {"win_rate": kept.Part([], {"seed": 0})}, overwrite=False)
    first.finish("win_rate")
    kept.Progress(tmp_path, {"tasks/gsm8k": kept.Part([], {"seed": 1})}, overwrite=False).finish("tasks/gsm8k")
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored["settings"] == {"win_rate": {"seed": 0}, "tasks/gsm8k": {"seed": 1}}
    assert not kept.is_unfinished(tmp_path)


@pytest.mark.parametrize("judge", [None, "another"])
def test_the_judge_may_be_another_until_there_are_verdicts(tmp_path, judge):
    part = lambda name: {"win_rate": kept.Part([tmp_path / "report.html"], {"seed": 0, "judge": name})}  # noqa: E731
    kept.Progress(tmp_path, part("first"), overwrite=False)
    (tmp_path / "report.html").write_text("half")
    kept.Progress(tmp_path, part(judge), overwrite=False).finish("win_rate")
    with pytest.raises(UserError, match="exists already, of another evaluation"):
        kept.Progress(tmp_path, part("third"), overwrite=False)
