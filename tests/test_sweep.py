"""The command `sweep` on tiny random models: the grid, going on after an end at any point, and devices."""

import functools
import json
import os
import re
import shutil
import signal
import threading
import time

import pytest

from elbo_kto_jax import sweep
from elbo_kto_jax.evaluation import sweep_tables
from elbo_kto_jax.evaluation.sweep import Grid
from elbo_kto_jax.evaluation.sweep_tasks import WinRate
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.sampling import respond
from elbo_kto_jax.sharding import rules
from tests import runs
from tests.evaluation.chat_server import serve

pytestmark = pytest.mark.usefixtures("shared_programs")

PROMPTS = [{"prompt": [{"role": "user", "content": f"Capitals {word}"}], "answer": word} for word in ("a", "bc", "def")]
SAMPLERS = [{}, {"steps": 2}]


@pytest.fixture
def command(tiny_checkpoint, other_checkpoint, tmp_path):
    """Runs the command in tmp_path/run with a grid that is changed by `grid`; returns its summary."""
    prompts = runs.write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    data = runs.write_jsonl(tmp_path / "data.jsonl", runs.records(4))

    def run(*more: str, workdir="run", **grid) -> dict:
        settings = {
            "checkpoints": [str(tiny_checkpoint), str(other_checkpoint)],
            "tasks": ["win_rate", "elbo", "exact_elbo"],
            "sampler": SAMPLERS,
            "draws": [1, 4],
            "baseline": str(tiny_checkpoint),
            "prompts": str(prompts),
            "data": str(data),
            "limit": 0,
            **grid,
        }
        file = runs.grid(tmp_path / "grid.py", settings)
        return sweep.main(runs.flags({}, f"--workdir={tmp_path / workdir}", *more, config=file))

    return run


@pytest.fixture
def loads(monkeypatch):
    """The checkpoints whose weights are read, in order."""
    read, original = [], respond.load_model
    spy = lambda path, **more: read.append(str(path)) or original(path, **more)  # noqa: E731
    monkeypatch.setattr(respond, "load_model", spy)
    return read


def test_grid(command, tmp_path, loads, tiny_checkpoint, other_checkpoint):
    """Each task takes its own axes, each checkpoint is loaded once, and a second run finds everything done."""
    summary = command()
    assert (summary["cells"], summary["done"]) == (10, 10)  # 2 checkpoints x (2 samplers + 2 numbers of draws + 1)
    assert loads == [str(tiny_checkpoint), str(other_checkpoint)]
    rows = runs.table(tmp_path / "run")
    assert summary["table"] == str(tmp_path / "run" / "table.csv")
    assert [(row["task"], row["sampler"], row["draws"]) for row in rows[:5]] == [
        ("win_rate", "{}", ""),
        ("win_rate", '{"steps": 2}', ""),
        ("elbo", "", "1"),
        ("elbo", "", "4"),
        ("exact_elbo", "", ""),
    ]
    own, other = rows[:5], rows[5:]
    assert {row["checkpoint"] for row in own} == {str(tiny_checkpoint)}
    assert [row["value"] for row in own[:2]] == ["0.5", "0.5"]  # against itself, under identical decoding
    assert len({row["value"] for row in rows if "elbo" in row["task"]}) == 6
    for group in (own, other):  # within 4.5 standard errors, of which the interval has 1.96
        exact, four = float(group[4]["value"]), group[3]
        assert abs(float(four["value"]) - exact) < 4.5 / 1.96 * (float(four["high"]) - float(four["value"]))
    markdown = (tmp_path / "run" / "table.md").read_text().splitlines()
    assert len(markdown) == 12
    assert len({line.count(" | ") for line in markdown}) == 1
    report = (tmp_path / "run" / "report.html").read_text()
    assert "10 of 10 evaluations done: 2 checkpoints, 3 tasks." in report
    assert report.count("<figure>") == 4  # a win rate for each sampler, the ELBO over K, the exact one
    assert all((cell / "result.json").is_file() for cell in (tmp_path / "run" / "cells").iterdir())

    loads.clear()
    assert command() == summary
    assert loads == []


