"""lock.py: one command at a time, whoever ends how, and every command that keeps its work in a folder takes part."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elbo_kto_jax import evaluate, from_hf, precompute, sweep, to_hf, train
from elbo_kto_jax.runtime import lock
from elbo_kto_jax.runtime.errors import UserError
from tests import runs
from tests.conftest import PROJECT_ROOT

HOLDER = """
import os, sys, time
from elbo_kto_jax.runtime import lock
with lock.inside(sys.argv[1], "--workdir"):
    {more}
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holder(folder: Path, more: str = "pass"):
    """Another process that holds the lock on `folder`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(more=more), str(folder)],
        cwd=PROJECT_ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused, lock.inside(folder, "--workdir"):
        pass
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_who_holds_it_is_said_and_a_kill_frees_it(tmp_path):
    folder = tmp_path / "runs" / "a"
    began = time.strftime("%Y-%m-%dT%H")
    with holder(folder) as process:
        for _ in range(2):
            message = refusal(folder)
            assert f"--workdir={folder}" in message
            assert f"process {process.pid} on {socket.gethostname()} since {began[:10]}" in message
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (folder / lock.LOCK_FILE).is_file()
        with lock.inside(folder, "--workdir"):
            assert f"process {os.getpid()} on" in refusal(folder)
    assert list(folder.iterdir()) == []


def test_a_child_that_outlives_its_parent_does_not_keep_it(tmp_path):
    child = tmp_path / "child"
    more = f"pid = os.fork(); pid or time.sleep(600); open({str(child)!r}, 'w').write(str(pid))"
    with holder(tmp_path / "a", more) as process:
        refusal(tmp_path / "a")
        process.send_signal(signal.SIGKILL)
        process.wait()
        pid = int(child.read_text())
        try:
            os.kill(pid, 0)
            with lock.inside(tmp_path / "a", "--workdir"):
                pass
        finally:
            os.kill(pid, signal.SIGKILL)


def test_nothing_is_left_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.inside(tmp_path / "new" / "er", "--workdir"):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    with lock.beside(tmp_path / "new" / "out", "--out"):
        (tmp_path / "new" / "out").write_text("made")
        assert (tmp_path / "new" / ".out.lock").is_file()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "out"]


COUNT = """
import sys, time
from pathlib import Path
from elbo_kto_jax.runtime import lock
from elbo_kto_jax.runtime.errors import UserError
folder, done = Path(sys.argv[1]), 0
while done < 30:
    try:
        with lock.inside(folder / "held", "--workdir"):
            number = int((folder / "count").read_text())
            time.sleep(0.001)
            (folder / "count").write_text(str(number + 1))
            done += 1
    except UserError as error:
        assert "in use by" in str(error), error
