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


def same_time(output: str) -> bool:
    """Whether the times that lines end with ("... 1.23 s") differ by less than a half."""
    seconds = [float(line.split()[-2]) for line in output.splitlines() if line.endswith(" s")]
    return len(seconds) == 2 and max(seconds) < 1.5 * min(seconds)


CASES: dict[str, Callable[[str], bool]] = {
    "content_parts": lambda out: statuses(out) == [0] and "1 of 1 desirable and 1 of 1 undesirable" in out,
    "json_strings": lambda out: statuses(out) == [0] and "2 records write messages as JSON text" in out,
    "mixed_folder": lambda out: statuses(out) == [0] and "6 of 6 desirable and 6 of 6 undesirable" in out,
    "prefill": lambda out: "50, 372, 25, 262]" in out and out.count("1039") == 1,
    "special_tokens_speed": same_time,
    "tokenizer_without_pad": lambda out: statuses(out) == [0] and '"records": 11' in out,
    "tool_calls": lambda out: statuses(out) == [2] and "empty_content.jsonl:1: field `tools`" in out,
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
