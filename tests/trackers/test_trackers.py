"""trackers/: what each tells its package, which a stand-in takes the place of, and what the real one stored of it."""

import json
import re
import sys
from pathlib import Path

import pytest

from elbo_kto_jax import trackers
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.trackers import wandb as of_wandb
from elbo_kto_jax.trackers.protocol import Run, Tracker
from tests.conftest import PROJECT_ROOT
from tests.trackers import fakes

CONFIG = {"seed": 7, "train": {"steps": 3}, "trackers": ["wandb"]}
SAMPLES = [{"prompt": "user:\nSort 21", "before": "21"}]
_VARIABLES = ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
_VARIABLES += ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def workdir(tmp_path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "report.html").write_text("<p>the report</p>")
    return folder


def put(monkeypatch, fake):
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return fake


def told(name: str, workdir: Path, key: str = "", sent: int = -1, steps=(1, 2)) -> Tracker:
    """A start of a run: samples, the metrics of some steps that the tracker lacks, report."""
    tracker = trackers.begin(name, Run(workdir, CONFIG, steps[0] - 1, key, sent))
    assert isinstance(tracker, Tracker)
    tracker.samples(steps[0] - 1, "before", SAMPLES)
    for step in steps:
        if step > tracker.sent:
            tracker.metrics(step, {"train/loss": 0.5 / step, "data/examples": 4.0 * step})
    tracker.report(steps[-1], workdir / "report.html")
    return tracker


# ---- with stand-ins ----


@pytest.mark.parametrize("online", [True, False])
def test_wandb_goes_on_with_the_same_run(monkeypatch, workdir, online):
    fake = put(monkeypatch, fakes.WandB(online))
    trackers.check("wandb")
    first = told("wandb", workdir)
    first.close(False)
    (begun,) = fake.calls
    assert (begun["project"], begun["name"], begun["dir"]) == ("elbo_kto_jax", "mine", str(workdir))
    assert begun["settings"] == {"console": "off"}
    assert not {"id", "resume"} & begun.keys()
    assert (fake.last.config, fake.last.exits) == (CONFIG, [1])
    assert fake.runs[first.key] == [
        (0, {"samples": [{"prompt": "user:\nSort 21", "before": "21", "after": None}]}),
        (1, {"train/loss": 0.5, "data/examples": 4.0}),
        (2, {"train/loss": 0.25, "data/examples": 8.0}),
        (2, {"report": "<p>the report</p>"}),
    ]
    second = told("wandb", workdir, first.key, sent=9, steps=(2, 3))
    second.close(True)
    assert (second.key, fake.last.exits) == (first.key, [0])
    assert {name: fake.calls[1][name] for name in ("id", "resume")} == {"id": first.key, "resume": "allow"}
    assert second.sent == (2 if online else 9)  # without a network it is taken at our word


def test_records_of_a_file_of_wandb():
    """Records of 3, 40,000 and 5 bytes: the second one spans blocks; the end is cut off, as a kill leaves it."""
    records, content = [b"abc", b"x" * 40_000, b"12345"], b":W&B\xe6\xf1\x00"

    def piece(kind: int, data: bytes) -> bytes:
        return bytes(4) + len(data).to_bytes(2, "little") + bytes([kind]) + data

    content += piece(1, records[0])
    first = 2**15 - len(content) - 7 - 5  # five bytes are left of the block, too few for another piece
    content += piece(2, records[1][:first]) + bytes(5) + piece(4, records[1][first:])
    content += piece(1, records[2])
    assert list(of_wandb.records(content)) == records
    assert list(of_wandb.records(content[:-1])) == records[:2]
    assert list(of_wandb.records(content[: 2**15 + 3])) == records[:1]


def test_wandb_takes_what_its_variables_say(monkeypatch, workdir, tmp_path):
    fake = put(monkeypatch, fakes.WandB(online=False))
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    told("wandb", workdir)
    assert fake.calls[0].keys() == {"reinit", "settings"}


def test_wandb_must_be_logged_in_before_anything_is_loaded(monkeypatch):
    fake = put(monkeypatch, fakes.WandB(online=True))
    fake.logged_in = False
    with pytest.raises(UserError, match=r"trackers: 'wandb': not logged in .*`wandb login`.*WANDB_MODE=offline"):
        trackers.check("wandb")
    fake.online = False
    trackers.check("wandb")


