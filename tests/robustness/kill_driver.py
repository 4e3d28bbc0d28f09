"""Kills the real commands at random moments; the same commands again must end with what an uninterrupted run makes.

    python -m tests.robustness.kill_driver --kills=50 [--seed=0] [--only=train,generate] [--folder=DIR]

A trial starts a command in an empty folder and kills it one to three times in a row, half of the kills at any moment of
its run and half in the middle of writing a file, a checkpoint or a part of the reference cache; then the command may
end. It must exit with status 0, its output must be that of the uninterrupted run, bit for bit, and what a killed one
had finished must not have been made again. After the kills every job gets a SIGTERM and a SIGINT while it works: exit
status 75, and the same end.

Between two kills, jobs that keep a working folder meet the same command once more while they run, which must be
refused (exit status 2), and other inputs (records, labels, weights, template), which must be refused by name.

To add a command, add a `Job` to JOBS.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from elbo_kto_jax.checkpoints.huggingface import is_published
from elbo_kto_jax.runtime.files import to_json
from launch.quickstart import write_untrained
from tests import runs
from tests.robustness import commands

_POLL = 0.004  # seconds between two looks for a file that is being written
_PAUSES = (0.3, 0.1, 0.03, 0.0, 0.0)  # seconds between the start of the work and a signal, one try after another
_PARTIAL = (".tmp", ".partial", "orbax-checkpoint-tmp")  # in the names of files and folders that are not whole yet
SETTINGS = {
    "data.max_length": 64,
    "train.steps": 8,
    "train.checkpoint_every": 1,
    "train.eval_every": 4,
    "train.samples": 2,
    "sampler.batch_size": 2,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A command: its words, given the folder of what all trials share and that of the trial, and what it must make.

    `kept`, given the folder of the trial: what the same command must not make again -> when it was written.
    """

    words: Callable[[Path, Path], list[str]]
    result: Callable[[Path], Any]
    kept: Callable[[Path], dict[str, int]] | None = None


def _train(shared: Path, trial: Path) -> list[str]:
    return ["elbo_kto_jax.train", *_recipe(shared), f"--workdir={trial / 'run'}"]


def _overwrite(shared: Path, trial: Path) -> list[str]:
    """The same over a run of another config, which is there at the start."""
    if not (trial / "run").exists():
        (trial / "run").mkdir()
        (trial / "run" / "config.json").write_text('{"config": {"seed": 1}}')
        (trial / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    return [*_train(shared, trial), "--overwrite"]


def _precompute(shared: Path, trial: Path) -> list[str]:
    return ["elbo_kto_jax.precompute", *_recipe(shared), f"--workdir={trial / 'run'}"]


def _generate(shared: Path, trial: Path) -> list[str]:
    words = (f"--checkpoint={shared / 'model'}", f"--prompts={shared / 'eval.jsonl'}", f"--out={trial / 'out.jsonl'}")
    return ["elbo_kto_jax.generate", *runs.flags(SETTINGS, *words)]


def _from_hf(shared: Path, trial: Path) -> list[str]:
    return ["conversion.from_hf", f"--source={shared / 'model'}", f"--out={trial / 'out'}"]


def _to_hf(shared: Path, trial: Path) -> list[str]:
    return ["conversion.to_hf", f"--source={shared / 'ours'}", f"--out={trial / 'out'}", "--shard-size=100KB"]


def _sweep(shared: Path, trial: Path) -> list[str]:
    lists = {
        "checkpoints": [str(shared / "model"), str(shared / "other")],
        "tasks": ["win_rate", "elbo"],
        "sampler": [{}, {"steps": 2}],
        "draws": [1, 4],
        "baseline": str(shared / "model"),
        "prompts": str(shared / "prompts.jsonl"),
        "data": str(shared / "eval.jsonl"),
        "limit": 0,
    }
    config = runs.grid(shared / "grid.py", lists)
    return ["elbo_kto_jax.sweep", *runs.flags(SETTINGS, f"--workdir={trial / 'run'}", config=config)]


def _recipe(shared: Path) -> list[str]:
    names = {"model.path": "model", "data.train": "train.jsonl", "data.eval": "eval.jsonl"}
    return runs.flags({**SETTINGS, **{key: shared / name for key, name in names.items()}})


def _trained(trial: Path) -> Any:
    """Every checkpoint's arrays and progress, the metrics and the answers of a run, but for times."""
    run = trial / "run"
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in runs.read_jsonl(run / "metrics.jsonl")]
    steps = {}
    for folder in sorted((run / "checkpoints").iterdir()):
        manifest = json.loads((folder / "assets" / "manifest.json").read_text())
        progress = {key: value for key, value in manifest["progress"].items() if key != "seconds"}
        steps[folder.name] = ({name: tree["digest"] for name, tree in manifest["trees"].items()}, progress)
    return rows, steps, (run / "samples.json").read_text(), cached(run)


