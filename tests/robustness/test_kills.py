"""A bounded share of tests/robustness/kill_driver.py and soak.py; tests/README.md says how to run the whole."""

import signal

import pytest

from elbo_kto_jax.checkpoints.load import load_model
from tests.robustness import soak
from tests.robustness.kill_driver import JOBS, Driver
from tests.share import cases, share


@pytest.mark.parametrize(
    ("name", "kills", "signals"),
    cases([("train", share(1, 25), ()), ("from_hf", share(1, 7), (signal.SIGTERM,))], [("overwrite", 10, ())]),
)
def test_killed_commands_end_as_others_do(tmp_path, name, kills, signals):
    count = Driver(tmp_path, seed=0).attack(name, kills, signals)
    assert not count.failures
    assert count.kills == kills
    assert count.signals == len(signals)


def test_the_driver_sees_a_difference(tmp_path, monkeypatch):
    """A result that depends on the run is a failure."""
    driver, numbers = Driver(tmp_path, seed=0), iter(range(9))
    monkeypatch.setattr(driver, "run", lambda words, trial: ((trial / "log").write_text("") and 0) or 0)
    monkeypatch.setitem(JOBS, "generate", type(JOBS["generate"])(lambda *_: [], lambda trial: next(numbers)))
    count = driver.attack("generate", 0, ())
    driver.end(JOBS["generate"], driver.fresh("x"), 0, count)
    assert ["another result" in failure for failure in count.failures] == [True]


def test_soak(tmp_path, request):
    """Memory at this length is noise; that nothing is compiled late and no file stays open is exact."""
    steps = share(12, 2000)
    found = soak.soak(tmp_path, steps, warm=steps // 3 if steps < 600 else soak.WARM)
    assert found["steps"] == steps
    assert (found["late_compilations"], found["late_files"]) == (0, 0)
    assert steps < 600 or found["growth"] < 0.03
    assert load_model(tmp_path / "run").source.endswith(f"/{steps}")