def ends_in(monkeypatch, number: int, error: BaseException) -> list[str]:
    """The cells that are begun; beginning the one of this number raises `error`."""
    begun, evaluate = [], Grid._evaluate

    def end(self, cell):
        begun.append(cell.name)
        if len(begun) == number:
            raise error
        return evaluate(self, cell)

    monkeypatch.setattr(Grid, "_evaluate", end)
    return begun


@pytest.mark.parametrize("end", [KeyboardInterrupt(), RuntimeError("the machine is gone")], ids=["killed", "crashed"])
def test_it_goes_on_where_it_was(command, tmp_path, monkeypatch, end):
    """Ended in the fourth cell of six: three are kept, the other three evaluated, and the table is that of one run."""
    grid = {"tasks": ["win_rate", "exact_elbo"]}
    command(workdir="whole", **grid)
    with monkeypatch.context() as patch:
        begun = ends_in(patch, 4, end)
        with pytest.raises(type(end)):
            command(**grid)
    assert len(runs.table(tmp_path / "run")) == 3
    again = ends_in(monkeypatch, 0, end)
    summary = command(**grid)
    assert again == [begun[3], *again[1:]]
    assert (len(again), summary["done"]) == (3, 6)
    assert runs.table(tmp_path / "run") == runs.table(tmp_path / "whole")


def test_a_signal_ends_it_after_the_cell(command, tmp_path, monkeypatch):
    grid = {"tasks": ["exact_elbo"]}
    evaluate = Grid._evaluate
    signalled = lambda self, cell: os.kill(os.getpid(), signal.SIGTERM) or evaluate(self, cell)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Grid, "_evaluate", signalled)
        with pytest.raises(Interrupted, match="1 of 2 cells are done"):
            command(**grid)
    assert len(runs.table(tmp_path / "run")) == 1
    assert command(**grid)["done"] == 2


def test_a_result_that_is_not_whole_is_evaluated_again(command, tmp_path, monkeypatch):
    grid = {"tasks": ["exact_elbo"]}
    command(**grid)
    results = sorted((tmp_path / "run" / "cells").glob("*/result.json"))
    results[0].write_text(results[0].read_text()[:-20])
    begun = ends_in(monkeypatch, 0, RuntimeError())
    command(**grid)
    assert begun == [results[0].parent.name]


