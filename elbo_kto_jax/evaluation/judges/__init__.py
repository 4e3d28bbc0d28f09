"""Judges: which of two answers to a prompt is better. One file each, found by being in this folder.

A file NAME.py is the judge config.judge.name = "NAME". It has two functions:

    make(options, prompts, cache, stop_requested) -> Judge    refuses prompts that it cannot judge, before anything is
                                                              generated; keeps replies in the folder `cache`; ends where
                                                              stop_requested() is True
    describe(options) -> dict                                 all that its verdicts depend on, for results that are kept

A judge is called with the answers of A and B. For each prompt it returns one verdict per comparison that it made: one
where the order in which it sees the answers cannot matter, two where it can and both orders were judged. A verdict
always names the model, never the place in which the judge saw it. "unparsable": the reply states none; it counts for
nobody. A judge that gives reasons returns an Opinion in place of a bare verdict.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from elbo_kto_jax.evaluation.prompts import Prompts
from elbo_kto_jax.evaluation.winrate import Opinion, Verdict
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.messages import shown

Judge = Callable[[Sequence[str], Sequence[str]], list[tuple[Verdict | Opinion, ...]]]


def make(
    options: config.Judge, prompts: Prompts, cache: Path, stop_requested: Callable[[], bool] | None = None
) -> Judge:
    """The judge that config.judge names, for these prompts.

    Raises:
      UserError: there is none of that name, an option or variable is missing or wrong, or a record lacks what the judge
        needs.
    """
    return _kind(options).make(options, prompts, cache, stop_requested)


def describe(options: config.Judge) -> dict[str, Any]:
    """All that the verdicts of the judge depend on.

    Raises:
      UserError: as `make`.
    """
    return _kind(options).describe(options)


def _kind(options: config.Judge) -> ModuleType:
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if options.name not in known:
        names = ", ".join(map(repr, known))
        raise UserError(f"config.judge.name: expected one of {names}, got {shown(options.name)}")
    return importlib.import_module(f"{__name__}.{options.name}")