def test_trackio_goes_on_with_the_same_run(monkeypatch, workdir, capsys):
    fake = put(monkeypatch, fakes.Trackio())
    trackers.check("trackio")
    first = told("trackio", workdir)
    assert first.key.startswith("mine-")
    assert told("trackio", workdir).key != first.key  # of another folder of that name
    second = told("trackio", workdir, first.key, sent=9, steps=(2, 3))
    assert (second.key, second.sent) == (first.key, 2)
    assert [step for step, values in fake.runs[first.key] if "train/loss" in values] == [1, 2, 3]
    assert [values["report"] for _, values in fake.runs[first.key] if "report" in values] == ["<p>the report</p>"] * 2
    assert fake.calls[0] | {"name": ""} == {
        **{"project": "elbo_kto_jax", "name": "", "config": CONFIG, "resume": "never", "embed": False}
    }
    out, err = capsys.readouterr()
    assert (out, err.count("a line of trackio's")) == ("", 3)


def test_mlflow_goes_on_with_the_same_run(monkeypatch, workdir):
    fake = put(monkeypatch, fakes.MLflow())
    trackers.check("mlflow")
    first = told("mlflow", workdir)
    first.close(False)
    run = fake.runs[first.key]
    assert (run.name, run.experiment, run.status) == ("mine", fake.experiments["elbo_kto_jax"], "KILLED")
    assert run.params == {"seed": "7", "train.steps": "3", "trackers": "['wandb']"}
    assert {name: json.loads(run.files[name]) for name in ("config.json", "samples.json")} == {
        **{"config.json": CONFIG, "samples.json": SAMPLES}
    }
    second = told("mlflow", workdir, first.key, sent=9, steps=(2, 3))
    assert (second.key, second.sent, run.status) == (first.key, 2, "RUNNING")
    second.close(True)
    assert [metric.step for metric in run.metrics if metric.key == "train/loss"] == [1, 2, 3]
    assert (run.status, run.files["report.html"]) == ("FINISHED", "<p>the report</p>")
    assert len(fake.runs) == 1


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_missing_package_names_its_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"config\.trackers: '{name}': needs .*pip install 'elbo_kto_jax\[{name}\]'"):
        trackers.check(name)


def test_a_tracker_that_there_is_not():
    with pytest.raises(
        UserError, match=r"trackers: expected names out of 'mlflow', 'tensorboard', 'trackio', 'wandb', got 'mlfow'"
    ):
        trackers.check_names(["tensorboard", "mlfow"])


# ---- with the packages, which need no network for it ----


def test_wandb_stores_it(workdir):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install '.[wandb]'")
    trackers.check("wandb")
    first = told("wandb", workdir)
    first.close(False)
    second = told("wandb", workdir, first.key, sent=9, steps=(2, 3))
    second.close(True)
    assert (second.key, second.sent) == (first.key, 2)
    assert of_wandb.stored(workdir, first.key, otherwise=9) == 3
    assert of_wandb.stored(workdir, "another", otherwise=9) == 9
    (cut,) = (
        Path(file)
        for file in glob.glob(f"{workdir}/wandb/offline-run-*/*.wandb")
        if b"report_3" in Path(file).read_bytes()
    )
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])  # as a kill leaves it
    assert of_wandb.stored(workdir, first.key, otherwise=9) == 2


def test_trackio_stores_it(workdir, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed: pip install '.[trackio]'")
    from trackio.sqlite_storage import SQLiteStorage

    first = told("trackio", workdir)
    first.close(False)
    second = told("trackio", workdir, first.key, sent=9, steps=(2, 3))
    second.close(True)
    assert (second.key, second.sent) == (first.key, 2)
    rows = SQLiteStorage.get_logs("elbo_kto_jax", first.key)
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (1, 0.5),
        (2, 0.25),
        (3, 0.5 / 3),
    ]
    assert sum("samples" in row for row in rows) == sum("report" in row for row in rows) == 2


def test_mlflow_stores_it(workdir):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install '.[mlflow]'")
    first = told("mlflow", workdir)
    first.close(False)
    second = told("mlflow", workdir, first.key, sent=9, steps=(2, 3))
    second.close(True)
    client = mlflow.MlflowClient()
    assert second.sent == 2
    assert [m.step for m in client.get_metric_history(first.key, "train/loss")] == [1, 2, 3]
    assert client.get_run(first.key).info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(first.key)} == {"config.json", "samples.json", "report.html"}


def test_the_example_of_extending_works_as_it_is_printed(workdir):
    page = (PROJECT_ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "metrics.csv" in code)
    found: dict = {}
    exec(example, found)
    found["check"]()
    for start, steps in ((0, (1, 2)), (2, (3,))):
        tracker = found["begin"](Run(workdir, CONFIG, start, "", start))
        assert isinstance(tracker, Tracker)
        for step in steps:
            tracker.metrics(step, {"train/loss": 0.5})
        tracker.samples(0, "before", SAMPLES)
        tracker.report(steps[-1], workdir / "report.html")
        tracker.close(True)
    assert (workdir / "metrics.csv").read_text().splitlines() == [f"{step},train/loss,0.5" for step in (1, 2, 3)]
