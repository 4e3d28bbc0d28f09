"""How much of the longest tests a run of pytest does: a bounded share, or with ROBUSTNESS=whole all of it."""

import os

WHOLE = os.environ.get("ROBUSTNESS") == "whole"


def share(bounded: int, whole: int) -> int:
    """A number of cases."""
    return whole if WHOLE else bounded


def cases(bounded: list, more: list) -> list:
    """The cases of a test: those of every run, and those of the whole."""
    return [*bounded, *(more if WHOLE else [])]
