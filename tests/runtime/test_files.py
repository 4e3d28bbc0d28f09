"""Writing files: nothing is replaced that is no file, nobody's link is followed, and every text can be written."""

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from elbo_kto_jax.runtime import files
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write, check_writable, is_leftover, to_json
from elbo_kto_jax.runtime.flags import refuse_existing


@pytest.fixture(params=["pipe", "socket", "device", "link to a device", "open file", "link to an open file"])
def special(request, tmp_path):
    path = tmp_path / "out"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif request.param == "device":
        path = Path("/dev/null")
    elif request.param == "open file":
        path = Path("/proc/self/fd/1")
    else:
        path.symlink_to("/dev/null" if "device" in request.param else "/proc/self/fd/1")
    return path


def test_what_is_no_file_is_not_replaced(special):
    before = os.lstat(special)
    for attempt in (
        lambda: atomic_write(special, "x"),
        lambda: check_writable(special, "--out"),
        lambda: refuse_existing(special, overwrite=True),
    ):
        with pytest.raises(UserError, match="no file can replace"):
            attempt()
    after = os.lstat(special)
    assert (stat.S_IFMT(after.st_mode), after.st_ino) == (stat.S_IFMT(before.st_mode), before.st_ino)


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / ".elbo_kto_jax-guessed.tmp").symlink_to(victim)
    with pytest.raises(UserError, match="File exists"):
        atomic_write(tmp_path / "out.txt", "x")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "out.txt").exists()


def test_a_link_with_the_file_s_own_name_is_replaced(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out.txt").symlink_to(victim)
    atomic_write(tmp_path / "out.txt", "x")
    assert victim.read_text() == "precious"
    assert (tmp_path / "out.txt").read_text() == "x"


def test_temporary_files(tmp_path, monkeypatch):
    """Each has another name, `is_leftover` knows them, and one whose writing failed is removed."""
    seen = []

    def keep(source, _):
        seen.append(Path(source))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", keep)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            atomic_write(tmp_path / ("n" * 255), "x")
    assert seen[0] != seen[1]
    assert all(path.parent == tmp_path and is_leftover(path) and not path.exists() for path in seen)


def test_permissions_are_those_of_a_new_file(tmp_path):
    atomic_write(tmp_path / "out.txt", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "out.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_halves_of_surrogate_pairs_can_be_written(tmp_path):
    value = {"answer": "\ud800 é"}
    atomic_write(tmp_path / "a.json", to_json(value))
    assert json.loads((tmp_path / "a.json").read_bytes()) == value
    atomic_write(tmp_path / "a.csv", "\udfff,é")
    assert (tmp_path / "a.csv").read_bytes() == "\\udfff,é".encode()


def test_outputs_are_refused_before_the_work(tmp_path):
    (tmp_path / "there.txt").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, named in (
        (tmp_path, "a folder"),
        ("", "a folder"),
        (tmp_path / "there.txt" / "out.txt", "is a file, not a folder"),
        (tmp_path / "x.orbax-checkpoint-tmp-1", "unfinished"),
        (tmp_path / ("n" * 256), "name too long"),
    ):
        with pytest.raises(UserError, match=named):
            refuse_existing(path, overwrite=True)
    for name in ("there.txt", "dangling"):
        with pytest.raises(UserError, match="exists already"):
            refuse_existing(tmp_path / name, overwrite=False)
