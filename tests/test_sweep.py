"""The command `sweep` on tiny random models: the grid, going on after an end at any point, and devices."""

import functools
import json
import os
import re
import shutil
import signal

import pytest

from elbo_kto_jax import config, sweep
from elbo_kto_jax.checkpoint import store
from elbo_kto_jax.errors import Interrupted, UserError
from elbo_kto_jax.sharding import rules
from tests import runs

PROMPTS = [{"prompt": [{"role": "user", "content": f"Capitals {word}"}], "answer": word} for word in ("a", "bc", "def")]
SAMPLERS = [{}, {"steps": 2}]


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    from launch.quickstart import write_untrained

    folder = tmp_path_factory.mktemp("checkpoint") / "other"
    write_untrained(folder, seed=1)
    return folder


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
    read, original = [], store.load_model
    spy = lambda path, **more: read.append(str(path)) or original(path, **more)  # noqa: E731
    monkeypatch.setattr(store, "load_model", spy)
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
    begun, evaluate = [], sweep._Run._evaluate

    def end(self, cell):
        begun.append(cell.name)
        if len(begun) == number:
            raise error
        return evaluate(self, cell)

    monkeypatch.setattr(sweep._Run, "_evaluate", end)
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
    evaluate = sweep._Run._evaluate
    signalled = lambda self, cell: os.kill(os.getpid(), signal.SIGTERM) or evaluate(self, cell)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(sweep._Run, "_evaluate", signalled)
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
    mine = shutil.copytree(tiny_checkpoint, tmp_path / "mine")
    grid = {"tasks": ["exact_elbo"], "checkpoints": [str(tiny_checkpoint), str(mine)]}
    command(**grid)
    os.utime(mine / "model.safetensors", (1, 1))
    begun = ends_in(monkeypatch, 0, RuntimeError())
    command(**grid)
    assert [name.partition("_")[0] for name in begun] == ["mine"]


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


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"checkpoints": []}, r"config\.sweep\.checkpoints: empty"),
        ({"sampler": [{"stebs": 1}]}, r"config\.sweep\.sampler: .*unknown config key `config\.sampler\.stebs`"),
        ({"sampler": [{"steps": 3, "block_length": 2}]}, r"config\.sampler\.steps: 3 steps"),
        ({"sampler": [{}, {}]}, r"config\.sweep\.sampler: lists \{\} twice"),
        ({"draws": [4, 1, 4]}, r"config\.sweep\.draws: lists 4 twice"),
        ({"baseline": ""}, r"config\.sweep\.baseline: missing"),
        ({"prompts": ""}, r"config\.sweep\.prompts: missing"),
        ({"data": ""}, r"config\.sweep\.data: missing"),
        ({"checkpoints": ["nowhere/at/all"]}, r"config\.sweep\.checkpoints=nowhere/at/all"),
        ({"baseline": "nowhere/at/all"}, r"config\.sweep\.baseline=nowhere/at/all"),
    ],
)
def test_wrong_grids_are_refused_before_anything_is_loaded(command, tmp_path, loads, grid, message):
    with pytest.raises(UserError, match=message) as refused:
        command(**grid)
    assert len(str(refused.value).splitlines()) <= 2
    assert loads == []
    assert not (tmp_path / "run").exists()


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


def _results(cells, task):
    return [cell / f"{task}.json" for cell in cells if (cell / f"{task}.json").is_file()]
