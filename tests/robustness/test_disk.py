"""A full and a read-only disk, on a file system of a few hundred kilobytes (tests/robustness/disk.py)."""

import shutil
import subprocess
import sys

import pytest

from tests.robustness.commands import PROJECT_ROOT, environment

OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount(folder) -> bool:
    if not shutil.which("unshare"):
        return False
    words = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_a_full_and_a_read_only_disk(tmp_path):
    if not may_mount(tmp_path):
        pytest.skip("no right to mount a file system of one's own (unshare --user --map-root-user --mount)")
    result = subprocess.run(
        [*OWN_MOUNTS, sys.executable, "-m", "tests.robustness.disk", str(tmp_path)],
        cwd=PROJECT_ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-6000:]
