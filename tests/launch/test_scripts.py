"""launch/*.sh: what they would run, and what they do run against stand-ins for SLURM's commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import PROJECT_ROOT
from tests.launch.tools import tool

LAUNCH = PROJECT_ROOT / "launch"
TRAIN = ["python", "-m", "elbo_kto_jax.train", "--config=configs/kto_mix.py", "--workdir=/mnt/shared/a b"]
TPU_VM = ["--name=slice", "--zone=us-west4-a"]
GKE = ["--name=job", "--image=here/image:1", "--accelerator=tpu-v5-lite-podslice", "--topology=4x8"]
SLURM = ["--nodes=2", "--gpus-per-node=4"]


def run(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(LAUNCH / script), *arguments], capture_output=True, text=True, **options)


def dry_run(script: str, *arguments: str, command: list[str] = TRAIN) -> str:
    done = run(script, *arguments, "--dry-run", "--", *command)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def words(line: str) -> list[str]:
    """The words of a line of shell, by bash itself."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_shellcheck():
    done = subprocess.run([tool("shellcheck"), *sorted(LAUNCH.glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_slice_of_tpu_vms():
    (line,) = dry_run("tpu_vm.sh", *TPU_VM).splitlines()
    *gcloud, command = words(line)
    assert gcloud == ["gcloud", *["compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=us-west4-a", "--worker=all"]]
    at, _, run_there = command.removeprefix("--command=").rpartition(" exec ")
    assert at.startswith("cd elbo_kto_jax &&")
    assert words(run_there) == TRAIN


def test_installing_on_a_slice_copies_first_and_mounts_before_it_runs():
    done = run("tpu_vm.sh", *TPU_VM, "--project=p", "--install", "--share=10.0.0.2:/share", "--dry-run", "--", *TRAIN)
    calls = [words(line)[:5] for line in done.stdout.splitlines() if line.startswith(("tar", "gcloud"))]
    assert [call[0] if call[0] == "tar" else call[4] for call in calls] == ["tar", "scp", "ssh", "ssh", "ssh"]
    assert done.stdout.count("--project=p") == 4
    assert done.stdout.index("uv pip install") < done.stdout.index("/mnt/shared") < done.stdout.index("kto_mix.py")


def test_a_job_on_gke():
    jobset = yaml.safe_load(dry_run("gke.sh", *GKE, "--slices=2", "--claim=filestore"))
    (job,) = jobset["spec"]["replicatedJobs"]
    template = job["template"]["spec"]
    pod = template["template"]["spec"]
    (container,) = pod["containers"]
    assert (jobset["kind"], jobset["metadata"]["name"], job["replicas"]) == ("JobSet", "job", 2)
    assert template["parallelism"] == template["completions"] == 32 / 4
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert (container["image"], container["command"]) == ("here/image:1", TRAIN)
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/mnt/shared"}]
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "filestore"}}]


def test_a_job_on_gke_quotes_its_words():
    strange = ["python", "-c", "print(\"a\\b\", 'c')", "--x=$HOME"]
    jobset = yaml.safe_load(dry_run("gke.sh", *GKE, command=strange))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == strange
    assert "volumes" not in pod
    assert "serviceAccountName" not in pod


def test_a_job_on_gke_in_a_bucket():
    jobset = yaml.safe_load(dry_run("gke.sh", *GKE, "--service-account=kto", "--claim=c", "--restarts=3"))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "kto"
    assert pod["terminationGracePeriodSeconds"] == 300
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 3}


def test_a_job_through_xpk():
    (line,) = dry_run("gke.sh", "--xpk-cluster=c", *GKE[:2], "--accelerator=v5litepod-16").splitlines()
    *xpk, command = words(line)
    assert xpk[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=c", "--workload=job", "--tpu-type=v5litepod-16", "--docker-image=here/image:1"} < set(xpk)
    # XPK gives up where a command ends with a status below 127 that it is not told of, and gives 30 seconds to save.
    assert {"--restart-on-exit-codes=1-126", "--termination-grace-period-seconds=300"} < set(xpk)
    assert words(command.removeprefix("--command=")) == TRAIN


def test_a_slurm_job():
    script = dry_run("slurm.sh", *SLURM, "--partition=gpu", f"--python={sys.executable}")
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --signal=TERM@300"} < set(script.splitlines())
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert words(srun)[2:] == TRAIN


def test_a_python_in_the_home_folder():
    script = dry_run("slurm.sh", *SLURM, "--python=~/venv/bin/python")
    (path,) = [line for line in script.splitlines() if line.startswith("export PATH=")]
    assert path == f"export PATH={Path.home()}/venv/bin:$PATH"


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("tpu_vm.sh", ["--name=a", "--", "true"], "--zone"),
        ("tpu_vm.sh", TPU_VM, "command"),
        ("tpu_vm.sh", [*TPU_VM, "--worker=0", "--", "true"], "--worker=0"),
        ("tpu_vm.sh", [*TPU_VM, "--share=nowhere", "--", "true"], "--share=nowhere"),
        ("gke.sh", [*GKE[1:], "--", "true"], "--name"),
        ("gke.sh", GKE, "command"),
        ("gke.sh", [*GKE, "--topology=4", "--", "true"], "--topology=4"),
        ("gke.sh", [*GKE, "--chips-per-host=5", "--", "true"], "32 chips"),
        ("gke.sh", [*GKE, "--slices=two", "--", "true"], "two"),
        ("slurm.sh", ["--nodes=2", "--", "true"], "--gpus-per-node"),
        ("slurm.sh", SLURM, "command"),
        ("slurm.sh", [*SLURM, "now", "--", "true"], "now"),
    ],
)
def test_what_is_missing_is_named(script, arguments, named):
    done = run(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


SRUN = """#!/usr/bin/env bash
export SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "${@:2}" & done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "$status"
"""
PROGRAM = """
import os, sys, jax
from jax.experimental import multihost_utils
from elbo_kto_jax.runtime import processes
processes.start(None, None, None)
found = multihost_utils.process_allgather(jax.process_index()).tolist()
os.write(1, f"\\n{found}\\n".encode())  # one write, on a line of its own: Gloo's lines of both processes come between
sys.exit(75)
"""


def test_processes_of_a_slurm_job_find_each_other_and_an_interrupted_job_is_queued_again(tmp_path):
    """Stand-ins: sbatch runs the script, srun starts two tasks with SLURM's variables."""
    for name, text in {
        "sbatch": "#!/usr/bin/env bash\nexport SLURM_JOB_ID=$$\nbash -s\n",
        "srun": SRUN,
        "scontrol": '#!/usr/bin/env bash\nprintf "\\nscontrol %s\\n" "$1"\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
    arguments = ["--nodes=2", "--gpus-per-node=1", f"--python={sys.executable}", "--", Path(sys.executable).name, "-c"]
    done = run("slurm.sh", *arguments, PROGRAM, env=environment)
    lines = done.stdout.splitlines()
    assert done.returncode == 75, done.stderr
    assert lines.count(json.dumps([0, 1])) == 2
    assert lines[-1] == "scontrol requeue"