def test_other_weights_at_the_same_place_are_evaluated_again(command, tmp_path, tiny_checkpoint, monkeypatch):
    """Of the same size and age; another age alone changes nothing."""
    mine = shutil.copytree(tiny_checkpoint, tmp_path / "mine")
    grid = {"tasks": ["exact_elbo"], "checkpoints": [str(tiny_checkpoint), str(mine)]}
    command(**grid)
    begun = ends_in(monkeypatch, 0, RuntimeError())
    os.utime(mine / "model.safetensors", (1, 1))
    command(**grid)
    assert begun == []
    weights = bytearray((mine / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    runs.replace_keeping_age(mine / "model.safetensors", bytes(weights))
    command(**grid)
    assert [name.partition("_")[0] for name in begun] == ["mine"]


@pytest.mark.parametrize("form", ["file", "folder", "split"])
def test_other_data_at_the_same_place_are_evaluated_again(command, tmp_path, tiny_checkpoint, monkeypatch, form):
    """One answer is another, in a file of the same name, size and age."""
    file = tmp_path / {"file": "mine.jsonl", "folder": "mine/part.jsonl", "split": "mine/test/part.jsonl"}[form]
    runs.write_jsonl(file, runs.records(2))
    source = {"file": file, "folder": file.parent, "split": f"{tmp_path / 'mine'}:test"}[form]
    grid = {"tasks": ["exact_elbo", "elbo"], "draws": [], "checkpoints": [str(tiny_checkpoint)], "data": str(source)}
    command(**grid)
    before = runs.table(tmp_path / "run")
    begun = ends_in(monkeypatch, 0, RuntimeError())
    command(**grid)
    assert begun == []
    found = file.read_bytes()
    runs.replace_keeping_age(file, found.replace(b'"content": "2"', b'"content": "7"', 1))
    command(**grid)
    assert len(begun) == 2
    after = runs.table(tmp_path / "run")
    assert all(a["value"] != b["value"] for a, b in zip(before, after, strict=True))


def test_a_hub_data_set_that_changed_is_evaluated_again(command, tmp_path, tiny_checkpoint, monkeypatch):
    """The name of a data set stays, and what a later download gives is other content."""
    folder = tmp_path / "snapshot"
    runs.write_jsonl(folder / "train.jsonl", runs.records(2))
    monkeypatch.setattr("elbo_kto_jax.data.sources._download", lambda *arguments: folder)
    grid = {"tasks": ["exact_elbo"], "checkpoints": [str(tiny_checkpoint)], "data": "somebody/something"}
    command(**grid)
    begun = ends_in(monkeypatch, 0, RuntimeError())
    runs.write_jsonl(folder / "train.jsonl", runs.records(3)[1:])
    command(**grid)
    assert len(begun) == 1


def test_a_signal_ends_it_while_the_judge_is_awaited(command, other_checkpoint, monkeypatch):
    """The signal comes before, while the cell's answers are made, and nobody waits for the judge after them."""
    over = threading.Event()
    grid = {"tasks": ["win_rate"], "sampler": [{}], "checkpoints": [str(other_checkpoint)]}
    judge = ["--judge=chat", "--judge-model=m", "--judge-timeout=600"]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "")
    answers, sent = WinRate._answers, []

    def signalled(self, *cell):
        if not sent:  # a second one would act at once, as everywhere
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return answers(self, *cell)

    with serve(lambda prompt, number: {"wait": over}) as server, monkeypatch.context() as patch:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        patch.setattr(WinRate, "_answers", signalled)
        began = time.monotonic()
        with pytest.raises(Interrupted, match="replies of the judge are kept; the same command goes on"):
            command(*judge, **grid)
        assert time.monotonic() - began < 60
        over.set()
    with serve(lambda prompt, number: "[[tie]]") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert command(*judge, **grid)["done"] == 1


def test_the_table_is_text_whatever_the_names_are(command, tmp_path, tiny_checkpoint):
    """Neither HTML, Markdown, links nor line breaks of a name are those of table.md; a long one is cut."""
    name = "<img src=x onerror=alert(1)>|[a](javascript:b)`c`\n# d *e* _f_ https: & g_h"
    mine, long = tmp_path / name, tmp_path.joinpath(*["long" * 50] * 10)
    for copy in (mine, long):
        shutil.copytree(tiny_checkpoint, copy)
    command(tasks=["exact_elbo"], checkpoints=[str(mine), str(long)])
    text = (tmp_path / "run" / "table.md").read_text()
    lines = text.splitlines()
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10}
    assert max(map(len, lines)) < 500
    assert "<" not in text
    assert (
        "&lt;img src=x onerror=alert(1)&gt;\\|\\[a\\](javascript:b)\\`c\\` # d \\*e\\* \\_f\\_ https: &amp; g_h" in text
    )
    assert runs.table(tmp_path / "run")[0]["checkpoint"] == str(mine)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("acc_norm,none", "acc_norm,none"),
        ('{"steps": 2}', '{"steps": 2}'),
        ("http://evil.example", "http&#58;//evil.example"),
        ("www.evil.example", "www&#46;evil.example"),
        ("a\\|b", "a\\\\\\|b"),
        ("![x](y)", "\\!\\[x\\](y)"),
        ("&lt;", "&amp;lt;"),
        ("a\r\n| --- |\u2028b\x1b[31m", "a \\| --- \\| b\ufffd\\[31m"),
        ("x" * 100_000, "x" * 199 + "…"),
    ],
)
def test_markdown_text(value, text):
    assert sweep_tables._markdown_text(value) == text


