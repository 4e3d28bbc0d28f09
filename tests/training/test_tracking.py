"""training/tracking.py: each tracker gets every step once, whatever ends the starts of a run, and none ends the run."""

import json
import threading
import time

import pytest

from elbo_kto_jax import trackers
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.training import tracking
from elbo_kto_jax.training.tracking import Tracking

SAMPLES = [{"prompt": "Sort 21", "before": "21"}]


def rows(*steps: int) -> list[dict]:
    """Lines of metrics.jsonl: ten tokens a step, and half a second."""
    return [
        {"step": i, "loss": 1 / i, "reward_margin": None, "examples": i, "tokens": 10 * i, "seconds": i / 2}
        for i in steps
    ]


class Recorder:
    """A tracker that keeps what it was told, and raises `error` at the step `fails_at`."""

    def __init__(self, run, knows=None, fails_at=0, error=None):
        self.run, self.key, self.sent = run, run.key or "key", run.sent if knows is None else knows
        self.told, self.fails_at, self.error = [], fails_at, error

    def metrics(self, step, values):
        if step == self.fails_at:
            raise self.error
        self.told.append((step, values))

    def samples(self, step, when, samples):
        self.told.append(("samples", step, when, samples))

    def report(self, step, file):
        self.told.append(("report", step, file.name))

    def close(self, finished):
        self.told.append(("closed", finished))

    @property
    def steps(self) -> list[int]:
        return [one[0] for one in self.told if isinstance(one[0], int)]


@pytest.fixture
def begun(monkeypatch) -> list[Recorder]:
    """The trackers in the order in which they began; `begun.options` of those to come, by name."""
    found = Begun()
    monkeypatch.setattr(trackers, "begin", found.begin)
    return found


class Begun(list):
    def __init__(self):
        self.options = {}

    def begin(self, name, run):
        self.append(Recorder(run, **self.options.get(name, {})))
        return self[-1]


def start(folder, names, first_step, found=(), to=(), report=True, finished=True) -> None:
    """A start of a run that goes on after `first_step`, finds lines of metrics.jsonl, and logs those of steps `to`."""
    told = Tracking(names, folder, {"seed": 0}, first_step, rows(*found))
    for row in rows(*to):
        told.metrics(row)
    if report:
        told.report(max(to, default=first_step), folder / "report.html")
    told.close(finished)


def marks(folder) -> dict:
    return json.loads((folder / "trackers.json").read_text())


def test_what_a_tracker_is_told(begun, tmp_path):
    told = Tracking(["wandb"], tmp_path, {"seed": 0}, 0, [])
    told.samples(0, "before", SAMPLES)
    for row in rows(1, 2):
        told.metrics(row)
    told.report(2, tmp_path / "report.html")
    told.close(True)
    (tracker,) = begun
    assert (tracker.run.name, tracker.run.config, tracker.run.key, tracker.run.sent) == (
        tmp_path.name,
        {"seed": 0},
        "",
        -1,
    )
    scalars = [{"train/loss": 1.0, "data/examples": 1, "data/tokens": 10, "throughput/seconds": 0.5}]
    speed = {"throughput/tokens_per_second": 20.0, "throughput/examples_per_second": 2.0}
    scalars.append({"train/loss": 0.5, "data/examples": 2, "data/tokens": 20, "throughput/seconds": 1.0} | speed)
    assert tracker.told == [
        ("samples", 0, "before", SAMPLES),
        (1, scalars[0]),
        (2, scalars[1]),
        ("report", 2, "report.html"),
        ("closed", True),
    ]
    assert marks(tmp_path) == {"wandb": {"key": "key", "step": 2}}


def test_a_start_that_finds_everything_done_begins_nothing(begun, tmp_path):
    start(tmp_path, ["wandb"], 0, to=(1, 2))
    start(tmp_path, ["wandb"], 2, found=(1, 2))
    assert len(begun) == 1


def test_an_interrupted_run_goes_on(begun, tmp_path):
    start(tmp_path, ["wandb"], 0, to=(1, 2), finished=False)
    start(tmp_path, ["wandb"], 2, found=(1, 2), to=(3, 4))
    assert [tracker.steps for tracker in begun] == [[1, 2], [3, 4]]
    assert (begun[1].run.key, begun[1].run.sent, begun[0].told[-1]) == ("key", 2, ("closed", False))


def test_steps_past_the_checkpoint_before_a_kill_are_not_sent_again(begun, tmp_path):
    """Steps 3 and 4 were logged after the checkpoint of step 2; the restart takes them again."""
    start(tmp_path, ["wandb"], 0, to=(1, 2, 3, 4))
    (tmp_path / "trackers.json").write_text(json.dumps({"wandb": {"key": "key"}}))  # as a kill leaves it
    start(tmp_path, ["wandb"], 2, found=(1, 2, 3, 4), to=(3, 4, 5))
    assert begun[1].steps == [5]


