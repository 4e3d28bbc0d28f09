"""What the commands do where the disk is full or read-only: one line, exit status 2, and nothing lost.

    unshare --user --map-root-user --mount python -m tests.robustness.disk FOLDER

FOLDER/small becomes a small file system in memory, which only this process sees. Exit status 1 and a message: it did
not hold.
"""

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from elbo_kto_jax import cli, from_hf, generate, to_hf, train
from elbo_kto_jax.checkpoints.load import load_model
from tests import runs
from tests.robustness import kill_driver

FULL, READ_ONLY = "No space left on device", "cannot be written to"


def mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True)


def remount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-o", ",".join(("remount", *options)), str(folder)], check=True)


def command(main: Callable, words: list[str]) -> tuple[int, list[str]]:
    """Exit status of a command, and the lines of stderr from its error on."""
    sys.argv, errors = ["command", *words[1:]], io.StringIO()
    output = io.TextIOWrapper(io.BytesIO())
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            cli.run(main)
    except SystemExit as end:
        text = errors.getvalue()
        print(text[-3000:], file=sys.stderr)
        assert "Traceback" not in text, text
        _, _, message = text.rpartition("error: ")
        return end.code, message.strip().split("\n")


def refused(main: Callable, words: list[str], why: str) -> None:
    status, lines = command(main, words)
    assert status == 2, (words, status, lines)
    assert len(lines) == 1, lines
    assert why in lines[0], lines


def main(folder: Path) -> None:
    shared, whole, small = folder / "shared", folder / "whole", folder / "small"
    kill_driver.Driver(folder, seed=0)  # makes what the jobs read
    assert command(train.main, kill_driver.JOBS["train"].words(shared, whole))[0] == 0
    expected = kill_driver.JOBS["train"].result(whole)

    # Full in the middle of training: the steps that were saved are whole, and with more room the run goes on from them.
    small.mkdir()
    size = sum(file.stat().st_blocks * 512 for file in whole.rglob("*"))
    mount(small, f"size={size // 2}")
    refused(train.main, kill_driver.JOBS["train"].words(shared, small), FULL)
    steps = sorted(path for path in (small / "run" / "checkpoints").iterdir() if path.name.isdecimal())
    assert 1 <= len(steps) < len(expected[1]), steps
    for step in steps:
        load_model(step)
    used = {file: file.read_bytes() for file in small.rglob("*") if file.is_file()}

    # Read-only: said before any work is done.
    remount(small, "ro")
    out = f"--out={small / 'out'}"
    refused(train.main, kill_driver.JOBS["train"].words(shared, small), READ_ONLY)
    refused(generate.main, [*kill_driver.JOBS["generate"].words(shared, folder)[:-1], out], READ_ONLY)
    refused(from_hf.main, [*kill_driver.JOBS["from_hf"].words(shared, folder)[:-1], out], READ_ONLY)
    assert used == {file: file.read_bytes() for file in small.rglob("*") if file.is_file()}

    # Full from the start: no half of a file or folder under its own name.
    remount(small, "rw", f"size={size}")
    assert command(train.main, kill_driver.JOBS["train"].words(shared, small))[0] == 0
    assert kill_driver.JOBS["train"].result(small) == expected
    with contextlib.suppress(OSError), (small / "filling").open("wb", buffering=0) as filling:
        while True:
            filling.write(bytes(4096))
    refused(generate.main, [*kill_driver.JOBS["generate"].words(shared, folder)[:-1], out], FULL)
    refused(from_hf.main, [*kill_driver.JOBS["from_hf"].words(shared, folder)[:-1], out], FULL)
    refused(to_hf.main, ["to_hf", f"--source={whole / 'run'}", out], FULL)
    refused(train.main, ["train", *runs.flags({}, f"--workdir={small / 'new'}", config=_missing(shared))], FULL)
    assert {path.name for path in small.iterdir()} <= {"run", "filling", "new"}, list(small.iterdir())


def _missing(shared: Path) -> Path:
    """The recipe as a config file, so that the words are few."""
    file = shared / "recipe.py"
    overrides = {"model.path": "model", "data.train": "train.jsonl"}
    lines = [f"    config.{key} = {str(shared / name)!r}" for key, name in overrides.items()]
    text = Path(runs.CONFIG).read_text().replace("def get_config(", "def _tiny(")
    file.write_text("\n".join([text, "", "def get_config():", "    config = _tiny()", *lines, "    return config", ""]))
    return file


if __name__ == "__main__":
    main(Path(sys.argv[1]))