def finished(trial: Path) -> dict[str, int]:
    """The checkpoints and the parts of the reference cache of a trial, and when they were written."""
    found = [*trial.glob("run/checkpoints/*/assets/manifest.json"), *trial.glob("run/reference*/*/steps-*.npy")]
    return {str(file): file.stat().st_mtime_ns for file in found if not any(p in str(file) for p in _PARTIAL)}


def unfinished(trial: Path) -> dict[str, int]:
    """The same of a run that was begun with --overwrite; once it is done, the same command starts again."""
    file = trial / "run" / "config.json"
    begun = file.is_file() and "unfinished" in json.loads(file.read_text())
    return finished(trial) if begun else {}


def cached(run: Path) -> dict[str, bytes]:
    """Step -> B_ref of a working folder, however the parts are cut."""
    found = {}
    for part in sorted(run.glob("reference*/*/steps-*.npy")):
        first = int(part.name.split("-")[1])
        found |= {f"{part.parent.name} {first + i}": row.tobytes() for i, row in enumerate(np.load(part))}
    return found


def _swept(trial: Path) -> Any:
    """The table of a sweep, and the answers, scores and verdicts behind it."""
    files = sorted((trial / "run").rglob("*.jsonl"))
    return runs.table(trial / "run"), {str(file.relative_to(trial)): file.read_text() for file in files}


def _checkpoint(trial: Path) -> Any:
    return json.loads((trial / "out" / "assets" / "manifest.json").read_text())


