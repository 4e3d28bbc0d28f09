"""With what a start of a run was made: code, versions, devices and the command line. No result is refused for it."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import elbo_kto_jax

_CHECKOUT = Path(elbo_kto_jax.__file__).resolve().parent.parent
_LIBRARIES = ("jax", "jaxlib", "libtpu", "numpy", "flax", "optax", "orbax-checkpoint", "tokenizers", "transformers")
_GIT_SECONDS = 10


def of_this_start() -> dict[str, Any]:
    """What stands in `provenance` of config.json for this start."""
    devices = jax.devices()
    return {
        "time": datetime.datetime.now().astimezone().replace(microsecond=0).isoformat(),
        "command": shlex.join(sys.orig_argv),
        "directory": os.getcwd(),
        "host": platform.node(),
        "commit": commit(_CHECKOUT),
        "versions": {
            "elbo_kto_jax": elbo_kto_jax.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _LIBRARIES},
        },
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "number": len(devices),
            "processes": jax.process_count(),
        },
    }


def in_words(start: dict[str, Any]) -> str:
    """A start in one line, for the log."""
    versions, devices = start["versions"], start["devices"]
    code = f"elbo_kto_jax {versions['elbo_kto_jax']}" + (f" ({start['commit']})" if start["commit"] else "")
    return f"{start['command']}; {code}, jax {versions['jax']}, {devices['number']} x {devices['kind']}"


def commit(checkout: Path) -> str | None:
    """The commit of a checkout, "+changes" behind it where files were changed since; None where there is none."""
    if not (checkout / ".git").exists():  # a folder above, of another project, says nothing about this one
        return None
    found = _git(checkout, "rev-parse", "HEAD")
    changed = found and _git(checkout, "status", "--porcelain", "--untracked-files=no")
    return f"{found}+changes" if changed else found or None


def _git(checkout: Path, *words: str) -> str:
    """What git says; "" where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", checkout, *words], capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(library: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