def test_another_grid_is_refused_with_the_difference(command, tmp_path):
    grid = {"tasks": ["exact_elbo"]}
    command(**grid)
    with pytest.raises(UserError, match=r"config\.sweep\.tasks: \['exact_elbo'\] -> \['elbo'\]"):
        command(tasks=["elbo"])
    assert command("--overwrite", tasks=["elbo"], draws=[])["cells"] == 2


def test_eight_devices_give_what_one_gives(command, tmp_path, cpu_devices, monkeypatch):
    """Prompts and rows are spread over the devices: the answers are the same, sums are rounded differently."""
    grid = {"tasks": ["win_rate", "elbo"], "draws": [4]}
    command(workdir="eight", **grid)
    make_mesh = rules.make_mesh
    assert make_mesh(config.Mesh(-1, 1, 1)).size == 8
    monkeypatch.setattr(rules, "make_mesh", functools.partial(make_mesh, devices=cpu_devices[:1]))
    command(workdir="one", **grid)
    eight, one = runs.table(tmp_path / "eight"), runs.table(tmp_path / "one")
    assert len(eight) == 6
    for a, b in zip(eight, one, strict=True):
        assert float(a["value"]) == pytest.approx(float(b["value"]), rel=1e-5)
    answers = lambda folder: [  # noqa: E731
        json.loads(file.read_text())["answers"] for file in sorted((tmp_path / folder / "answers").iterdir())
    ]
    assert answers("eight") == answers("one")
    assert len(answers("one")) == 4


def long(tokens: int) -> dict[str, int]:
    """A setting of the sampler for answers of so many tokens; the models take 128, the prompt included."""
    return {"gen_length": tokens, "steps": tokens, "block_length": tokens}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"checkpoints": []}, r"config\.sweep\.checkpoints: empty"),
        ({"sampler": [{"stebs": 1}]}, r"config\.sweep\.sampler: .*unknown config key `config\.sampler\.stebs`"),
        ({"sampler": [{"steps": 3, "block_length": 2}]}, r"config\.sampler\.steps: 3 steps"),
        (
            {"sampler": [{"steps": 0}]},
            r"config\.sweep\.sampler: .*'steps': 0.*config\.sampler\.steps: expected a number",
        ),
        ({"sampler": [{}, {}]}, r"config\.sweep\.sampler: lists \{\} twice"),
        ({"draws": [4, 1, 4]}, r"config\.sweep\.draws: lists 4 twice"),
        ({"baseline": ""}, r"config\.sweep\.baseline: missing"),
        ({"prompts": ""}, r"config\.sweep\.prompts: missing"),
        ({"data": ""}, r"config\.sweep\.data: missing"),
        ({"checkpoints": ["nowhere/at/all"]}, r"config\.sweep\.checkpoints=nowhere/at/all"),
        ({"baseline": "nowhere/at/all"}, r"config\.sweep\.baseline=nowhere/at/all"),
        (
            {"sampler": [{}, {"threshold": 0.5, "remasking": "random"}]},
            r"config\.sweep\.sampler \{'threshold': 0\.5, .*tasks 'win_rate', .*: config\.sampler\.threshold: compares",
        ),
        (
            {"sampler": [{}, long(256)]},
            r"sampler \{'gen_length': 256.*config\.sampler\.gen_length: 256, but .* 128 tok",
        ),
        (
            {"sampler": [{}, long(128)]},
            r"sampler \{'gen_length': 128.*prompts\.jsonl:1: field `prompt`: .* at most 0 leave",
        ),
    ],
)
def test_wrong_grids_are_refused_before_anything_is_loaded(command, tmp_path, loads, grid, message):
    with pytest.raises(UserError, match=message) as refused:
        command(**grid)
    assert len(str(refused.value).splitlines()) <= 2
    assert loads == []
    assert not (tmp_path / "run").exists()


