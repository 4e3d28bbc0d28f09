"""The cases that users' files, endpoints and attacks brought up: `../shared/cases/NAME/repro.sh` does what it should.

Every folder of cases has a script with a `# should:` line. It runs here as it stands, from the project's root, and its
output (stdout and stderr together) is held against the row of CASES that has its name. A row is a function of the
output that returns whether the case does what its script says. A case without a row is an error.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.robustness.commands import PROJECT_ROOT, environment

FOLDER = Path(os.environ.get("CASES_DIR", PROJECT_ROOT.parent / "shared" / "cases"))
GOLDEN = Path(os.environ.get("GOLDEN_DIR", PROJECT_ROOT.parent / "shared" / "golden"))
# Their scripts import modules of a former layout of the package; our own test holds the right value.
OF_A_FORMER_LAYOUT = {"special_tokens_speed": "test_the_pattern_of_special_tokens_is_built_once"}
SECONDS = 600.0  # for one script, on a busy machine


def statuses(output: str) -> list[int]:
    """The exit statuses that a script printed, in order."""
    return [int(part.split()[0]) for part in output.split("rc=")[1:]]


def judged(output: str, **figures: int) -> bool:
    """Whether the last evaluation came to its end, with these figures in its summary."""
    summary = next((json.loads(line) for line in reversed(output.splitlines()) if line.startswith("{")), {})
    return statuses(output)[-1:] == [0] and all(summary.get(key) == value for key, value in figures.items())


def refused(output: str, *words: str) -> bool:
    """Whether the command ended with status 2 and a message that has these words."""
    return statuses(output) == [2] and all(word in output for word in words)


def judge_empty_cached(output: str) -> bool:
    return statuses(output) == [2, 0] and "{'posts': 44, '429': 0}" in output and judged(output, unparsable=0)


def lm_eval_long(output: str) -> bool:
    if importlib.util.find_spec("lm_eval") is None:  # the extra `eval` is not installed
        return refused(output, "elbo_kto_jax[eval]")
    return statuses(output) == [0] and "1 of 2 prompts" in output and "cut from the left" in output


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
    "brackets": lambda out: statuses(out) == [0, 0, 0, 0],
    "config_bookkeeping": succeeds,
    "config_moe": names_the_mixture_of_experts,
    "content_parts": lambda out: statuses(out) == [0] and "1 of 1 desirable and 1 of 1 undesirable" in out,
    "denoising_page": lambda out: "0 broken characters; True emoji there" in out,
    "export_dtype": exports_the_dtype_that_it_names,
    "json_strings": lambda out: statuses(out) == [0] and "2 records write messages as JSON text" in out,
    "judge_busy": lambda output: judged(output, comparisons=60, unparsable=0),
    "judge_empty_cached": judge_empty_cached,
    "judge_no_verdict": lambda output: refused(output, "none of the 22 prompts a verdict"),
    "judge_one_refusal": lambda output: judged(output, comparisons=58, unparsable=2, left_out=1),
    "judge_rate_limit": lambda output: judged(output, comparisons=60, unparsable=0),
    "judge_temperature": lambda output: refused(output, "--judge-temperature"),
    "judge_think": lambda output: judged(output, comparisons=60, not_judged=16, unparsable=0),
    "judge_url_without_v1": lambda output: refused(output, "/chat/completions", "usually ends in /v1"),
    "lm_eval_long": lm_eval_long,
    "mixed_folder": lambda out: statuses(out) == [0] and "6 of 6 desirable and 6 of 6 undesirable" in out,
    "prefill": lambda out: "50, 372, 25, 262]" in out and out.count("1039") == 1,
    "prompt_latin1": lambda out: statuses(out) == [2] and "--prompt is not UTF-8 text" in out,
    "tilde": lambda out: statuses(out) == [0, 0] and "home/run/config.json" in out and "going on from" not in out,
    "tokenizer_without_pad": lambda out: statuses(out) == [0] and '"records": 11' in out,
    "tool_calls": lambda out: statuses(out) == [2] and "empty_content.jsonl:1: field `tools`" in out,
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
    if name in OF_A_FORMER_LAYOUT:
        pytest.skip(f"its script imports modules of a former layout: see {OF_A_FORMER_LAYOUT[name]}")
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