def test_a_tracker_that_knows_better_gets_what_it_lacks(begun, tmp_path):
    """What was under way when the run was killed is lost with some trackers, also before the checkpoint."""
    (tmp_path / "trackers.json").write_text(json.dumps({"wandb": {"key": "key"}}))
    begun.options["wandb"] = {"knows": 1}
    start(tmp_path, ["wandb"], 3, found=(1, 2, 3, 4), to=(4, 5))
    assert begun[0].steps == [2, 3, 4, 5]


def test_a_run_that_was_killed_after_its_last_step_is_closed_by_the_next_start(begun, tmp_path):
    (tmp_path / "trackers.json").write_text(json.dumps({"wandb": {"key": "key"}}))
    start(tmp_path, ["wandb"], 2, found=(1, 2))
    assert begun[0].told == [("report", 2, "report.html"), ("closed", True)]


def test_a_tracker_that_is_new_gets_the_whole_run(begun, tmp_path):
    start(tmp_path, ["wandb"], 0, to=(1, 2))
    start(tmp_path, ["wandb", "mlflow"], 2, found=(1, 2))
    assert [tracker.steps for tracker in begun] == [[1, 2], [1, 2]]
    assert begun[1].told[-2:] == [("report", 2, "report.html"), ("closed", True)]


@pytest.mark.parametrize("error", [ValueError("no network"), SystemExit(1)], ids=repr)
def test_a_tracker_that_fails_is_one_warning_and_catches_up_later(begun, tmp_path, caplog, error):
    begun.options["wandb"] = {"fails_at": 2, "error": error}
    start(tmp_path, ["wandb", "trackio"], 0, to=(1, 2, 3))
    (message,) = caplog.messages
    assert message.startswith(f"tracker wandb: {error}; the run goes on without it")
    assert sorted(tracker.steps for tracker in begun) == [[1], [1, 2, 3]]
    assert marks(tmp_path)["wandb"] == {"key": "key", "step": 1}
    begun.options.clear()
    start(tmp_path, ["wandb", "trackio"], 3, found=(1, 2, 3))
    assert begun[2].steps == [2, 3]
    assert len(begun) == 3


def test_a_tracker_that_cannot_begin_keeps_its_place(begun, tmp_path, monkeypatch, caplog):
    """Killed, then without a network: the third start sends what both told."""
    (tmp_path / "trackers.json").write_text(json.dumps({"wandb": {"key": "key"}}))
    with monkeypatch.context() as patch:
        patch.setattr(trackers, "begin", lambda name, run: 1 / 0)
        start(tmp_path, ["wandb"], 2, found=(1, 2, 3), to=(3, 4))
    assert "division by zero" in caplog.text
    start(tmp_path, ["wandb"], 4, found=(1, 2, 3, 4), to=(5,))
    assert begun[0].steps == [4, 5]


def test_a_warning_holds_no_key(begun, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    wrong = ValueError("https://me:password@host/ refuses 0123456789abcdef\nas it stands")
    begun.options["wandb"] = {"fails_at": 1, "error": wrong}
    start(tmp_path, ["wandb"], 0, to=(1,))
    assert "https://host/ refuses [key] as it stands" in caplog.text
    assert not [secret for secret in ("password", "0123456789abcdef") if secret in caplog.text]


def test_a_tracker_that_hangs_keeps_neither_a_step_nor_the_end_waiting(begun, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "_CLOSE_WITHIN", 0.05)
    free = threading.Event()
    monkeypatch.setattr(Recorder, "metrics", lambda self, step, values: step == 2 and free.wait(60))
    start(tmp_path, ["wandb"], 0, to=(1, 2, 3))
    assert "tracker wandb: too slow to take what is left; the next start sends it" in caplog.messages
    assert marks(tmp_path)["wandb"]["step"] == 1
    free.set()
    deadline = time.monotonic() + 60
    while ("closed", True) not in begun[0].told:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_older_folder_of_tensorboard_is_not_written_twice(begun, tmp_path):
    (tmp_path / "tensorboard").mkdir()
    start(tmp_path, ["tensorboard"], 2, found=(1, 2))
    assert not begun
    start(tmp_path, ["tensorboard"], 2, found=(1, 2), to=(3,))
    assert begun[0].steps == [3]


@pytest.mark.parametrize("content", ["", "[1]", '{"wandb": 3}', '{"wandb": {"step": "3"}}'])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "trackers.json").write_text(content)
    with pytest.raises(UserError, match=r"trackers\.json: damaged; remove it \(trackers will begin new runs\)"):
        Tracking(["wandb"], tmp_path, {}, 0, [])
