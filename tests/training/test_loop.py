"""training/loop.py: whole runs of `train` on a tiny model: what they leave, and that they can be cut short."""

import collections
import itertools
import json
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from elbo_kto_jax import precompute, score, to_hf, trackers, train
from elbo_kto_jax.checkpoints.load import load_model
from elbo_kto_jax.runtime import provenance
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.runtime.metric_names import EVAL
from elbo_kto_jax.runtime.metric_names import METRICS as METRIC_NAMES
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.training import inputs, loop
from elbo_kto_jax.training.reference import ReferenceCache
from elbo_kto_jax.training.state import learning_rate
from tests import runs

pytestmark = pytest.mark.usefixtures("shared_programs")
STEPS = runs.SMALL["train.steps"]
METRICS = {  # INTERFACES: workdir/metrics.jsonl
    *"""step loss reward_desirable reward_undesirable reward_margin reference_point saturated_fraction grad_norm
    learning_rate examples tokens real_token_fraction seconds reward_variance draws_needed
    gradient_noise_scale""".split()  # noqa: SIM905
}
SUMMARY = {  # INTERFACES: the last line of stdout
    *"steps examples loss reward_margin examples_per_second tokens_per_second checkpoint interrupted".split()  # noqa: SIM905
}


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory):
    """Six examples in batches of four: the second batch of an epoch is smaller. A seventh record is dropped."""
    folder = tmp_path_factory.mktemp("data")
    long = {**runs.records(1)[0], "id": "long", "prompt": "Sort 12345 " * 20}
    return {
        "model.path": tiny_checkpoint,
        "data.train": runs.write_jsonl(folder / "train.jsonl", [*runs.records(6), long]),
        "data.eval": runs.write_jsonl(folder / "eval.jsonl", runs.records(4, first=6)),
        "train.eval_every": 2,
    }


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """An uninterrupted run: its working folder and its summary."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, train.main(runs.flags({**settings, "train.samples": 2}, f"--workdir={workdir}"))


@pytest.fixture
def in_step(monkeypatch):
    """Lets something happen in the n-th (from 1) call of a function that loop.py or reference.py uses."""

    def arrange(module, name: str, number: int, event) -> None:
        calls, real = [], getattr(module, name)

        def call(*args, **options):
            calls.append(1)
            if len(calls) == number:
                event()
            return real(*args, **options)

        monkeypatch.setattr(module, name, call)

    return arrange


def trackers_that_keep(monkeypatch, fails: dict[str, int]) -> list[tuple]:
    """Puts stand-ins in the place of all trackers; (tracker, what it was told). Those in `fails` fail at that step."""
    told = []

    class StandIn:
        def __init__(self, name, run):
            self.name, self.key, self.sent = name, "key", run.sent

        def metrics(self, step, values):
            told.append((self.name, step))
            if fails.get(self.name) == step:
                raise OSError("no network")

        def samples(self, step, when, samples):
            pass

        def report(self, step, file):
            assert "<svg" in file.read_text()
            told.append((self.name, f"report after {step}"))

        def close(self, finished):
            pass

    monkeypatch.setattr(trackers, "check", lambda name: None)
    monkeypatch.setattr(trackers, "begin", StandIn)
    return told


def metrics_of(workdir, without=("seconds",)) -> list[dict]:
    rows = runs.read_jsonl(workdir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


def events_of(workdir) -> tuple[dict, dict]:
    """Tag -> step -> value of the numbers, and of the texts, in the event files of tensorboard/."""
    scalars, texts = collections.defaultdict(dict), collections.defaultdict(dict)
    for file in (workdir / "tensorboard").iterdir():
        content, start = file.read_bytes(), 0
        while start < len(content):
            (size,) = struct.unpack_from("<Q", content, start)
            event = Event.FromString(content[start + 12 : start + 12 + size])
            start += size + 16  # a checksum after the size, and one after the event
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "text":
                    texts[value.tag][event.step] = value.tensor.string_val[0].decode()
                else:
                    scalars[value.tag][event.step] = value.simple_value
    return scalars, texts


def assert_same_run(workdir, other):
    """Bit-identical final parameters, and the same metrics but for the time."""
    mine, theirs = load_model(workdir), load_model(other)
    assert mine.source.endswith(f"checkpoints/{STEPS}")
    assert theirs.source.endswith(f"checkpoints/{STEPS}")
    for a, b in zip(jax.tree.leaves(mine.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert metrics_of(workdir) == metrics_of(other)


def recorded(workdir) -> dict:
    return json.loads((workdir / "config.json").read_text())


# ---- what a run leaves ----


def test_working_folder(whole, settings):
    workdir, _ = whole
    written = json.loads((workdir / "config.json").read_text())
    assert written["config"]["model"]["path"] == str(settings["model.path"])
    assert written["versions"].keys() == {"jax", "elbo_kto_jax"}
    start = written["provenance"][0]
    assert start["command"] == shlex.join(sys.orig_argv)
    assert start["versions"]["jax"] == jax.__version__
    assert start["versions"].keys() >= {"elbo_kto_jax", "python", "libtpu"}
    assert start["devices"]["number"] == jax.device_count()
    assert {step.name for step in (workdir / "checkpoints").iterdir()} == {"2", "4", "5"}
    assert [len(list((workdir / name).glob("*/fingerprint.json"))) for name in ("reference", "reference_eval")] == [
        1,
        1,
    ]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    samples = json.loads((workdir / "samples.json").read_text())
    assert [sample.keys() for sample in samples] == [{"prompt", "before", "after"}] * 2
    assert all("Sort" in sample["prompt"][0]["content"] for sample in samples)
    report = (workdir / "report.html").read_text()
    assert "<svg" in report
    assert "learning_rate" in report
    assert not list(workdir.rglob("*.tmp"))


def test_metrics(whole, settings):
    rows = metrics_of(whole[0], without=())
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row.keys() >= METRICS for row in rows)
    assert [row["examples"] for row in rows] == [4, 6, 10, 12, 16]
    assert np.all(np.diff([row["tokens"] for row in rows]) > 0)
    assert all(0 < row["real_token_fraction"] <= 1 for row in rows)
    assert [row["batch_examples"] for row in rows] == [4, 2, 4, 2, 4]
    assert [row["epoch"] for row in rows] == [examples / 6 for examples in (4, 6, 10, 12, 16)]
    assert {(row["records_dropped"], row["examples_cut"]) for row in rows} == {(1, 0)}
    first, *others = rows
    assert (first["learning_rate"], first["reward_margin"], first["reference_point"]) == (0, 0, 0)
    assert first["loss"] == 0.5  # weights 1 and every reward 0
    # The first step has rate 0, so in the second one policy and reference are equal as well.
    assert others[0]["reward_margin"] == 0
    assert all(row["reward_margin"] != 0 for row in others[1:])


def test_summary(whole):
    workdir, summary = whole
    last = metrics_of(workdir)[-1]
    assert summary.keys() >= SUMMARY
    assert (summary["steps"], summary["examples"], summary["interrupted"]) == (STEPS, last["examples"], False)
    assert (summary["loss"], summary["reward_margin"]) == (last["loss"], last["reward_margin"])
    assert summary["checkpoint"] == str(workdir / "checkpoints" / str(STEPS))
    held_out = {row["step"]: row["eval_loss"] for row in metrics_of(workdir) if "eval_loss" in row}
    assert summary["best_step"] == min(held_out, key=held_out.get)
    assert summary["best_checkpoint"] == str(workdir / "checkpoints" / str(summary["best_step"]))
    assert summary["epochs"] == 16 / 6
    none = {"skipped": 0, "left_out": 0, "cut": 0}
    assert summary["data"] == {"records": 7, "dropped": 1, "examples": 6, **none}
    assert summary["eval_data"] == {"records": 4, "dropped": 0, "examples": 4, **none}
    report = (workdir / "report.html").read_text()
    assert "1 of 7 records were dropped" in report
    assert "over 6 examples" in report


def test_every_metric_is_in_the_table(whole):
    logged = {name.removeprefix(EVAL) for row in metrics_of(whole[0], without=()) for name in row}
    assert logged - {"step"} <= METRIC_NAMES.keys()


def test_tensorboard_has_groups_throughput_config_and_samples(whole):
    workdir, _ = whole
    scalars, texts = events_of(workdir)
    rows = metrics_of(workdir, without=())
    assert {tag.partition("/")[0] for tag in scalars} == {"train", "rewards", "eval", "data", "throughput"}
    assert scalars["train/loss"] == pytest.approx({row["step"]: row["loss"] for row in rows})
    assert scalars["rewards/margin"].keys() == {row["step"] for row in rows if row["reward_margin"] is not None}
    assert scalars["eval/reward_margin"].keys() == {2, 4}
    speed = {
        after["step"]: (after["tokens"] - before["tokens"]) / (after["seconds"] - before["seconds"])
        for before, after in itertools.pairwise(rows)
    }
    assert scalars["throughput/tokens_per_second"] == pytest.approx(speed)
    assert json.loads(texts["config"][0])["train"]["steps"] == STEPS
    samples = json.loads((workdir / "samples.json").read_text())
    for number, sample in enumerate(samples, start=1):
        shown = texts[f"samples/{number}"]
        assert shown.keys() == {0, STEPS}
        assert "user:\n    Sort" in shown[0]
        assert f"answer after training:\n    {sample['after']}" in shown[STEPS]


@pytest.mark.parametrize("command", [train, precompute])
def test_lost_records_are_a_warning(settings, tmp_path, caplog, command, monkeypatch):
    monkeypatch.setattr(inputs.Weights, "load", lambda *_: pytest.fail("that is enough"))
    with pytest.raises(pytest.fail.Exception, match="enough"):
        command.main(runs.flags(settings, f"--workdir={tmp_path}"))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{settings['data.train']}: WARNING: dropped 1 of 7 records; ")


@pytest.mark.parametrize("command", [train, precompute])
def test_evaluating_without_held_out_data_is_refused(settings, tmp_path, command):
    with pytest.raises(UserError, match=r"config\.train\.eval_every: 2, but config\.data\.eval names no"):
        command.main(runs.flags({**settings, "data.eval": ""}, f"--workdir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_held_out_metrics_are_those_of_the_policy_at_that_step(whole, settings, tmp_path):
    """`score` draws the same masks, and the four held-out records are one batch."""
    workdir, _ = whole
    rows = {row["step"]: row for row in metrics_of(workdir)}
    assert [step for step, row in rows.items() if "eval_loss" in row] == [2, 4]
    elbo = {}
    for name, checkpoint in (("policy", workdir / "checkpoints" / "4"), ("reference", settings["model.path"])):
        data, out = settings["data.eval"], tmp_path / f"{name}.jsonl"
        score.main(runs.flags({}, f"--checkpoint={checkpoint}", f"--data={data}", f"--out={out}"))
        elbo[name] = np.array([row["elbo"] for row in runs.read_jsonl(out)])
    reward = elbo["policy"] - elbo["reference"]
    label = np.array([record["label"] for record in runs.read_jsonl(settings["data.eval"])])
    kto_score = 0.1 * (reward - reward.mean()) * np.where(label, 1, -1)
    np.testing.assert_allclose(rows[4]["eval_loss"], np.mean(1 - 1 / (1 + np.exp(-kto_score))), atol=1e-6)
    margin = reward[label].mean() - reward[~label].mean()
    assert abs(margin) > 1e-2
    np.testing.assert_allclose(rows[4]["eval_reward_margin"], margin, atol=1e-3)


def test_a_held_out_metric_that_there_is_not(settings, tmp_path):
    with pytest.raises(UserError, match=r"keep_best: expected one of 'eval_loss', 'eval_reward_margin'"):
        train.main(runs.flags({**settings, "train.keep_best": "loss"}, f"--workdir={tmp_path}"))


# ---- the best step, and the end where none is better ----


@pytest.fixture(scope="module")
def stopping(settings):
    """At rate 0 every evaluation is as good as the first, of step 2: the second one, of step 4, ends the run."""
    return {
        **settings,
        "objective.name": "sft",
        "optimizer.learning_rate": 0.0,
        "optimizer.schedule": "constant",
        "optimizer.warmup_fraction": 0.0,
        "train.patience": 1,
        "train.keep_checkpoints": 1,
        "train.checkpoint_every": 3,
        "train.log_every": 3,
    }


@pytest.fixture(scope="module")
def stopped(stopping, tmp_path_factory):
    """A run that stopped early, after a crash in the step that was to be its last: its folder and its summary."""
    workdir, taken, real = tmp_path_factory.mktemp("stopped") / "run", [], loop.train_step
    argv = runs.flags(stopping, f"--workdir={workdir}")

    def crash(*arguments, **options):
        taken.append(1)
        if len(taken) == 4:
            raise RuntimeError("the machine's fault")
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", crash)
        with pytest.raises(RuntimeError, match="machine"):
            train.main(argv)
    return workdir, train.main(argv)


def test_a_run_that_stops_early(stopped):
    workdir, summary = stopped
    rows = {row["step"]: row for row in metrics_of(workdir)}
    assert list(rows) == [1, 2, 3, 4]  # every evaluation has its line
    assert rows[4]["eval_loss"] == rows[2]["eval_loss"]
    assert (summary["steps"], summary["stopped_early"], summary["interrupted"]) == (4, True, False)
    assert (summary["best_step"], summary["best_metric"]) == (2, "eval_loss")
    assert summary["best_value"] == rows[2]["eval_loss"]
    assert summary["best_checkpoint"] == load_model(workdir / "checkpoints" / "best").source
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4"}
    page = (workdir / "report.html").read_text()
    assert "Stopped early." in page
    assert "Best held out" in page


def test_a_run_that_stopped_early_has_ended(stopped, stopping, tmp_path, in_step, caplog):
    caplog.set_level("INFO")
    workdir = tmp_path / "run"
    shutil.copytree(stopped[0], workdir)
    argv = runs.flags(stopping, f"--workdir={workdir}")
    in_step(loop, "train_step", 1, lambda: pytest.fail("the run has ended"))
    assert train.main(argv)["stopped_early"]
    assert "stopped early, at step 4 of 5, after 1 evaluations without a better eval_loss" in caplog.messages
    assert f"--source={workdir}/checkpoints/2 " in caplog.messages[-1]
    dry = train.main([*argv, "--dry-run"])
    assert (dry["steps_done"], dry["stopped_early"]) == (4, True)
    assert dry["seconds"] == 0


def test_a_run_that_stopped_early_goes_on_where_it_becomes_longer(stopped, stopping, tmp_path):
    """With patience anew: step 6 has the one evaluation that ends the run, but it is the last one anyway."""
    shutil.copytree(stopped[0], tmp_path / "run")
    summary = train.main(runs.flags({**stopping, "train.steps": 6}, f"--workdir={tmp_path / 'run'}"))
    assert (summary["steps"], summary["stopped_early"], summary["best_step"]) == (6, False, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.eval_every": 0}, "config.train.patience: 1, but config.train.eval_every is 0"),
        ({"train.keep_best": ""}, "config.train.patience: 1, but config.train.keep_best is ''"),
        ({"data.eval": ""}, "config.data.eval names no held-out records"),
    ],
)
def test_patience_without_evaluations_is_refused(stopping, tmp_path, changes, said):
    with pytest.raises(UserError, match=re.escape(said)):
        train.main(runs.flags({**stopping, **changes}, f"--workdir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


# ---- a dry run says what the run is ----


def files_in(folder: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def test_a_dry_run_has_the_figures_of_the_run(whole, settings, tmp_path):
    rows = metrics_of(whole[0])
    found = train.main(runs.flags(settings, f"--workdir={tmp_path / 'run'}", "--dry-run"))
    assert not (tmp_path / "run").exists()
    tokens = np.diff([0, *(row["tokens"] for row in rows)])
    positions = tokens / [row["real_token_fraction"] for row in rows]
    assert (found["steps"], found["steps_done"], found["evaluations"]) == (STEPS, 0, 2)
    assert (found["tokens_of_run"], found["tokens_per_step"]) == (rows[-1]["tokens"], tokens.mean())
    assert found["real_token_fraction"] == pytest.approx(tokens.sum() / positions.sum(), rel=1e-12)
    assert (found["steps_per_epoch"], found["steps_packed"]) == (2, STEPS)
    assert (found["data"], found["eval_data"]) == (whole[1]["data"], whole[1]["eval_data"])
    assert (found["desirable"], found["undesirable"]) == (3, 3)
    assert found["seconds"] is None
    assert found["config"] == {**recorded(whole[0])["config"], "train": found["config"]["train"]}


def test_a_dry_run_of_a_run_that_goes_on(whole, settings, caplog, monkeypatch):
    """Its time is that of its earlier steps; the rate of the last two is not that of the first, which compiled."""
    workdir, before = whole[0], files_in(whole[0])
    longer = {**settings, "train.samples": 2, "train.steps": 2 * STEPS + 1}
    with caplog.at_level("INFO"):
        found = train.main(runs.flags(longer, f"--workdir={workdir}", "--dry-run"))
    first, *_, last = metrics_of(workdir, without=())
    per_token = (last["seconds"] - first["seconds"]) / (last["tokens"] - first["tokens"])
    assert (found["steps_done"], found["seconds_from"]) == (STEPS, "earlier steps of this run")
    assert found["seconds"] == pytest.approx(per_token * (found["tokens_of_run"] - last["tokens"]))
    assert f"would go on from step {STEPS} of {2 * STEPS + 1}" in caplog.text
    assert files_in(workdir) == before
    with pytest.raises(UserError, match=r"config\.objective\.beta: 0\.1 -> 0\.3"):
        train.main(runs.flags({**longer, "objective.beta": 0.3}, f"--workdir={workdir}", "--dry-run"))
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "of_setup", lambda _: {"config.data.train": {"examples": 7}})
        with pytest.raises(UserError, match=r"began with other inputs \(config\.data\.train: 6 examples -> 7"):
            train.main(runs.flags(longer, f"--workdir={workdir}", "--dry-run"))
    found = train.main(runs.flags(longer, f"--workdir={workdir}", "--dry-run", "--overwrite"))
    assert (found["steps_done"], found["replaces_a_run"]) == (0, True)
    assert files_in(workdir) == before


def test_a_tracker_that_cannot_work_is_refused_before_anything_is_loaded(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(inputs, "prepare", lambda *_, **__: pytest.fail("the data were read"))
    for name, message in (("mlflow", r"pip install 'elbo_kto_jax\[mlflow\]'"), ("mlfow", "expected names out of 'ml")):
        with pytest.raises(UserError, match=rf"^config\.trackers: .*{message}"):
            train.main(runs.flags(settings, f"--workdir={tmp_path / 'run'}", f"--config.trackers=('{name}',)"))
    assert not (tmp_path / "run").exists()


# ---- the same command goes on ----


@pytest.mark.parametrize("step", [1, 4])
def test_a_signal_stops_after_saving_and_the_same_command_goes_on(whole, settings, tmp_path, in_step, step):
    argv = runs.flags({**settings, "train.samples": 0}, f"--workdir={tmp_path}")
    in_step(loop, "train_step", step, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted) as stop:
        train.main(argv)
    summary = stop.value.args[-1]
    assert summary.keys() >= SUMMARY
    assert (summary["steps"], summary["interrupted"]) == (step, True)
    assert summary["checkpoint"] == str(tmp_path / "checkpoints" / str(step))
    assert train.main(argv)["steps"] == STEPS
    assert_same_run(tmp_path, whole[0])


def test_a_crash_goes_on_from_the_last_checkpoint(whole, settings, tmp_path, in_step, monkeypatch, caplog):
    """With another commit, too: config.json names both, and log.txt goes on. Trackers get every step once, and one that
    fails changes nothing."""
    caplog.set_level("INFO")
    argv = runs.flags(settings, f"--workdir={tmp_path}", "--config.trackers=('trackio','mlflow')")
    told = trackers_that_keep(monkeypatch, fails={"mlflow": 2})

    def crash():
        raise RuntimeError("the machine's fault")

    in_step(loop, "train_step", 4, crash)
    with pytest.raises(RuntimeError, match="machine"):
        train.main(argv)
    monkeypatch.setattr(provenance, "commit", lambda _: "0123456789")
    train.main(argv)
    assert_same_run(tmp_path, whole[0])
    first, second = json.loads((tmp_path / "config.json").read_text())["provenance"]
    assert first["commit"] != second["commit"] == "0123456789"
    lines = (tmp_path / "log.txt").read_text().splitlines()
    said = [line.partition(" ")[2] for line in lines if re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ", line)]
    assert [line.partition(": ")[0] for line in said if line.startswith(("start: ", "going on", "done"))] == [
        *("start", "start", "going on from step 2", "done")
    ]
    assert "RuntimeError: the machine's fault" in lines
    assert f"{settings['data.train']}: WARNING: dropped 1 of 7 records" in "".join(said)  # before the folder was ours
    assert [number for name, number in told if name == "trackio"] == [1, 2, 3, 4, 5, f"report after {STEPS}"]
    assert [number for name, number in told if name == "mlflow"] == [1, 2, 2]  # each start tries it
    assert caplog.text.count("tracker mlflow: no network; the run goes on without it") == 2


def test_the_commit_of_a_checkout(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    assert provenance.commit(tmp_path) is None
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    found = provenance.commit(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", found)
    (tmp_path / "file").write_text("2")
    assert provenance.commit(tmp_path) == f"{found}+changes"


def test_an_interrupted_reference_pass_goes_on(whole, settings, tmp_path, in_step):
    argv = runs.flags(settings, f"--workdir={tmp_path}")
    in_step(Scorer, "__call__", 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted) as stop:
        train.main(argv)
    assert (stop.value.args[-1]["steps"], stop.value.args[-1]["checkpoint"]) == (0, None)
    (part,) = (tmp_path / "reference").glob("*/steps-*.npy")
    assert len(np.load(part)) == 2
    train.main(argv)
    assert_same_run(tmp_path, whole[0])


def test_a_finished_run_is_not_repeated(whole, settings, in_step):
    workdir, summary = whole
    before, events = metrics_of(workdir, without=()), list((workdir / "tensorboard").iterdir())
    in_step(loop, "train_step", 1, lambda: pytest.fail("a step was taken"))
    again = train.main(runs.flags({**settings, "train.samples": 2}, f"--workdir={workdir}"))
    assert {key: again[key] for key in ("steps", "loss", "checkpoint")} == {
        key: summary[key] for key in ("steps", "loss", "checkpoint")
    }
    assert metrics_of(workdir, without=()) == before
    assert list((workdir / "tensorboard").iterdir()) == events


def test_a_finished_run_with_more_steps_goes_on(whole, settings, tmp_path, caplog):
    caplog.set_level("INFO")
    workdir = shutil.copytree(whole[0], tmp_path / "longer")
    samples = json.loads((workdir / "samples.json").read_text())
    argv = runs.flags({**settings, "train.samples": 2, "train.steps": STEPS + 1}, f"--workdir={workdir}")
    summary = train.main(argv)
    assert (summary["steps"], summary["checkpoint"]) == (STEPS + 1, str(workdir / "checkpoints" / str(STEPS + 1)))
    assert f"the run becomes longer (config.train.steps: {STEPS} -> {STEPS + 1}); the rate now" in caplog.text
    assert "sampling 2 answers after training" in caplog.messages
    again = json.loads((workdir / "samples.json").read_text())
    assert [sample["before"] for sample in again] == [sample["before"] for sample in samples]
    rows = metrics_of(workdir)
    assert rows[:STEPS] == metrics_of(whole[0])
    schedule = learning_rate(Config.from_mapping(recorded(workdir)["config"]).optimizer, STEPS + 1)
    assert [row["learning_rate"] for row in rows[STEPS:]] == [float(schedule(STEPS))] > [0.0]
    assert recorded(workdir)["longer"] == [f"config.train.steps: {STEPS} -> {STEPS + 1}"]
    with pytest.raises(UserError, match=rf"steps: {STEPS + 1} -> {STEPS}\).*\n.*train.epochs \(upward\)"):
        train.main(runs.flags({**settings, "train.samples": 2}, f"--workdir={workdir}"))


def test_at_a_constant_rate_a_longer_run_is_the_same_as_one_in_a_single_go(settings, tmp_path):
    constant = {"optimizer.schedule": "constant", "optimizer.warmup_fraction": 0.0}
    constant |= {"objective.name": "sft", "train.eval_every": 0}
    for steps, folder in ((2, "longer"), (STEPS, "longer"), (STEPS, "single")):
        argv = runs.flags({**settings, **constant, "train.steps": steps}, f"--workdir={tmp_path / folder}")
        assert train.main(argv)["steps"] == steps
    assert_same_run(tmp_path / "longer", tmp_path / "single")


def test_another_config_is_refused_and_overwrite_starts_again(settings, tmp_path):
    short = {**settings, "train.steps": 1, "train.eval_every": 0}
    argv = runs.flags(short, f"--workdir={tmp_path}")
    train.main(argv)
    (tmp_path / "trace").write_text("of the old run")
    other = runs.flags({**short, "objective.beta": 0.3}, f"--workdir={tmp_path}")
    with pytest.raises(UserError, match=r"config\.objective\.beta: 0\.1 -> 0\.3") as refused:
        train.main(other)
    assert "--overwrite" in str(refused.value)
    assert (tmp_path / "trace").exists()
    assert train.main([*other, "--overwrite"])["steps"] == 1
    assert not (tmp_path / "trace").exists()
    assert json.loads((tmp_path / "config.json").read_text())["config"]["objective"]["beta"] == 0.3


# ---- the reference ----


def test_precompute_then_train_scores_nothing(whole, settings, tmp_path, in_step):
    settings = {**settings, "train.eval_every": 0}
    argv = runs.flags(settings, f"--workdir={tmp_path}")
    summary = precompute.main(argv)
    assert summary.keys() == {"examples", "draws", "seconds", "cache"}
    assert (summary["examples"], summary["draws"]) == (16, 2)
    assert precompute.main(argv)["cache"] == summary["cache"]
    in_step(ReferenceCache, "complete", 1, lambda: pytest.fail("the reference was scored again"))
    train.main(argv)
    held_out = ("seconds", "eval_loss", "eval_reward_margin")
    assert metrics_of(tmp_path, held_out) == metrics_of(whole[0], held_out)


def test_online_is_precomputed_without_the_cache(whole, settings, tmp_path):
    train.main(runs.flags({**settings, "reference.mode": "online"}, f"--workdir={tmp_path}"))
    assert_same_run(tmp_path, whole[0])
    assert not (tmp_path / "reference").exists()


# ---- other objectives, and failure ----


def test_sft_needs_no_labels_and_no_reference(settings, tmp_path):
    data = runs.write_jsonl(tmp_path / "data.jsonl", [{**r, "label": None} for r in runs.records(6)])
    workdir = tmp_path / "run"
    summary = train.main(runs.flags({**settings, "data.train": data, "objective.name": "sft"}, f"--workdir={workdir}"))
    rows = metrics_of(workdir)
    assert (summary["steps"], summary["loss"], summary["reward_margin"]) == (STEPS, rows[-1]["loss"], None)
    assert all(row["loss"] > 0 and "reward_margin" not in row for row in rows)
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert not (workdir / "reference").exists()


@pytest.mark.parametrize("rate", [1e3, 1e30])  # the first makes every number finite and every token equally likely
def test_divergence_is_named_and_what_was_saved_stays(settings, tmp_path, rate):
    diverging = {"optimizer.learning_rate": rate, "train.eval_every": 0, "train.checkpoint_every": 1}
    with pytest.raises(UserError, match=r"^step 2: training diverged: .*\nLower --config\.optimizer\.learning_rate"):
        train.main(runs.flags({**settings, **diverging}, f"--workdir={tmp_path}"))
    assert [step.name for step in (tmp_path / "checkpoints").iterdir()] == ["1"]
    load_model(tmp_path)


def test_what_is_to_be_done_next_can_be_typed(settings, tmp_path, caplog):
    """The last line of a log goes through a shell as it stands, whatever the working folder is called."""
    caplog.set_level("INFO")
    workdir = tmp_path / "it's [1] $HOME"
    argv = runs.flags({**settings, "train.steps": 1, "train.eval_every": 0}, f"--workdir={workdir}", "--overwrite")
    precompute.main(argv)
    (line,) = [message for message in caplog.messages if message.startswith("next: ")]
    *start, module = shlex.split(line)[:4]
    assert (start[0], start[2:], module) == ("next:", ["-m"], "elbo_kto_jax.train")
    assert Path(shutil.which(start[1])).samefile(sys.executable)  # which has this project
    assert shlex.split(line)[4:] == argv[:-1]  # --overwrite would delete what was computed
    caplog.clear()
    train.main(shlex.split(line)[4:])
    (line,) = [message for message in caplog.messages if message.startswith("next: ")]
    assert shlex.split(line)[2:4] == ["-m", "conversion.to_hf"]
    to_hf.main(shlex.split(line)[4:])
    assert (workdir / "huggingface" / "config.json").is_file()
    card = (workdir / "huggingface" / "README.md").read_text()
    assert "\n| steps | 1 |\n" in card
    assert f"\n    {shlex.join(sys.orig_argv)}\n" in card
    assert "![Rewards](rewards.svg)" in card


def test_samples_keep_the_messages(whole):
    workdir, _ = whole
    samples = json.loads((workdir / "samples.json").read_bytes())
    assert [sample["prompt"] for sample in samples] == [row["prompt"] for row in runs.records(2, first=6)]
    assert '<div class="role">user</div>' in (workdir / "report.html").read_text(encoding="utf-8")
