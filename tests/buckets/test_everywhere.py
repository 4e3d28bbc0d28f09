"""No module makes a path of this machine from what a user named: `paths.at` and `paths.here` know addresses, too."""

import ast

import pytest

from elbo_kto_jax import quickstart
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError
from tests.test_import_tiers import FILES

# file -> calls of Path( whose argument is a file of this project, a temporary folder, a download or a mere name
KNOWN = {
    "api": 1,
    "benchmarking.measure": 1,
    "benchmarking.run": 1,
    "benchmarking.worker": 1,
    "checkpoints.adapters": 1,
    "checkpoints.content": 1,
    "checkpoints.hub": 1,
    "checkpoints.huggingface": 1,
    "checkpoints.manifest": 2,
    "checkpoints.tiny": 1,
    "checkpoints.tokenizer": 1,
    "data.foreign": 1,
    "data.prepared": 1,
    "data.workers": 1,
    "data.rows": 1,
    "data.sources": 2,
    "evaluation.benchmarks": 2,
    "evaluation.harness": 2,
    "evaluation.judges.chat": 2,
    "evaluation.sweep": 2,
    "plan": 1,
    "publishing.card": 1,
    "publishing.facts": 3,
    "runtime.files": 1,
    "runtime.flags": 3,
    "runtime.lease": 1,
    "runtime.paths": 3,
    "runtime.provenance": 1,
    "runtime.recipes": 4,
    "runtime.spool": 1,
    "sampling.settings": 1,
    "trackers.wandb": 1,
}


def calls(tree, *names):
    return sum(isinstance(node, ast.Call) and ast.unparse(node.func) in names for node in ast.walk(tree))


def test_who_makes_paths():
    found = {}
    for name, file in FILES.items():
        if name.startswith(("elbo_kto_jax.", "launch")) and (count := calls(ast.parse(file.read_text()), "Path")):
            found[name.removeprefix("elbo_kto_jax.")] = count
    here = {name: count for name, count in found.items() if not name.startswith("launch")}
    more = {name: count for name, count in here.items() if count > KNOWN.get(name, 0)}
    assert more == {}, "a path that a user named is opened with paths.at; otherwise correct the table"
    of_scripts = {name for name in found if name.startswith("launch")}
    assert of_scripts <= {"launch.settings_page", "launch.comparison", "launch.data_at_size"}


def test_who_asks_the_operating_system():
    """os.path and shutil see no addresses."""
    asked = ("os.path.exists", "os.path.isfile", "os.path.isdir", "os.path.lexists", "shutil.rmtree", "open", "os.stat")
    found = {name for name, file in FILES.items() if calls(ast.parse(file.read_text()), *asked)}
    ours = {name.removeprefix("elbo_kto_jax.") for name in found if name.startswith("elbo_kto_jax.")}
    known = {
        "checkpoints.folders",
        "data.prepared",  # folders of this machine (setup.cache_of)
        "runtime.paths",
        "runtime.files",
        "runtime.flags",
        "runtime.lock",
        "runtime.terminal",
        "evaluation.harness",
    }
    assert ours <= known


def test_what_is_for_this_machine_alone_says_so(tmp_path):
    assert paths.here("x", "--out").name == "x"
    with pytest.raises(UserError, match=r"^--workdir=gs://b/x: this needs a path of this machine"):
        quickstart.main(["--workdir=gs://b/x"])
