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


CASES: dict[str, Callable[[str], bool]] = {
    "brackets": lambda out: statuses(out) == [0, 0, 0, 0],
    "denoising_page": lambda out: "0 broken characters; True emoji there" in out,
    "prompt_latin1": lambda out: statuses(out) == [2] and "--prompt is not UTF-8 text" in out,
    "tilde": lambda out: statuses(out) == [0, 0] and "home/run/config.json" in out and "going on from" not in out,
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
