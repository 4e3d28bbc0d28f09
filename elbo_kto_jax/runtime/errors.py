"""The two ways in which a command ends early on purpose; whatever else is raised is a bug or the machine's fault.

And how values from files stand in their messages.
"""

import reprlib
from typing import Any

from elbo_kto_jax.runtime import terminal


class UserError(Exception):
    """The user's input is wrong: exit status 2 and this message, one or two lines that say what, where, what to do.

    Values in it may come from anywhere: control characters are spelt out, and long lines lose their middle.
    """

    def __init__(self, message: object = ""):
        super().__init__(terminal.message(message))


class Interrupted(Exception):
    """A signal asked the command to stop and its work is saved: exit status 75; the same command goes on."""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def shown(value: Any) -> str:
    """A value in Python's notation: on one line, cut where it is long, flat where it is deep."""
    return _REPR.repr(value)
