"""A long run of the tiny recipe in this process: flat memory, nothing compiled late, no file left open.

    python -m tests.robustness.soak --steps=2000 [--folder=DIR]

The recipe is configs/tiny.py on the quickstart's feedback, with held-out evaluation and checkpoints. After each step
the resident set, the open files and the compilations so far are noted; everything that may grow must have done so by
step `WARM`. Exit status 1: it did not hold.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from elbo_kto_jax import train
from elbo_kto_jax.checkpoints.tiny import write_untrained
from elbo_kto_jax.data.capitals import write_data
from elbo_kto_jax.quickstart import CONFIG
from elbo_kto_jax.runtime.files import to_json
from elbo_kto_jax.training import loop

WARM = 200  # steps
_MOST_GROWTH = 0.03  # of the resident set after step WARM, by the median of the last WARM / 2 steps
_COMPILED = "/jax/core/compile/backend_compile_duration"


def resident() -> int:
    """The resident set of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(folder: Path, steps: int, warm: int = WARM) -> dict:
    """Runs `steps` steps in `folder` and says what grew after step `warm`."""
    compilations: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compilations.append(seconds) if event == _COMPILED else None
    )
    data = folder / "data"
    write_data(data, seed=0)
    held_out = data / "held_out.jsonl"
    held_out.write_text("".join((data / "demonstrations.jsonl").read_text().splitlines(keepends=True)[:64]))
    write_untrained(folder / "model", seed=0)
    notes, real = [], loop.MetricsLog.write

    def write(self, row):
        real(self, row)
        notes.append((row["step"], resident(), len(os.listdir("/proc/self/fd")), len(compilations)))

    every = max(warm // 2, 1)
    argv = [
        f"--config={CONFIG}",
        f"--config.model.path={folder / 'model'}",
        f"--config.data.train={data / 'feedback.jsonl'}",
        f"--config.data.eval={held_out}",
        f"--config.train.microbatch_tokens={1664 // jax.device_count()}",  # of each device: the recipe's in all
        f"--config.train.steps={steps}",
        f"--config.train.eval_every={every}",
        f"--config.train.checkpoint_every={every}",
        f"--workdir={folder / 'run'}",
    ]
    loop.MetricsLog.write, began = write, time.monotonic()
    try:
        summary = train.main(argv)
    finally:
        loop.MetricsLog.write = real
    step, memory, files, compiled = np.array(notes).T
    after = memory[(step > warm) & (step <= warm + every)]
    growth = float(np.median(memory[-every:]) / np.median(after) - 1)
    gc.collect()
    late_files = int(np.max(files[-every:]) - np.max(files[(step > warm) & (step <= warm + every)]))
    late_compilations = int(compiled[-1] - compiled[step == warm][0])
    return {
        "steps": summary["steps"],
        "growth": growth,
        "resident_mb": [round(float(np.median(part)) / 1e6, 1) for part in (after, memory[-every:])],
        "late_compilations": late_compilations,
        "late_files": late_files,
        "holds": growth <= _MOST_GROWTH and not late_compilations and late_files <= 0,
        "seconds": time.monotonic() - began,
        "notes": [tuple(map(int, row)) for row in np.array(notes)[:: max(1, len(notes) // 40)]],
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="where to run (default: a temporary folder)")
    options = parser.parse_args(argv)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="elbo_kto_jax_soak_"))
    try:
        found = soak(folder, options.steps)
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    for note in found.pop("notes"):
        print(
            "step {}: {:.1f} MB, {} files, {} compilations".format(note[0], note[1] / 1e6, *note[2:]), file=sys.stderr
        )
    print(to_json(found))
    return not found["holds"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
