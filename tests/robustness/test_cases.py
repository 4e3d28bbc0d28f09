"""The cases that users' files, endpoints and attacks brought up: `../shared/cases/NAME/repro.sh` does what it should.

Every folder of cases has a script with a `# should:` line. It runs here as it stands, from the project's root, and its
output (stdout and stderr together) is held against the row of CASES that has its name. A row is a function of the
output that returns whether the case does what its script says. A case without a row is an error.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.robustness.commands import PROJECT_ROOT, environment

FOLDER = Path(os.environ.get("CASES_DIR", PROJECT_ROOT.parent / "shared" / "cases"))
GOLDEN = Path(os.environ.get("GOLDEN_DIR", PROJECT_ROOT.parent / "shared" / "golden"))
SECONDS = 600.0  # for one script, on a busy machine


def statuses(output: str) -> list[int]:
    """The exit statuses that a script printed, in order."""
    return [int(part.split()[0]) for part in output.split("rc=")[1:]]


def names_the_mixture_of_experts(output: str) -> bool:
    return statuses(output) == [2] and "num_experts" in output and "LLaDA-MoE" in output and "activation" not in output


def exports_the_dtype_that_it_names(output: str) -> bool:
    """The last two lines: what config.json says, and what the header of the safetensors file says."""
    *_, said, stored = output.splitlines()
    return (said, stored) in (
        ('"torch_dtype": "float32"', '"dtype":"F32"'),
        ('"torch_dtype": "bfloat16"', '"dtype":"BF16"'),
    )


def finds_the_folders_equal(output: str) -> bool:
    return statuses(output) == [0] and '"equal": true' in output


def succeeds(output: str) -> bool:
    return statuses(output) == [0]


CASES: dict[str, Callable[[str], bool]] = {
    "config_bookkeeping": succeeds,
    "config_moe": names_the_mixture_of_experts,
    "export_dtype": exports_the_dtype_that_it_names,
    "verify_published": finds_the_folders_equal,
}


def names() -> list[str]:
    """The cases that are present."""
    return sorted(script.parent.name for script in FOLDER.glob("*/repro.sh"))


@pytest.mark.parametrize("name", names() or ["none"])
def test_case(name, tmp_path):
    if not (FOLDER / name / "repro.sh").is_file():
        pytest.skip(f"no cases in {FOLDER}; set CASES_DIR")
    if not (GOLDEN / "policy").is_dir():
        pytest.skip(f"no golden models in {GOLDEN}; set GOLDEN_DIR")
    run = subprocess.run(
        ["bash", str(FOLDER / name / "repro.sh")],
        cwd=PROJECT_ROOT,
        env=environment(PY=sys.executable, GOLDEN=str(GOLDEN), T=str(tmp_path), PYTHONPATH=str(PROJECT_ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=SECONDS,
    )
    assert "Traceback (most recent call last)" not in run.stdout, run.stdout[-4000:]
    assert CASES[name](run.stdout), run.stdout[-4000:]
