"""A module imports only its own tier or a lower one, every module has a tier, and torch is imported nowhere."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "elbo_kto_jax"

TIERS = {
    "": 0,  # the package itself: its version
    "runtime": 0,
    "runtime.lease": 1,
    "runtime.lock": 1,
    "runtime.processes": 1,
    "runtime.provenance": 1,
    "runtime.workdir": 1,
    "reports": 0,
    "trackers": 0,
    "objectives": 1,
    "diffusion": 1,
    "models": 2,
    "models.config": 0,
    "models.table": 0,
    "data": 2,
    "data.fitting": 1,
    "data.packing": 1,
    "sharding": 1,
    "checkpoints": 3,
    "sampling": 3,
    "publishing": 3,
    "scoring": 3,
    "training": 4,
    "training.state": 3,
    "evaluation": 4,
    "diagnosis": 4,
    "planning": 4,
    "planning.chips": 0,
    "planning.hlo": 0,
    "benchmarking": 5,
    "cli": 5,
    "api": 5,
    "train": 5,
    "precompute": 5,
    "score": 5,
    "generate": 5,
    "chat": 5,
    "evaluate": 5,
    "sweep": 5,
    "diagnose": 5,
    "benchmark": 5,
    "plan": 5,
    "from_hf": 5,
    "to_hf": 5,
    "verify": 5,
    "quickstart": 5,
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (PACKAGE, "conversion", "launch", "configs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def tier(module: str) -> int | None:
    """The tier of a module of the package: its own entry in the table, or that of the package around it."""
    name = module.removeprefix(PACKAGE).removeprefix(".")
    while name not in TIERS and "." in name:
        name = name.rpartition(".")[0]
    return TIERS.get(name)


def imported(path: Path) -> set[str]:
    """The full names of everything that a file imports, inside functions too; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def to_module(name: str) -> str:
    """The module of the package that holds `name`."""
    while name not in FILES:
        name = name.rpartition(".")[0]
    return name


MODULES = [name for name in FILES if name.partition(".")[0] == PACKAGE]


@pytest.mark.parametrize("module", MODULES)
def test_imports_its_own_tier_or_lower(module):
    own = tier(module)
    assert own is not None, f"{module} is in no tier: add it to TIERS"
    of_package = {to_module(name) for name in imported(FILES[module]) if name.partition(".")[0] == PACKAGE}
    higher = {name: tier(name) for name in of_package if tier(name) is None or tier(name) > own}
    assert not higher, f"{module} of tier {own} imports {higher}"


def test_every_entry_of_the_table_is_a_module():
    assert not [name for name in TIERS if f"{PACKAGE}.{name}".rstrip(".") not in FILES]


@pytest.mark.parametrize("module", FILES)
def test_torch_is_not_imported(module):
    assert "torch" not in {name.partition(".")[0] for name in imported(FILES[module])}
