"""Linters that the tests run as programs."""

import os
import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """A program of the extra `test`, beside this Python or on the path."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed (the extra `test` has it where there is a wheel)")
    return found
