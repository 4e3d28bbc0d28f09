"""Images, SkyPilot's tasks, and the command lines in everything that launches a job."""

import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from elbo_kto_jax import train
from tests.conftest import PROJECT_ROOT
from tests.launch.tools import tool

LAUNCH = PROJECT_ROOT / "launch"
DOCKERFILES = sorted(LAUNCH.glob("Dockerfile.*"))
TASKS = sorted(LAUNCH.glob("skypilot_*.yaml"))
PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())
# The fields of a task that are used here, as https://docs.skypilot.co/en/latest/reference/yaml-spec.html has them.
TASK = {"name": str, "workdir": str, "num_nodes": int, "resources": dict, "envs": dict, "setup": str, "run": str}
RESOURCES = {
    "infra": str,
    "accelerators": str,
    "accelerator_args": dict,
    "use_spot": bool,
    "disk_size": int,
    "any_of": list,
    "job_recovery": dict,
}
RECOVERY = {"max_restarts_on_errors": int, "recover_on_exit_codes": list}


def instructions(file: Path) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile, and what follows it."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def assert_fields(mapping: dict, fields: dict[str, type], where: str) -> None:
    assert {key: type(value) for key, value in mapping.items()}.items() <= fields.items(), where


# ---- images ----


def test_hadolint():
    done = subprocess.run([tool("hadolint"), "--no-color", *DOCKERFILES], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.suffix)
def test_an_image(file):
    found = instructions(file)
    said = dict(found)
    arguments = dict(value.split("=", 1) for name, value in found if name == "ARG")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", said["FROM"])
    assert said["USER"].replace("${RUN_AS}", arguments.get("RUN_AS", "")) == "1000"
    assert json.loads(said["ENTRYPOINT"]) == ["elbo-kto"]
    extras = arguments["EXTRAS"].split(",")
    assert extras[0] == file.suffix.removeprefix(".")
    assert set(extras) <= PROJECT["project"]["optional-dependencies"].keys()
    assert not re.search(r"(?i)token|secret|password|api_?key", file.read_text())


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.suffix)
def test_the_layer_of_dependencies_has_what_their_installation_reads(file):
    """And no code: it is made again only when pyproject.toml or the version changes."""
    found = instructions(file)
    copied = [value.split()[:-1] for name, value in found if name == "COPY"]
    assert copied == [["pyproject.toml"], ["elbo_kto_jax/__init__.py"], ["."]]
    (made,) = [value for name, value in found if name == "RUN" and "EXTRAS" in value]
    read = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]]
    read += PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert set(read) <= set(made.split())
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "elbo_kto_jax/__init__.py"


def test_only_the_project_goes_into_an_image():
    ignored = [line for line in (PROJECT_ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert kept == {"LICENSE", "README.md", "configs", "conversion", "elbo_kto_jax", "launch", "pyproject.toml"}
    assert all((PROJECT_ROOT / name).exists() for name in kept)


# ---- SkyPilot ----


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_a_task_of_skypilot_s(file):
    task = yaml.safe_load(file.read_text())
    assert_fields(task, TASK, file.name)
    assert_fields(task["resources"], RESOURCES, "resources")
    assert_fields(task["resources"]["job_recovery"], RECOVERY, "job_recovery")
    for choice in task["resources"].get("any_of", [task["resources"]]):
        assert_fields(choice, RESOURCES, "any_of")
        assert re.fullmatch(r"tpu-v5litepod-16|[A-Z]\d+(-80GB)?:8", choice["accelerators"])
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]  # interrupted after saving
    assert all(value is None or isinstance(value, str) for value in task["envs"].values())
    assert task["envs"]["BUCKET"] is None  # SkyPilot asks for it
    (extras,) = re.findall(r"'\.\[(.*)\]'", task["setup"])
    assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize("part", ["setup", "run"])
@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_the_scripts_of_a_task(file, part):
    script = yaml.safe_load(file.read_text())[part]
    # SC2086: $ARGS is several words. SC2154: SkyPilot sets what is not set here.
    command = [tool("shellcheck"), "--shell=bash", "--exclude=SC2086,SC2154", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- the command lines ----


def what_it_runs(script: str, folder: Path, **variables: str) -> list[str]:
    """The words of the one call of elbo-kto in a script."""
    stub = folder / "elbo-kto"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@"\n')
    stub.chmod(0o755)
    environment = {**variables, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=folder, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\0")[:-1]


@pytest.fixture
def accepted(monkeypatch):
    """The config and the working folder of a command line of `train`, which the real parser takes."""
    monkeypatch.chdir(PROJECT_ROOT)
    monkeypatch.setattr(train, "train", lambda config, workdir, **options: {"config": config, "workdir": workdir})

    def parse(words: list[str]):
        program, *flags = words
        assert program == "train"
        # Whether an address is one that can be opened is asked in runtime/test_paths.py.
        found = train.main([flag.replace("gs://", "/").replace("s3://", "/") for flag in flags])
        return found["config"], found["workdir"]

    return parse


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_the_command_of_a_task(file, accepted, tmp_path):
    task = yaml.safe_load(file.read_text())
    (more,) = re.findall(r"ARGS: .* # more flags, as (.*)", file.read_text())
    variables = {**task["envs"], "BUCKET": "gs://bucket", "ARGS": more}
    node = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}
    words = what_it_runs(task["run"], tmp_path, **variables, **node)
    config, workdir = accepted(words)
    assert f"--workdir=gs://bucket/runs/{variables['CONFIG']}" in words
    assert str(workdir) == "/bucket/runs/kto_mix"
    assert (config.objective.name, config.mesh.fsdp) == ("elbo_kto", -1)
    assert "gpu" not in file.stem or "--coordinator=10.0.0.1:8476" in words


@pytest.mark.parametrize("name", ["gke.sh", "slurm.sh", "tpu_vm.sh"])
def test_the_command_that_the_head_of_a_script_shows(name, accepted):
    (line,) = re.findall(r"COMMAND, say: (.*)", (LAUNCH / name).read_text())
    words = shlex.split(line)
    words = words[1:] if words[0] == "elbo-kto" else [words[2].removeprefix("elbo_kto_jax."), *words[3:]]
    config, workdir = accepted(words)
    assert config.data.train == "trl-lib/kto-mix-14k"
    assert workdir.name == "kto_mix"