def test_what_no_model_can_do_is_refused_before_anything_is_loaded(command, tmp_path, loads, tiny_checkpoint):
    """A record that is too long to enumerate, and a checkpoint that lacks a part, after cells that would run."""
    digits = {"prompt": "Count", "completion": "0123456789" * 2}
    data = runs.write_jsonl(tmp_path / "long.jsonl", [*runs.records(2), digits])
    said = r"config\.sweep\.tasks 'exact_elbo', config\.sweep\.checkpoints '.*tiny'.*21 tokens, at most 12"
    with pytest.raises(UserError, match=said):
        command(data=str(data))
    lacking = shutil.copytree(tiny_checkpoint, tmp_path / "lacking")
    weights = (lacking / "model.safetensors").read_bytes()
    (lacking / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"lacking/model\.safetensors"):
        command(checkpoints=[str(tiny_checkpoint), str(lacking)])
    assert loads == []
    assert not (tmp_path / "run").exists()


def test_a_grid_grows(command, tmp_path, tiny_checkpoint, monkeypatch):
    """Values are added to the lists, and the one cell that is done is kept; every task takes the first two examples."""
    data = runs.write_jsonl(tmp_path / "two.jsonl", [*runs.records(2), {"prompt": "Count", "completion": "01" * 10}])
    grid = {"data": str(data), "limit": 2, "sampler": [{}]}  # the third record is too long to enumerate
    command(tasks=["elbo"], checkpoints=[str(tiny_checkpoint)], draws=[4], baseline="", prompts="", **grid)
    (before,) = runs.table(tmp_path / "run")
    begun = ends_in(monkeypatch, 0, RuntimeError())
    summary = command(tasks=["win_rate", "elbo", "exact_elbo"], draws=[1, 4], **grid)
    assert (summary["cells"], len(begun)) == (8, 7)
    assert before in runs.table(tmp_path / "run")
    for cell in (tmp_path / "run" / "cells").iterdir():
        (details,) = cell.glob("*.jsonl")  # of the comparisons, or of the records
        assert len(runs.read_jsonl(details)) == 2
    with pytest.raises(UserError, match=r"config\.sweep\.draws: \[1, 4\] -> \[4\]"):
        command(tasks=["win_rate", "elbo", "exact_elbo"], draws=[4], **grid)


def test_tasks_of_the_harness(command, tmp_path, monkeypatch, tiny_checkpoint):
    """A task that writes takes the sampler's axis, one that compares likelihoods that of the draws."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    pytest.importorskip("datasets", reason="the extra `eval` is not installed")
    from tests.evaluation import test_harness as harness

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    docs = runs.write_jsonl(tmp_path / "docs.jsonl", harness.DOCS)
    tasks = [tmp_path / "local_write.yaml", tmp_path / "local_choose.yaml"]
    for path, text in zip(tasks, (harness.WRITE, harness.CHOOSE), strict=True):
        path.write_text(text.format(data=docs, stop="###", more=""))
    table_file = tmp_path / "tasks.py"
    table_file.write_text(harness.TABLE)
    grid = {"tasks": [str(task) for task in tasks], "limit": 2, "draws": [1, 8, 16], "sampler": [{}, {"steps": 4}]}
    summary = command(f"--task-table={table_file}", checkpoints=[str(tiny_checkpoint)], **grid)
    assert summary["cells"] == 2 + 3
    rows = runs.table(tmp_path / "run")
    assert {row["metric"] for row in rows} == {"exact_match,none", "acc,none"}
    cells = sorted((tmp_path / "run" / "cells").iterdir())
    steps = [json.loads(file.read_text())["config"]["model_args"]["steps"] for file in _results(cells, "local_write")]
    assert sorted(steps) == [4, 8]  # the grid over the table over config.sampler
    draws = [json.loads(file.read_text())["config"]["model_args"]["draws"] for file in _results(cells, "local_choose")]
    assert sorted(draws) == [1, 8, 16]
    report = (tmp_path / "run" / "report.html").read_text()
    assert re.search(r'aria-label="local_choose.yaml: acc,none[^"]*draws K', report)
    with pytest.raises(
        UserError, match=r"sampler \{'gen_length': 256.*local_write.*: config\.sampler\.gen_length: 256"
    ):
        command(f"--task-table={table_file}", workdir="other", **{**grid, "sampler": [{}, long(256)]})


def _results(cells, task):
    return [cell / f"{task}.json" for cell in cells if (cell / f"{task}.json").is_file()]
