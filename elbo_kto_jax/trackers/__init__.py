"""Trackers: where a run can be watched, one file each, found by being in this folder (protocol.py)."""

import importlib
import pkgutil
from collections.abc import Sequence

from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.messages import shown
from elbo_kto_jax.trackers.protocol import KEY, Run, Tracker


def check_names(names: Sequence[str]) -> None:
    """Raises UserError where config.trackers names one that there is not."""
    known = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "protocol")
    for name in names:
        if name not in known:
            raise UserError(f"{KEY}: expected names out of {', '.join(map(repr, known))}, got {shown(name)}")


def check(name: str) -> None:
    """Raises UserError where a tracker cannot work: a package or a login is missing."""
    importlib.import_module(f"{__name__}.{name}").check()


def begin(name: str, run: Run) -> Tracker:
    """The tracker of that name, which has begun to track `run` or goes on with it."""
    return importlib.import_module(f"{__name__}.{name}").begin(run)
