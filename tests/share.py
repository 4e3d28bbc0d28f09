"""How much of the longest tests a run of pytest does: a bounded share, or with ROBUSTNESS=whole all of it."""

import os

# Compiling takes most of the time of tests whose programs then run for milliseconds: without LLVM's passes and XLA's
# fusion emitters a gradient of a tiny model compiles in a sixth of the time.
QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
WHOLE = os.environ.get("ROBUSTNESS") == "whole"


def share(bounded: int, whole: int) -> int:
    """A number of cases."""
    return whole if WHOLE else bounded


def cases(bounded: list, more: list) -> list:
    """The cases of a test: those of every run, and those of the whole."""
    return [*bounded, *(more if WHOLE else [])]
