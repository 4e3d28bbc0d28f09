"""Objectives: one file each, found by being in this folder (docs/extending.md)."""

import importlib
import pkgutil

from elbo_kto_jax.objectives.protocol import Objective, known
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def build(options: config.Objective) -> Objective:
    """The objective that config.objective names.

    Raises:
      UserError: there is none of that name, or it does not take these options.
    """
    objectives = known()
    if options.name not in objectives:
        raise UserError(
            f"config.objective.name: expected one of {', '.join(map(repr, objectives))}, got {options.name[:100]!r}"
        )
    return objectives[options.name](options)
