"""Where a step keeps its residuals: what "auto" takes, and that all are on the host where they shall be."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from elbo_kto_jax import objectives
from elbo_kto_jax.models import registry
from elbo_kto_jax.models.memory import step_bytes
from elbo_kto_jax.runtime import recipes
from elbo_kto_jax.runtime.config import Config, Estimator
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.training import residuals
from elbo_kto_jax.training.data import TrainingData
from tests import tiny
from tests.training.steps import KEEP_GRADIENT, setup

LLADA_8B = registry.architectures()["llada"].sizes["8b"]
CONFIG = Config.from_mapping(recipes.load("kto_mix").to_dict())
KTO, SFT = (objectives.build(objective).needs for objective in (tiny.KTO, tiny.SFT))


MESH = {"fsdp": 16, "tensor": 1}


def keeping(where: str, remat: str = "full") -> Config:
    train = dataclasses.replace(CONFIG.train, residuals=where)
    return dataclasses.replace(CONFIG, train=train, model=dataclasses.replace(CONFIG.model, remat=remat))


ONE_PASS = step_bytes(CONFIG, LLADA_8B, MESH, 8) / residuals._ROOM  # of 8 micro-batches
HOST = 4 * 8 * 4096 * 4096 * 32 * 2 / residuals._ROOM  # 4 devices, 8 micro-batches of 4,096 tokens, 32 layers, bfloat16


@pytest.mark.parametrize(
    ("device", "host", "remat", "expected"),
    [
        (1.01 * ONE_PASS, 0, "full", "device"),
        (0.99 * ONE_PASS, 1.01 * HOST, "full", "host"),
        (0.99 * ONE_PASS, 0.99 * HOST, "full", "recompute"),
        (0.99 * ONE_PASS, 2.02 * HOST, "attention", "host"),
        (0.99 * ONE_PASS, 1e15, "dots", "recompute"),
        (1e9, 0, "full", "recompute"),
    ],
)
def test_auto_takes_the_fastest_that_fits(caplog, device, host, remat, expected):
    config, memory = keeping("auto", remat), residuals.Memory(device, host, 4)
    with caplog.at_level(logging.INFO):
        assert residuals.where_to_keep(config, LLADA_8B, MESH, memory, KTO, 8) == expected
    assert f"train.residuals=auto: {expected}" in caplog.text
    refused = [way for way in ("device", "host") if f"train.residuals={way}: needs about" in caplog.text]
    ways = residuals.fastest_first(KTO, remat)
    assert refused == ways[: ways.index(expected)]


def test_an_objective_without_scores_takes_one_pass_anyway():
    memory = residuals.Memory(1e15, 1e15, 4)
    assert residuals.where_to_keep(keeping("auto"), LLADA_8B, MESH, memory, SFT, 8) == "recompute"


@pytest.mark.parametrize("asked", ["recompute", "device", "host"])
def test_what_the_config_says_is_done(asked):
    assert residuals.where_to_keep(keeping(asked), LLADA_8B, MESH, residuals.Memory(1, 1, 1), KTO, 8) == asked


def test_devices_that_cannot_use_the_hosts_memory():
    with pytest.raises(UserError, match=r"config.train.residuals: these devices cannot use the host's memory"):
        residuals.where_to_keep(keeping("host"), LLADA_8B, MESH, residuals.Memory(1e12, 0, 4), KTO, 8)


def test_the_memory_of_these_devices():
    """A CPU reports none: its devices share the RAM."""
    memory = residuals.memory_of(jax.local_devices())
    assert memory.devices * memory.device == memory.host > 2**30


@pytest.mark.parametrize("remat", ["full", "attention", "most", "dots", "none"])
def test_residuals_on_the_host_are_all_there(remat):
    """And the estimates are those of FORWARD with its residuals on the device."""
    data = TrainingData(tiny.examples(4), tiny.layout(8), estimator=Estimator(2, "uniform"), batch_size=4, seed=0)
    model = tiny.model("float32", remat)
    programs, state = setup(
        model, tiny.params(0), KEEP_GRADIENT, num_examples=4, draws=2, objective=tiny.KTO, residuals="host"
    )
    scorer: Scorer = programs.scorer
    rows = scorer.place(data.batch(0).micro_batches)[0]
    estimates, kept = scorer.forward(state.params, scorer.no_estimates(), rows)
    leaves = jax.tree.leaves(kept)
    assert {leaf.sharding.memory_kind for leaf in leaves} == {"pinned_host"}
    stacked = [leaf for leaf in jax.tree.leaves(kept.layers) if leaf.shape[0] == tiny.MODEL.n_layers]
    assert len(stacked) == {"full": 1, "attention": 3}.get(remat, len(stacked)) > 0
    on_device, others = scorer.keeping("device").forward(state.params, scorer.no_estimates(), rows)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(others)} == {"device"}
    np.testing.assert_allclose(estimates, on_device, rtol=1e-5)
