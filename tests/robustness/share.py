"""How much of the robustness tests a run of pytest does: a bounded share, or with ROBUSTNESS=whole all of it."""

import os

WHOLE = os.environ.get("ROBUSTNESS") == "whole"


def share(bounded: int, whole: int) -> int:
    """A number of cases."""
    return whole if WHOLE else bounded
