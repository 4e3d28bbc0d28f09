"""What every test shares: eight CPU devices, run-time checks of every array annotation, and the golden folder.

The environment is set here, at import, because XLA reads it once, when jax is first imported, and because the jaxtyping
hook checks only modules that are imported after it.
"""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

from tests.share import QUICK_COMPILATION

NUM_CPU_DEVICES = 8
# test_quickstart.py leaves the flags of the compiler out, as users do, and so do all tests with ROBUSTNESS=whole that
# run whole commands.
FLAGS = (f"--xla_force_host_platform_device_count={NUM_CPU_DEVICES}", *QUICK_COMPILATION)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, *(f for f in os.environ.get("XLA_FLAGS", "").split() if f not in FLAGS)])

# Many tests build the same program anew: it is compiled once, in a cache that goes with the session and that
# pytest-xdist's workers and the commands that tests start inherit; the hundreds of small ones of a run, too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="elbo_kto_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Every worker has cores of its own: processes of one thread each do more of these small programs' work than one process
# whose threads share them.
if hasattr(os, "sched_setaffinity") and "PYTEST_XDIST_WORKER" in os.environ:
    _worker, _workers = os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"), os.environ["PYTEST_XDIST_WORKER_COUNT"]
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, _cores[int(_worker) :: int(_workers)] or _cores)

from jaxtyping import install_import_hook  # noqa: E402

import tests.typecheck  # noqa: E402, F401  # the hook finds it by name

PROJECT_ROOT = Path(__file__).resolve().parent.parent
# The modules that annotate arrays: a checked function of Python alone takes six times as long.
install_import_hook(
    [
        ".".join(file.relative_to(PROJECT_ROOT).with_suffix("").parts)
        for file in sorted((PROJECT_ROOT / "elbo_kto_jax").rglob("*.py"))
        if "jaxtyping" in file.read_text(encoding="utf-8")
    ],
    "tests.typecheck.check",
)

import jax  # noqa: E402
import pytest  # noqa: E402

# A file runs in one process. The longest begin first, so that none is left over when the others are done.
LONGEST = (
    "launch/test_quickstart.py",
    "training/test_families.py",
    "training/test_lora.py",
    "runtime/test_processes.py",
    "launch/test_plan.py",
    "runtime/test_workdir.py",
    "robustness/test_cases.py",
    "robustness/test_kills.py",
    "buckets/test_kills.py",
    "sampling/test_decode.py",
    "training/test_loop.py",
    "sampling/test_families.py",
    "test_sweep.py",
    "test_evaluate.py",
    "training/test_step_goldens.py",
    "test_benchmark.py",
    "evaluation/test_harness.py",
    "training/test_step.py",
    "training/test_work_split.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests of the longest files to the front, and marks those that are not in slow.txt as fast."""
    tests = Path(__file__).resolve().parent
    place = {tests / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))
    slow = {line.strip() for line in (tests / "slow.txt").read_text().splitlines() if not line.startswith("#")}
    for item in items:
        if f"{item.path.relative_to(tests)}::{item.originalname}" not in slow:
            item.add_marker("fast")


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file():
    """Drops the compiled programs of a file's tests: a process may have 65,530 memory maps, and each takes several."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def shared_programs():
    """Equal runs in a file share their compiled programs, as those of one process do: a file that is about what runs
    read and leave need not trace the same step for each of them anew."""
    from tests.sharing import share_programs

    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch)
        yield


@pytest.fixture(scope="session")
def cpu_devices() -> list[jax.Device]:
    """The eight CPU devices on which sharded code is tested."""
    devices = jax.devices("cpu")
    assert len(devices) >= NUM_CPU_DEVICES, f"expected {NUM_CPU_DEVICES} CPU devices, got {len(devices)}"
    return devices[:NUM_CPU_DEVICES]


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden values: GOLDEN_DIR, by default ../shared/golden from the project's root."""
    folder = Path(os.environ.get("GOLDEN_DIR", PROJECT_ROOT.parent / "shared" / "golden"))
    if not (folder / "goldens.npz").is_file():
        pytest.skip(f"no golden values in {folder}; set GOLDEN_DIR")
    return folder


# The golden folders of the architectures: GOLDEN_DIR alone, or all that lie beside each other.
FAMILIES = ["GOLDEN_DIR"] if "GOLDEN_DIR" in os.environ else ["", "-illada", "-dream", "-a2d-qwen3"]


@pytest.fixture(scope="session", params=FAMILIES, ids=[f"golden{name}" for name in FAMILIES])
def golden(request):
    """The golden values and models of one architecture after the other; imported late, after the hook above."""
    from tests.golden import Golden

    shared = PROJECT_ROOT.parent / "shared"
    folder = Path(os.environ.get("GOLDEN_DIR", shared / f"golden{request.param}"))
    if not (folder / "goldens.npz").is_file():
        pytest.skip(f"no golden values in {folder}; set GOLDEN_DIR")
    return Golden(folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A published folder of the quickstart's tiny random model, tokenizer included."""
    from elbo_kto_jax.checkpoints.tiny import write_untrained

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_untrained(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory) -> Path:
    """The same with other weights."""
    from elbo_kto_jax.checkpoints.tiny import write_untrained

    folder = tmp_path_factory.mktemp("checkpoint") / "other"
    write_untrained(folder, seed=1)
    return folder
