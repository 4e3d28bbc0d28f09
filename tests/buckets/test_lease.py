"""One command at a time in a folder of a bucket, whatever becomes of its holder; and files that grow there."""

import json
import logging
import os
import subprocess
import threading
import time

import pytest

from elbo_kto_jax.runtime import lease, lock, paths, spool
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import atomic_write
from tests.buckets.gcs_server import Fault

LOCK = "run/.lock"


@pytest.fixture
def folder(bucket, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.05)
    return f"gs://{bucket}/run"


def stored(server, bucket):
    return json.loads(server.content(bucket, LOCK))


def hold(folder):
    with lock.inside(folder, "--workdir"):
        pass


def test_it_is_renewed_and_given_back(server, bucket, folder):
    with lock.inside(folder, "--workdir"):
        first = stored(server, bucket)
        assert first["pid"] == os.getpid()
        time.sleep(0.3)
        assert stored(server, bucket)["renewed"] > first["renewed"]
        with pytest.raises(UserError, match=rf"^--workdir={folder}: in use by process {os.getpid()} on "):
            hold(folder)
    assert server.names(bucket) == []


@pytest.mark.parametrize("since", ["a process of this machine", "another machine", "nonsense"])
def test_one_whose_holder_was_killed_is_taken_over(server, bucket, folder, since):
    ended = subprocess.Popen(["true"])
    ended.wait()
    system = lease._system() if since == "a process of this machine" else "elsewhere"
    left = {"host": "h", "pid": ended.pid, "since": "2026-01-01", "id": "old", "system": system}
    server.put(bucket, LOCK, json.dumps(left).encode() if since != "nonsense" else b"\x1b[31m")
    began = time.monotonic()
    with lock.inside(folder, "--workdir"):
        assert stored(server, bucket)["pid"] == os.getpid()
    waited = time.monotonic() - began
    assert (waited >= lease.LEASE_SECONDS) == (since != "a process of this machine")


def test_a_holder_that_is_elsewhere_and_lives_is_left_alone(server, bucket, folder):
    left, end = {"host": "pod-3", "pid": 1, "since": "2026-01-01", "id": "other", "system": "elsewhere"}, []
    server.put(bucket, LOCK, json.dumps({**left, "renewed": 1}).encode())

    def renew():
        for number in range(2, 1000):
            if end:
                return
            server.put(bucket, LOCK, json.dumps({**left, "renewed": number}).encode())
            time.sleep(0.05)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 1 on pod-3 since 2026-01-01; wait until it has ended"):
            hold(folder)
    finally:
        end.append(True)
        thread.join()
    assert stored(server, bucket)["id"] == "other"


def test_two_find_the_same_one_gone(server, bucket, folder, monkeypatch):
    """Only one of them goes on."""
    held, refused, left, together = [], [], [], threading.Barrier(4)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 1.0)  # as it is, for a machine that is busy
    monkeypatch.setattr(lease.os, "_exit", left.append)

    def start():
        together.wait()
        try:
            with lock.inside(folder, "--workdir"):
                held.append(stored(server, bucket)["id"])
                time.sleep(3.0)
                assert len(held) == 1
        except UserError as error:
            refused.append(str(error))

    server.put(bucket, LOCK, json.dumps({"pid": 1, "id": "old", "system": "elsewhere"}).encode())
    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    assert len(refused) == 3
    assert left == []


def test_a_holder_in_whose_place_another_is_ends(server, bucket, folder, monkeypatch, capsys):
    left = []
    monkeypatch.setattr(lease.os, "_exit", left.append)
    with lock.inside(folder, "--workdir"):
        server.put(bucket, LOCK, json.dumps({"pid": 1, "id": "other"}).encode())
        time.sleep(0.3)
    assert left[0] == 75
    assert "another command has taken it over" in capsys.readouterr().err
    assert stored(server, bucket)["id"] == "other"


def test_an_answer_to_its_creation_that_is_lost(server, bucket, folder):
    lost = []

    def once(asked):
        is_first = asked.query.get("ifGenerationMatch") == "0" and not lost
        lost.extend([True] * is_first)
        return Fault(cut=True, applied=True) if is_first else None

    with server.failing(once), lock.inside(folder, "--workdir"):
        assert lost


def test_beside_a_file(server, bucket, folder):
    with lock.beside(f"{folder}/out", "--out"):
        assert server.names(bucket) == ["run/.out.lock"]
    assert server.names(bucket) == []


# Files that grow.


def test_growing_files_are_copied_whole(server, bucket, monkeypatch):
    folder = paths.at(f"gs://{bucket}/run")
    atomic_write(folder / "log.txt", "before\n")
    with spool.spooling(folder) as files:
        with files.local("log.txt").open("a") as log:
            log.write("now\n")
        (files.root / "tensorboard").mkdir()
        (files.root / "tensorboard" / "events").write_bytes(b"1")
        files.grown()
        assert server.names(bucket) == ["run/log.txt"]
        monkeypatch.setattr(spool, "SECONDS", 0.0)
        files.grown()
        assert server.content(bucket, "run/log.txt") == b"before\nnow\n"
        assert server.content(bucket, "run/tensorboard/events") == b"1"
        before = len(server.asked)
        files.save()
        assert len(server.asked) == before  # nothing has grown
        (files.root / "tensorboard" / "events").write_bytes(b"12")
    assert server.content(bucket, "run/tensorboard/events") == b"12"


def test_a_copy_between_checkpoints_may_fail(server, bucket, monkeypatch, caplog):
    monkeypatch.setattr(spool, "SECONDS", 0.0)
    with spool.spooling(paths.at(f"gs://{bucket}/run")) as files:
        files.local("metrics.jsonl").write_text("{}\n")
        with server.failing(lambda asked: Fault(status=403)), caplog.at_level(logging.WARNING):
            files.grown()
            files.grown()
            assert caplog.text.count("the run goes on, and this is tried again") == 1
            with pytest.raises(UserError, match="Storage Object Admin"):
                files.save()
        files.grown()
        assert server.content(bucket, "run/metrics.jsonl") == b"{}\n"


def test_on_a_disk_they_grow_in_place(tmp_path):
    with spool.spooling(tmp_path) as files:
        assert files.local("log.txt") == tmp_path / "log.txt"
        files.grown()
        files.save()
    assert list(tmp_path.iterdir()) == []
