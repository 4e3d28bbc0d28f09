"""training/reference.py: a cache is used where it fits, completed where partial, refused where damaged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax import cli
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import reference as reference_module
from elbo_kto_jax.training.data import TrainingData
from elbo_kto_jax.training.reference import ReferenceCache
from elbo_kto_jax.training.setup import prepare
from tests import runs, tiny

ESTIMATOR, BATCH, STEPS = config.Estimator(2, "uniform"), 3, 5
FINGERPRINT = {"model": "abc", "seed": 0}


@pytest.fixture(scope="module")
def data():
    return TrainingData(tiny.examples(8), tiny.layout(4), estimator=ESTIMATOR, batch_size=BATCH, seed=0)


@pytest.fixture(scope="module")
def scorer():
    mesh = rules.make_mesh(config.Mesh(1, 1, 1), jax.devices()[:1])
    return Scorer(tiny.model(), mesh, size=BATCH * ESTIMATOR.draws)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.array, tiny.params(1))


@pytest.fixture
def scored_steps(monkeypatch):
    """Counts the steps that are scored."""
    scored, real = [], Scorer.__call__
    monkeypatch.setattr(Scorer, "__call__", lambda *a: (scored.append(1), real(*a))[1])
    return scored


@pytest.fixture
def complete(tmp_path, data, scorer, params, scored_steps):
    cache = ReferenceCache(tmp_path, FINGERPRINT, data, STEPS)
    assert cache.complete(scorer, params) == STEPS == len(scored_steps)
    scored_steps.clear()
    return cache


def part_of(cache) -> str:
    (part,) = cache.path.glob("steps-*.npy")
    return part


def test_values_are_the_plain_estimates_of_every_draw(complete, data, params):
    assert complete.elbo_ref.shape == (STEPS, BATCH * ESTIMATOR.draws)
    for step in range(STEPS):
        indices = data.indices(step)
        expected = tiny.plain_estimates(
            params, data.examples, indices, ESTIMATOR, seed=0, epoch=step // data.steps_per_epoch
        )
        found = complete.elbo_ref[step, : len(indices) * ESTIMATOR.draws].reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_complete_cache_is_read_and_nothing_scored(complete, tmp_path, data, scorer, params, scored_steps):
    again = ReferenceCache(tmp_path, FINGERPRINT, data, STEPS)
    assert again.complete(scorer, params) == 0
    assert not scored_steps
    np.testing.assert_array_equal(again.elbo_ref, complete.elbo_ref)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_pass_goes_on(tmp_path, data, scorer, params, scored_steps, stop_after):
    cache = ReferenceCache(tmp_path, FINGERPRINT, data, STEPS)
    with pytest.raises(Interrupted):
        cache.complete(scorer, params, lambda: len(scored_steps) >= stop_after)
    again = ReferenceCache(tmp_path, FINGERPRINT, data, STEPS)
    assert again.known.sum() == stop_after
    assert again.complete(scorer, params) == STEPS - stop_after
    assert len(scored_steps) == STEPS
    whole = ReferenceCache(tmp_path / "other", FINGERPRINT, data, STEPS)
    whole.complete(scorer, params)
    np.testing.assert_array_equal(again.elbo_ref, whole.elbo_ref)


def test_a_lost_part_is_scored_again(tmp_path, data, scorer, params, scored_steps, monkeypatch):
    monkeypatch.setattr(reference_module, "_SAVE_EVERY", -1.0)  # a part for each step
    cache = ReferenceCache(tmp_path, FINGERPRINT, data, STEPS)
    cache.complete(scorer, params)
    parts = sorted(cache.path.glob("steps-*.npy"))
    assert len(parts) == STEPS
    parts[2].unlink()
    again = ReferenceCache(tmp_path, FINGERPRINT, data, STEPS)
    assert np.flatnonzero(~again.known).tolist() == [2]
    assert again.complete(scorer, params) == 1
    np.testing.assert_array_equal(again.elbo_ref, cache.elbo_ref)


@pytest.mark.parametrize("steps", [STEPS - 2, STEPS + 1])
def test_a_cache_serves_another_number_of_steps(complete, tmp_path, data, scorer, params, scored_steps, steps):
    again = ReferenceCache(tmp_path, FINGERPRINT, data, steps)
    assert again.complete(scorer, params) == max(0, steps - STEPS)
    common = min(steps, STEPS)
    np.testing.assert_array_equal(again.elbo_ref[:common], complete.elbo_ref[:common])


def test_a_stale_cache_is_named_and_not_used(complete, tmp_path, data, caplog):
    with caplog.at_level("INFO", logger="elbo_kto_jax"):
        other = ReferenceCache(tmp_path, {**FINGERPRINT, "model": "another"}, data, STEPS)
    assert not other.known.any()
    assert other.path != complete.path
    assert "'abc' -> 'another'" in caplog.text
    assert json.loads((complete.path / "fingerprint.json").read_text()) == FINGERPRINT


@pytest.mark.parametrize("damage", ["truncated", "empty", "another shape", "no array"])
def test_a_damaged_part_is_refused_by_name(complete, tmp_path, data, damage):
    part = part_of(complete)
    content = part.read_bytes()
    if damage == "another shape":
        np.save(part, complete.elbo_ref[:-1])
    else:
        part.write_bytes({"truncated": content[:-7], "empty": b"", "no array": b"B_ref"}[damage])
    with pytest.raises(UserError) as refused:
        ReferenceCache(tmp_path, FINGERPRINT, data, STEPS)
    assert part.name in str(refused.value)


def test_an_estimate_that_is_not_finite_is_refused_and_not_stored(tmp_path, data, scorer, params):
    broken = {**params, "ln_f": {"scale": params["ln_f"]["scale"] * jnp.nan}}
    cache = ReferenceCache(tmp_path, FINGERPRINT, data, STEPS)
    with pytest.raises(UserError, match="example"):
        cache.complete(scorer, broken)
    assert not list(cache.path.glob("*.npy"))


def test_a_cache_says_how_many_rows_there_were_at_once_where_their_length_depends_on_it(tiny_checkpoint, tmp_path):
    """On other devices a batch may be packed into other rows, and rewards would not start at exactly 0."""
    records = runs.write_jsonl(tmp_path / "train.jsonl", runs.records(6))
    flags = cli.Flags("test", "test")
    flags.add_config()
    settings = {"model.path": tiny_checkpoint, "data.train": records, "data.max_length": 1024}
    setup = prepare(flags.parse(runs.flags(settings))[1], skip_bad=False)
    layout, found = setup.data.layout, []
    assert layout.shorter == ((256, 512, 768), (256, 384, 512, 640, 768, 896))
    for rows, shorter in ((1, layout.shorter), (2, layout.shorter), (1, ()), (2, ())):
        setup.data.layout = layout._replace(rows=rows, shorter=shorter)
        found.append(setup.fingerprint("digest", setup.data))
    assert found[0].items() ^ found[1].items() == {("rows", 1), ("rows", 2)}
    assert found[2] == found[3]
