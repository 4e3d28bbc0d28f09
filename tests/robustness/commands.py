"""Real commands in processes of their own, for tests that kill them or look at what they leave."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.share import QUICK_COMPILATION, WHOLE

PROJECT_ROOT = Path(__file__).resolve().parents[2]

# Runs the module argv[1] as `python -m` would. Parts of the reference cache are saved after every step, so that a kill
# can hit one, and an audit hook of the interpreter sees every object that a pickle would make.
_RUN = """
import runpy, sys
def audit(event, details):
    if event == "pickle.find_class":
        raise RuntimeError(f"a pickle is read: {details}")
sys.addaudithook(audit)
from elbo_kto_jax.training import reference
reference._SAVE_EVERY = 0.0
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def environment(**more: str) -> dict[str, str]:
    """One CPU device, compiled programs in a cache of the machine's temporary folder, no network."""
    return {
        **{key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "ROBUSTNESS")},
        **({} if WHOLE else {"XLA_FLAGS": " ".join(QUICK_COMPILATION)}),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "elbo_kto_jax_robustness_compiled")
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **more,
    }


def start(words: list[str], log: Path, more: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Starts `python -m WORDS`, stdout and stderr to `log`."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", _RUN, *words],
            cwd=PROJECT_ROOT,
            env=environment(**(more or {})),
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def finish(process: subprocess.Popen, seconds: float = 600.0) -> int:
    """The exit status; a process that hangs is killed, and -SIGKILL is returned."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait()