def _files(trial: Path) -> dict[str, str]:
    files = (file for file in (trial / "out").rglob("*") if file.is_file())
    return {str(f.relative_to(trial)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


JOBS = {
    "train": Job(_train, _trained, finished),
    "overwrite": Job(_overwrite, _trained, unfinished),
    "precompute": Job(_precompute, lambda trial: cached(trial / "run"), finished),
    "generate": Job(_generate, lambda trial: (trial / "out.jsonl").read_bytes()),
    "from_hf": Job(_from_hf, _checkpoint),
    "to_hf": Job(_to_hf, _files),
    "sweep": Job(_sweep, _swept),
}


def _append(shared: Path) -> str:
    file = shared / "train.jsonl"
    runs.write_jsonl(file, [*runs.read_jsonl(file), *runs.records(1, first=40)])
    return "config.data.train: 12 examples -> 13"


def _flip(shared: Path) -> str:
    file = shared / "train.jsonl"
    runs.write_jsonl(file, [{**row, "label": not row["label"]} for row in runs.read_jsonl(file)])
    return "config.data.train: labels"


def _replace_weights(shared: Path) -> str:
    """Equally many bytes of the same age."""
    file, before = shared / "model" / "model.safetensors", (shared / "model" / "model.safetensors").stat()
    shutil.copyfile(shared / "other" / "model.safetensors", file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return "config.model.path: weights"


def _replace_template(shared: Path) -> str:
    file = shared / "model" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    (shared / "model" / "chat_template.jinja").unlink(missing_ok=True)
    return "config.model.path: chat template"


CHANGES = {"records": _append, "labels": _flip, "weights": _replace_weights, "template": _replace_template}


@dataclasses.dataclass
class Count:
    """What was done to a job."""

    kills: int = 0
    in_writes: int = 0  # kills that left a file or folder that was not whole
    trials: int = 0
    signals: int = 0
    refusals: int = 0  # of a second command and of other inputs
    failures: list[str] = dataclasses.field(default_factory=list)


class Driver:
    """One run of the driver in `folder`: shared/ for what every trial reads, one folder a trial beside it."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.shared, self.rng = folder, folder / "shared", random.Random(seed)
        self.counts: dict[str, Count] = {}
        runs.write_jsonl(self.shared / "train.jsonl", runs.records(12))
        runs.write_jsonl(self.shared / "eval.jsonl", runs.records(6, first=12))
        prompts = (
            {"prompt": [{"role": "user", "content": f"Capitals {word}"}], "answer": word} for word in ("a", "bc")
        )
        runs.write_jsonl(self.shared / "prompts.jsonl", list(prompts))
        for seed, name in enumerate(("model", "other")):
            if not is_published(self.shared / name):
                write_untrained(self.shared / name, seed)

    def attack(self, name: str, kills: int, signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)) -> Count:
        """Kills the job `name` that often, then sends it each of `signals`."""
        job, count = JOBS[name], self.counts.setdefault(name, Count())
        if name == "to_hf" and not (self.shared / "ours").exists():
            self.run(_from_hf(self.shared, self.shared / "of"), self.shared / "of")
            (self.shared / "of" / "out").rename(self.shared / "ours")
        whole, began = self.fresh(f"{name}-whole"), time.monotonic()
        status = self.run(job.words(self.shared, whole), whole)
        if status:
            count.failures.append(f"the uninterrupted run exited with {status}: see {whole / 'log'}")
            return count
        expected, seconds = job.result(whole), time.monotonic() - began
        while count.kills < kills:
            trial = self.fresh(f"{name}-{count.trials}")
            for _ in range(min(self.rng.randint(1, 3), kills - count.kills)):
                self.kill(job, trial, seconds, count)
                if job.kept and (trial / "run" / "config.json").is_file():
                    self.change(job, trial, count)
            self.end(job, trial, expected, count)
            print(
                f"{name}: {count.kills} of {kills} kills, {len(count.failures)} failures", file=sys.stderr, flush=True
            )
        if job.kept:
            trial = self.fresh(f"{name}-second")
            self.second(job, trial, count)
            self.end(job, trial, expected, count)
        for number in signals:
            for pause in _PAUSES:  # sooner, where the command was over before the signal
                trial, before = self.fresh(f"{name}-{signal.Signals(number).name}"), count.signals
                self.signal(job, trial, number, pause, count)
                self.end(job, trial, expected, count)
                if count.signals > before:
                    break
        print(f"{name}: {dataclasses.asdict(count)}", file=sys.stderr, flush=True)
        return count

    def fresh(self, name: str) -> Path:
        trial = self.folder / name
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir(parents=True)
        return trial

    def run(self, words: list[str], trial: Path) -> int:
        trial.mkdir(exist_ok=True)
        return commands.finish(commands.start(words, trial / "log"))

    def change(self, job: Job, trial: Path, count: Count) -> None:
        """The command after something that it reads was changed, which is put back afterwards."""
        kind, before = self.rng.choice(sorted(CHANGES)), shutil.copytree(self.shared, self.folder / "before")
        done = job.kept(trial) if job.kept else {}
        try:
            named = CHANGES[kind](self.shared)
            status, text = self.run(job.words(self.shared, trial), trial), (trial / "log").read_text(errors="replace")
        finally:
            shutil.rmtree(self.shared)
            before.rename(self.shared)
        if not done and "began with other inputs" not in text:
            shutil.rmtree(trial / "run", ignore_errors=True)  # there was nothing to go on with
        elif status != 2 or named not in text or "Traceback" in text or job.kept(trial) != done:
            count.failures.append(f"{trial}: {kind} changed, exit status {status}: see {trial / 'log'}")
        else:
            count.refusals += 1

    def second(self, job: Job, trial: Path, count: Count) -> None:
        """The same command while this one is at work, which is held up meanwhile."""
        process, log = commands.start(job.words(self.shared, trial), trial / "log"), trial / "second"
        while process.poll() is None and not working(trial / "log"):
            time.sleep(_POLL)
        process.send_signal(signal.SIGSTOP)
        status = commands.finish(commands.start(job.words(self.shared, trial), log))
        process.send_signal(signal.SIGCONT)
        text = log.read_text(errors="replace")
        if status != 2 or f"in use by process {process.pid} " not in text or "Traceback" in text:
            count.failures.append(f"{trial}: a second command, exit status {status}: see {log}")
        count.refusals += 1
        if commands.finish(process):
            count.failures.append(f"{trial}: exit status {process.returncode}: see {trial / 'log'}")

    def kill(self, job: Job, trial: Path, seconds: float, count: Count) -> None:
        """One SIGKILL, at a random moment of the run or of a write."""
        done = job.kept(trial) if job.kept else {}
        process, began = commands.start(job.words(self.shared, trial), trial / "log"), time.monotonic()
        in_write = self.rng.random() < 0.5
        until = began + self.rng.uniform(0.0, seconds)
        writes, seen = self.rng.randint(1, 6), set()
        while process.poll() is None and (in_write or time.monotonic() < until):
            if in_write:
                seen |= partial_files(trial)
                if len(seen) >= writes:
                    time.sleep(self.rng.choice((0.0, 0.0, 0.005, 0.02)))
                    break
            time.sleep(_POLL)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            count.kills += 1
        process.wait()
        if process.returncode == -signal.SIGKILL:
            count.in_writes += bool(partial_files(trial))
            if not done.items() <= finished(trial).items():
                count.failures.append(f"{trial}: what was finished before was lost")
        elif process.returncode and not too_late(process.returncode, trial / "log"):
            count.failures.append(f"{trial}: exit status {process.returncode}: see {trial / 'log'}")

    def signal(self, job: Job, trial: Path, number: int, pause: float, count: Count) -> None:
        """A signal that may be answered, at most `pause` seconds after the command has got to its work."""
        process, log = commands.start(job.words(self.shared, trial), trial / "log"), trial / "log"
        names = {path.name for path in trial.iterdir()}
        while process.poll() is None and not (working(log) or partial_files(trial)):
            time.sleep(_POLL)
        time.sleep(self.rng.uniform(0.0, pause))
        if process.poll() is None:
            process.send_signal(number)
            count.signals += 1
            status = commands.finish(process)
            text = log.read_text(errors="replace")
            if status not in (0, 75) or "Traceback" in text or (status == 75) != ("interrupted: " in text):
                count.failures.append(f"{trial}: {number}: exit status {status}: see {log}")
            left = {path.name for path in trial.iterdir()} - names
            count.failures += [f"{trial}: {name} is not whole" for name in left if any(p in name for p in _PARTIAL)]

    def end(self, job: Job, trial: Path, expected: Any, count: Count) -> None:
        """Lets the command end, unless it has, and compares."""
        count.trials += 1
        done = job.kept(trial) if job.kept else {}
        status, log = self.run(job.words(self.shared, trial), trial), trial / "log"
        if (status and not too_late(status, log)) or "Traceback" in log.read_text(errors="replace"):
            count.failures.append(f"{trial}: the same command again exited with {status}: see {log}")
        elif not done.items() <= finished(trial).items():
            count.failures.append(f"{trial}: what was finished before was lost")
        elif job.result(trial) != expected:
            count.failures.append(f"{trial}: another result than that of the uninterrupted run")
        else:
            shutil.rmtree(trial)


def partial_files(folder: Path) -> set[tuple[str, int]]:
    """What is being written below `folder` right now."""
    found = set()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if any(mark in name for mark in _PARTIAL):
                path = os.path.join(parent, name)
                try:
                    found.add((path, os.stat(path).st_ctime_ns if name.endswith(".tmp") else 0))
                except OSError:  # it was renamed
                    found.add((path, 1))
    return found


def too_late(status: int, log: Path) -> bool:
    """Whether a command had nothing to do, since the one before it in this trial had ended before its kill."""
    return status == 2 and "exists already" in log.read_text(errors="replace")


def working(log: Path) -> bool:
    """Whether a command has written a line or a bar of progress, and so has handlers for signals."""
    return any(
        word in log.read_bytes() for word in (b"loading", b"tokenise", b"reference", b"reading", b"generate", b"|")
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.kill_driver", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="in all, spread over the jobs, half of them for train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help=f"jobs, of {','.join(JOBS)}")
    parser.add_argument("--folder", type=Path, help="where the trials are; those that fail stay there")
    parser.add_argument("--no-signals", action="store_true", help="leave SIGTERM and SIGINT out")
    options = parser.parse_args(argv)
    names, began = options.only.split(",") if options.only else list(JOBS), time.monotonic()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="elbo_kto_jax_kills_"))
    driver = Driver(folder, options.seed)
    weight = {name: len(names) if name == "train" and len(names) > 1 else 1 for name in names}
    for i, name in enumerate(names):
        rest = options.kills - sum(count.kills for count in driver.counts.values())
        share = round(rest * weight[name] / sum(weight[later] for later in names[i:]))
        driver.attack(name, share, () if options.no_signals else (signal.SIGTERM, signal.SIGINT))
    counted = ("kills", "in_writes", "signals", "refusals", "trials")
    total = {name: sum(getattr(count, name) for count in driver.counts.values()) for name in counted}
    failures = [failure for count in driver.counts.values() for failure in count.failures]
    if not failures:
        shutil.rmtree(folder, ignore_errors=True)
    print(to_json({**total, "failures": failures, "seconds": time.monotonic() - began}))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
