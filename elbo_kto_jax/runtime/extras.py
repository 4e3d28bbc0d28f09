"""Modules that need packages of an extra, imported where they are asked for."""

import importlib
from types import ModuleType

from elbo_kto_jax.runtime.errors import UserError


def import_extra(module: str, flag: str, what: str, extra: str) -> ModuleType:
    """A module whose imports take seconds and need packages that an extra installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{flag}: needs {what} ({error}); pip install 'elbo_kto_jax[{extra}]', or from a clone "
            f"pip install '.[{extra}]'"
        ) from error