"""


def test_only_one_holds_it_also_while_it_is_given_back(tmp_path):
    """The file is removed by each holder; none of the others takes the removed one for the lock."""
    (tmp_path / "count").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)], cwd=PROJECT_ROOT) for _ in range(3)]
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "90"


def test_who_waits_goes_on_when_the_other_is_done(tmp_path, caplog):
    caplog.set_level("INFO")
    file, order = tmp_path / "a.lock", []
    with lock.waiting(file, "another one works") as has_locks:
        assert has_locks

        def wait():
            with lock.waiting(file, "another one works"):
                order.append("second")

        thread = threading.Thread(target=wait)
        thread.start()
        while "waiting: another one works" not in caplog.text:
            time.sleep(0.001)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock.waiting(tmp_path / "a.lock", "another one works") as has_locks:
        assert not has_locks


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"pid": "x"}', b'{"pid": null, "host": 5}'])
def test_a_lock_without_a_name_is_still_a_lock(tmp_path, content):
    file = tmp_path / lock.LOCK_FILE
    with file.open("wb") as other:
        other.write(content)
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "in use by another process" in refusal(tmp_path)
    with lock.inside(tmp_path, "--workdir"):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_what_a_lock_says_cannot_move_the_cursor(tmp_path):
    with (tmp_path / lock.LOCK_FILE).open("w") as other:
        json.dump({"pid": 10**40, "host": "\x1b[2J" + "h" * 500, "since": ["\n"]}, other)
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        message = refusal(tmp_path)
    assert "\x1b" not in message
    assert len(message) < 600


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_what_is_no_file_is_no_lock(tmp_path, kind):
    file, outside = tmp_path / lock.LOCK_FILE, tmp_path / "outside"
    outside.write_text("precious")
    {"link": lambda: file.symlink_to(outside), "folder": file.mkdir, "fifo": lambda: os.mkfifo(file)}[kind]()
    message = refusal(tmp_path)
    assert str(file) in message
    assert outside.read_text() == "precious"


def test_where_there_are_no_locks_a_living_process_is_recognised(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    record = {"host": socket.gethostname(), "pid": os.getppid(), "since": "today"}
    (tmp_path / lock.LOCK_FILE).write_text(json.dumps(record))
    message = refusal(tmp_path)
    assert f"process {os.getppid()}" in message
    assert f"remove {tmp_path / lock.LOCK_FILE}" in message
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for other in ({"pid": ended.pid}, {"host": "elsewhere"}):
        (tmp_path / lock.LOCK_FILE).write_text(json.dumps({**record, **other}))
        with lock.inside(tmp_path, "--workdir"):
            pass
        assert "has no locks" in caplog.text
        caplog.clear()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("precious")
    assert f"{tmp_path / 'file'}: a file" in refusal(tmp_path / "file")
    assert str(tmp_path / "file") in refusal(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "precious"


# ---- every command ----


@pytest.fixture(scope="module")
def words(tiny_checkpoint, tmp_path_factory) -> dict[str, list[str]]:
    """The commands, all but where they write."""
    folder = tmp_path_factory.mktemp("data")
    data = runs.write_jsonl(folder / "train.jsonl", runs.records(4))
    prompts = runs.write_jsonl(folder / "prompts.jsonl", [{"prompt": "Capitals a", "answer": "A"}])
    model = str(tiny_checkpoint)
    lists = {
        **{"checkpoints": [model], "tasks": ["win_rate"], "sampler": [{}], "draws": [], "limit": 0},
        **{"baseline": model, "prompts": str(prompts), "data": ""},
    }
    recipe = runs.flags({"model.path": model, "data.train": data})
    return {
        "train": recipe,
        "precompute": recipe,
        "sweep": runs.flags({}, config=runs.grid(folder / "grid.py", lists)),
        "evaluate": runs.flags({}, f"--checkpoint={model}", f"--baseline={model}", f"--prompts={prompts}"),
        "from_hf": [f"--source={model}"],
        "to_hf": [f"--source={model}"],
    }


MAINS = {
    **{"train": train.main, "precompute": precompute.main, "sweep": sweep.main},
    **{"evaluate": evaluate.main, "from_hf": from_hf.main, "to_hf": to_hf.main},
}


@pytest.mark.parametrize("name", MAINS)
@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["new", "overwrite"])
def test_a_second_command_is_refused(words, tmp_path, name, more):
    main, place = MAINS[name], tmp_path / "place"
    flag = "--workdir" if name in ("train", "precompute", "sweep") else "--out"
    held = lock.beside if "hf" in name else lock.inside
    with held(place, flag):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as refused:
            main([*words[name], f"{flag}={place}", *more])
        assert sorted(tmp_path.rglob("*")) == before
    message = str(refused.value)
    assert f"{flag}={place}: in use by process {os.getpid()} on {socket.gethostname()}" in message
    assert len(message.split("\n")) <= 2


# ---- folders that are read ----


def test_what_another_reads_is_not_removed(tmp_path):
    """An open file of its own stands for another process: `flock` does not tell them apart."""
    folder, under = tmp_path / "step", tmp_path / "gone"
    folder.mkdir()
    (folder / "weights").write_text("whole")
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    assert not lock.remove(folder, under)
    assert (folder / "weights").read_text() == "whole"
    os.close(other)
    assert lock.read(folder)
    assert lock.remove(folder, under)  # this process has read it, and writes it
    assert not lock.read(folder)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_same_name_is_another(tmp_path):
    folder = tmp_path / "step"
    folder.mkdir()
    assert lock.read(folder)
    folder.rename(tmp_path / "before")
    assert not lock.read(folder)
    folder.mkdir()
    assert lock.read(folder)
    other = os.open(folder, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
