"""The compiled step follows the table: the state, the gradients, the head and the loss are split as it says.

That the losses and the parameters are the same whatever the mesh is tested in tests/training/test_work_split.py.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax import objectives
from elbo_kto_jax.diffusion import elbo
from elbo_kto_jax.models.network import MaskPredictor, abstract_params
from elbo_kto_jax.runtime import config
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from elbo_kto_jax.training import step
from elbo_kto_jax.training.data import TrainingData
from tests import tiny

VOCABULARY = 88  # the only dimension of this size, whole, halved or split in eight
MODEL = dataclasses.replace(tiny.MODEL, embedding_size=VOCABULARY)
MESHES = [config.Mesh(1, 8, 1), config.Mesh(2, 2, 2)]


class Compiled:
    """The programs for a mesh, with what they take."""

    def __init__(self, sizes: config.Mesh):
        model = MaskPredictor(MODEL, jnp.float32, jnp.float32, "none")
        self.mesh = rules.make_mesh(sizes, jax.devices()[:8])
        tx = train_state.optimizer(config.Optimizer(1e-3, "cosine", 0.0, 0.9, 0.95, 0.01, 1.0, "float32"), 10)
        self.shardings = train_state.state_shardings(tx, abstract_params(model), self.mesh, model.config)
        self.scorer = Scorer(model, self.mesh, size=8)
        objective = objectives.build(tiny.KTO)
        self.programs = step.build_programs(self.scorer, objective, draws=2, tx=tx, shardings=self.shardings)
        self.data = TrainingData(
            tiny.examples(4), tiny.layout(8, False), estimator=config.Estimator(2, "uniform"), batch_size=4, seed=0
        )
        self.abstract = train_state.abstract_state(tx, abstract_params(model), self.shardings)

    @property
    def rows(self):
        return self.scorer.place(self.data.batch(0).micro_batches)[0]

    def text(self) -> str:
        """The program GRAD as each device runs it: forward and backward pass, head and cross-entropy."""
        grads = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), self.params)
        cotangent = self.scorer.place_everywhere(np.zeros(4, np.float32))
        arguments = (self.params, grads, self.scorer.no_estimates(), self.rows, cotangent)
        return self.programs.grad.lower(*arguments).compile().as_text()

    @property
    def params(self):
        return self.abstract.params


@pytest.fixture(scope="module", params=MESHES, ids=str)
def compiled(request, cpu_devices):
    return Compiled(request.param)


def test_what_a_step_returns_lies_where_the_table_says(compiled):
    programs, scorer, shardings = compiled.programs, compiled.scorer, compiled.shardings
    params = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), compiled.params), out_shardings=shardings.params
    )()
    estimates, residuals = scorer.forward(params, scorer.no_estimates(), compiled.rows)
    cotangent = scorer.place_everywhere(np.ones(4, np.float32))
    gradient = programs.backward(residuals, params, None, compiled.rows, cotangent)
    added_up = programs.backward(residuals, params, programs.zero_grads(params), compiled.rows, cotangent)
    opt_state = jax.tree.map(
        lambda x, s: jax.device_put(jnp.zeros(x.shape, x.dtype), s), compiled.abstract.opt_state, shardings.opt_state
    )
    accumulated, _ = programs.grad(params, programs.zero_grads(params), estimates, compiled.rows, cotangent)
    loss, go = scorer.place_everywhere((np.float32(0), np.True_))
    state, *_ = programs.update(train_state.TrainState(params, opt_state), gradient, loss, go)
    for tree, expected in (
        (gradient, shardings.params),
        (added_up, shardings.params),
        (accumulated, shardings.params),
        (state.params, shardings.params),
        (state.opt_state, shardings.opt_state),
    ):
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("remat", ["full", "attention", "most", "dots"])
def test_a_second_fsdp_axis_keeps_what_one_keeps(remat, cpu_devices, monkeypatch):
    """Residuals between forward and backward pass, in bytes; on a square of TPUs products are functions of our own."""

    def kept(side: int) -> int:
        monkeypatch.setattr(rules, "_torus_side", lambda devices: side)
        found = Compiled(config.Mesh(1, 8, 1))
        scorer = Scorer(MaskPredictor(MODEL, jnp.float32, jnp.float32, remat), found.mesh, size=8, residuals="device")
        _, residuals = scorer.forward.eval_shape(found.params, scorer.no_estimates(), found.rows)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    assert kept(4) == kept(0)


def test_rows_are_split_over_data_and_fsdp(compiled):
    parts = compiled.mesh.shape["data"] * compiled.mesh.shape["fsdp"]
    for leaf in compiled.rows:
        assert leaf.sharding.shard_shape(leaf.shape)[0] == len(leaf) // parts


def test_logits_are_never_whole(compiled):
    """Each device has the logits of its rows and, where the tensor axis splits the vocabulary, of its part of that."""
    parts = compiled.mesh.shape["data"] * compiled.mesh.shape["fsdp"]
    tensor = compiled.mesh.shape["tensor"]
    logits = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", compiled.text())}
    positions = 8 // parts * elbo.CHUNK
    assert positions in {math.prod(shape[:-1]) for shape in logits if shape[-1] * tensor == VOCABULARY}
    assert not {
        shape for shape in logits if VOCABULARY in shape and math.prod(shape) > positions * VOCABULARY // tensor
    }
    if tensor > 1:
        whole = {shape for shape in logits if shape[-1] == VOCABULARY or (len(shape) == 3 and VOCABULARY in shape)}
        assert not whole
