"""The measures of the house: sizes, names and imports that keep the code readable, and one installed package."""

import ast
import importlib.metadata
import itertools
import re
import subprocess
import sys
import tomllib

import pytest

from tests.test_import_tiers import FILES, PACKAGE, ROOT, imported, to_module

SOURCES = {
    name: path for name, path in FILES.items() if name.partition(".")[0] in (PACKAGE, "conversion", "launch", "configs")
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def nodes(*kinds) -> list[tuple[str, ast.AST]]:
    return [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.mark.parametrize(
    ("kinds", "most"),
    [((ast.FunctionDef, ast.AsyncFunctionDef), 60), ((ast.ClassDef,), 150)],
    ids=["functions", "classes"],
)
def test_functions_and_classes_can_be_read_at_a_glance(kinds, most):
    assert [f"{name}.{node.name}: {length(node)}" for name, node in nodes(*kinds) if length(node) > most] == []


def test_files_can_be_read_in_one_sitting():
    lines = {name: path.read_text().count("\n") for name, path in SOURCES.items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert (ROOT / "README.md").read_text().count("\n") <= 100


def test_no_lambda_has_a_name():
    named = [
        f"{name}:{node.lineno}" for name, node in nodes(ast.Assign, ast.AnnAssign) if isinstance(node.value, ast.Lambda)
    ]
    assert named == []


def test_an_objective_is_named_in_its_own_file_and_in_recipes():
    named = [name for name, path in SOURCES.items() if re.search(r"[\"']elbo_(kto|dpo)[\"']", path.read_text())]
    assert [name for name in named if not name.startswith((f"{PACKAGE}.objectives", "configs"))] == []


def test_flags_stay_in_the_commands():
    holders = {name for name, path in SOURCES.items() if re.search(r"\bargparse\b|\bNamespace\b", path.read_text())}
    library = {name for name in holders if name.startswith(f"{PACKAGE}.") and name.count(".") > 1}
    # Where sizes are read for argparse, and a template's own `namespace`.
    assert library - {f"{PACKAGE}.runtime.flags"} <= {f"{PACKAGE}.checkpoints.conversion", f"{PACKAGE}.runtime.sandbox"}


def test_training_is_imported_by_commands_and_by_what_stands_on_it():
    above = (f"{PACKAGE}.training", f"{PACKAGE}.diagnosis", f"{PACKAGE}.planning", f"{PACKAGE}.benchmarking")
    users = {
        name
        for name, path in SOURCES.items()
        if name.count(".") > 1 and any(module.startswith(f"{PACKAGE}.training") for module in imported(path))
    }
    assert [name for name in users if name.startswith(PACKAGE) and not name.startswith(above)] == []


def test_the_package_imports_nothing_that_a_wheel_does_not_hold():
    outside = ("launch", "conversion", "configs", "tests")
    for name, path in SOURCES.items():
        if name.startswith(PACKAGE):
            assert not [module for module in imported(path) if module.partition(".")[0] in outside], name
            assert not [module for module in imported(path) if module.endswith(".__main__")], name


def test_no_folder_imports_in_a_circle():
    def folder(module: str) -> str:
        parts = module.split(".")
        return parts[1] if len(parts) > 2 else ""

    arrows: dict[str, set[str]] = {}
    for name, path in SOURCES.items():
        if not name.startswith(f"{PACKAGE}.") or not folder(name):
            continue
        of_package = {to_module(module) for module in imported(path) if module.startswith(f"{PACKAGE}.")}
        arrows.setdefault(folder(name), set()).update({folder(module) for module in of_package} - {folder(name), ""})

    def below(start: str) -> set[str]:
        found, left = set(), [start]
        while left:
            new = arrows.get(left.pop(), set()) - found
            found |= new
            left += new
        return found

    assert [name for name in arrows if name in below(name)] == []


def names_of(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_every_package_that_is_imported_is_declared():
    declared = names_of([*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())])
    owners = importlib.metadata.packages_distributions()
    ours = {PACKAGE, "launch", "conversion", "configs", "tests"}
    tops = {module.partition(".")[0] for path in SOURCES.values() for module in imported(path)}
    missing = {
        top
        for top in tops - ours - sys.stdlib_module_names
        if not {owner.lower().replace("_", "-") for owner in owners.get(top, [top])} & declared
    }
    assert missing <= {"google"}, (
        "add them to dependencies in pyproject.toml"
    )  # google.colab and the like: not a package


def test_what_imports_torch_is_imported_where_it_is_used():
    """tensorboardX imports torch where that is installed: seconds at the start of every command."""
    at_the_top = {
        f"{name}: {module}"
        for name, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in [getattr(node, "module", None) or node.names[0].name]
    }
    assert [line for line in at_the_top if "tensorboardX" in line] == []


def test_the_console_script_lists_every_command():
    from elbo_kto_jax import cli

    files = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__", "cli", "api"}
    assert set(cli.COMMANDS) == files
    done = subprocess.run(
        [sys.executable, "-c", "from elbo_kto_jax.cli import main; main()", "--help"], capture_output=True
    )
    assert done.returncode == 0
    assert all(command.encode() in done.stdout for command in files)


def test_an_unknown_command_is_answered_with_the_nearest():
    done = subprocess.run(
        [sys.executable, "-c", "from elbo_kto_jax.cli import main; main()", "trian"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no command trian; did you mean train?\n"


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)?(?:#[\w-]+)?\)", page.read_text())
    assert [target for target in targets if target and not (page.parent / target).exists()] == []
