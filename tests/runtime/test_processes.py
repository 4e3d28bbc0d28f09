"""processes.py: who the others are, and whole runs of several processes, interrupted, killed and restarted."""

import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from elbo_kto_jax import train
from elbo_kto_jax.checkpoints.load import load_model
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.runtime.errors import UserError
from tests import runs
from tests.conftest import FLAGS, PROJECT_ROOT
from tests.share import cases

NONE = (None, None, None)
SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
HANG = 600  # seconds after which a process counts as hanging; many times what it takes where nothing does

# ---- who the others are ----


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        (NONE, {}, None),
        (("a:1", 2, 1), {}, ("a:1", 2, 1)),
        (NONE, {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, ("b:2", 4, 3)),
        ((None, None, 0), {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "4"}, ("b:2", 4, 0)),
        (("a:1", 1, 0), SLURM, None),
        (("a:1", 2, 0), {**SLURM, "SLURM_STEP_NUM_TASKS": "8"}, ("a:1", 2, 0)),
        (NONE, {**SLURM, "SLURM_STEP_NUM_TASKS": "2"}, {"cluster_detection_method": "slurm"}),
        (NONE, SLURM, None),  # in the batch script, before srun
        (NONE, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        (NONE, {"TPU_ML_PLATFORM": "JAX"}, {}),
        (NONE, {"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "tpu,cpu"}, {}),
        (NONE, {"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_where_processes_come_from(flags, environment, expected):
    found = processes.arguments(flags, environment)
    if isinstance(expected, tuple):
        names = ("coordinator_address", "num_processes", "process_id", "cluster_detection_method")
        expected = dict(zip(names, (*expected, "deactivate"), strict=True))
    assert found == expected


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (("a:1", None, None), {}),
        (("a:1", 2, 2), {}),
        (("a:1", 2, -1), {}),
        (("a", 2, 0), {}),
        ((None, 2, 0), {}),
        (("a:1", 0, 0), {}),
        (NONE, {"JAX_NUM_PROCESSES": "2"}),
        (NONE, {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}),
    ],
)
def test_half_a_description_is_refused(flags, environment):
    with pytest.raises(UserError, match="--num-processes"):
        processes.arguments(flags, environment)


def test_one_process_is_first_and_agrees_with_itself():
    asked = []
    assert processes.is_first()
    assert not processes.several()
    assert processes.together(lambda: bool(asked))() is False
    processes.first(lambda: asked.append(1))
    assert processes.together(lambda: bool(asked))() is True
    with pytest.raises(ZeroDivisionError):
        processes.first(lambda: 1 // 0)
    assert processes.of_first({"a": 1}) == {"a": 1}


# ---- whole runs ----


def job(workdir, argv: list[str], num: int, devices: int, events: dict[int, tuple[str, int]]) -> list[int]:
    """Runs `num` processes with `devices` CPU devices each, and returns their exit statuses.

    `events` says what happens to which process before which step, see tests/worker.py.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = (f"--xla_force_host_platform_device_count={devices}", *FLAGS[1:])
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    started = []
    for i in range(num):
        event, step = events.get(i, ("none", 0))
        several = [f"--coordinator=localhost:{port}", f"--num-processes={num}", f"--process-id={i}"] if num > 1 else []
        command = [sys.executable, "-m", "tests.worker", event, str(step), *argv, f"--workdir={workdir}", *several]
        with (workdir.parent / f"process-{i}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    command, cwd=PROJECT_ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log, text=True
                )
            )
    try:
        return [process.wait(HANG) for process in started]
    finally:
        for process in started:
            process.kill()


def logs(workdir) -> str:
    return "".join(file.read_text()[-2000:] for file in sorted(workdir.parent.glob("process-*.log")))


@pytest.fixture(scope="module")
def argv(tiny_checkpoint, tmp_path_factory) -> list[str]:
    data = runs.write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", runs.records(6))
    settings = {"model.path": tiny_checkpoint, "data.train": data, "mesh.data": -1, "mesh.fsdp": 2}
    return runs.flags({**settings, "objective.beta": 0.3, "train.steps": 6})


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """The working folder of one process that was left alone."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train.main([*argv, f"--workdir={workdir}"])
    return workdir


@pytest.fixture(scope="module")
def killed(argv, tmp_path_factory):
    """The working folder of two processes: SIGTERM reached one of them; restarted, one of them was killed."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    assert job(workdir, argv, 2, 2, {1: ("SIGTERM", 2)}) == [75, 75], logs(workdir)
    # Both hear of it a step later, and save the same one.
    assert sorted(step.name for step in (workdir / "checkpoints").iterdir()) == ["2", "3"]
    first, second = job(workdir, argv, 2, 2, {1: ("SIGKILL", 3)})
    assert second == -9, logs(workdir)
    assert first not in (0, 2, 75), logs(workdir)
    assert sorted(step.name for step in (workdir / "checkpoints").iterdir() if step.name.isdigit()) == ["2", "3", "4"]
    return workdir


@pytest.mark.parametrize(("num", "devices"), cases([(2, 2)], [(1, 2), (4, 1)]))
def test_any_number_of_processes_goes_on_as_one_would_have(argv, whole, killed, tmp_path, num, devices):
    workdir = shutil.copytree(killed, tmp_path / "run")
    assert job(workdir, argv, num, devices, {}) == [0] * num, logs(workdir)
    rows, expected = (runs.read_jsonl(folder / "metrics.jsonl") for folder in (workdir, whole))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, other in zip(rows, expected, strict=True):
        assert (row["examples"], row["tokens"]) == (other["examples"], other["tokens"])
        for name in ("loss", "grad_norm", "reference_point"):  # a margin needs both labels in a batch
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} {row['step']}")
    ours, theirs = load_model(workdir), load_model(whole)
    assert ours.source.endswith("checkpoints/6")
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert {path.name for path in workdir.iterdir()} == {path.name for path in whole.iterdir()}
    assert len(list((workdir / "tensorboard").iterdir())) == 3  # one writer each: interrupted, killed, and this one


def test_an_error_of_the_first_process_ends_the_others(argv, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "letter").touch()
    assert job(workdir, argv, 2, 1, {}) == [2, 2], logs(workdir)
    assert "not the folder of a run" in (tmp_path / "process-0.log").read_text()
    assert [path.name for path in workdir.iterdir()] == ["letter"]
