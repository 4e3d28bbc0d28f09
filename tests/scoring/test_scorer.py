"""scoring/scorer.py: what it gives, on the host's rows or placed ones, and what FORWARD hands out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.models import axes, lora
from elbo_kto_jax.runtime import config
from elbo_kto_jax.scoring.scorer import Scorer
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training.data import TrainingData
from tests import tiny

ESTIMATOR = config.Estimator(2, "uniform")
MESHES = [config.Mesh(1, 1, 1), config.Mesh(1, 4, 1), config.Mesh(2, 2, 2)]


def make(sizes=MESHES[0], *, dtype="float32", remat="none", **options):
    """A scorer for the draws of six examples, and the parameters on its mesh."""
    mesh = rules.make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])
    params = tiny.params(0)
    placed = jax.device_put(params, axes.param_shardings(params, mesh, tiny.MODEL))
    return Scorer(tiny.model(dtype, remat), mesh, size=12, **options), placed


def data(rows=8):
    return TrainingData(tiny.examples(6), tiny.layout(rows), estimator=ESTIMATOR, batch_size=6, seed=0)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("residuals", ["recompute", "device"])
def test_estimates_are_those_of_each_draw_alone(cpu_devices, sizes, residuals):
    scorer, params = make(sizes, residuals=residuals)
    batch, indices = data().batch(0), data().indices(0)
    assert scorer.takes_one_pass == (residuals == "device")
    expected = tiny.plain_estimates(tiny.params(0), tiny.examples(6), indices, ESTIMATOR, seed=0)
    found = scorer(params, batch.micro_batches)
    np.testing.assert_allclose(np.asarray(found).reshape(6, 2), expected, rtol=3e-6)
    np.testing.assert_array_equal(found, scorer(params, scorer.place(batch.micro_batches)))


def test_indices_that_no_row_has_stay_zero():
    scorer, params = make()
    rows = data(rows=1).batch(0).micro_batches[0]
    found = np.asarray(scorer(params, [rows]))
    scored = np.isin(np.arange(12), rows.slot_index)
    assert 0 < scored.sum() < 12
    np.testing.assert_array_equal(found < 0, scored)
    np.testing.assert_array_equal(found == 0, ~scored)


def adapted(params):
    shapes = lora.abstract_adapters(params, 3, jnp.float32)
    tree = lora.init_adapters(
        shapes, axes.param_shardings(shapes, rules.make_mesh(MESHES[0], jax.devices()[:1]), tiny.MODEL), 0
    )
    return lora.Base(params, 1.0).policy(tree)


def quantized(params):
    blocks = {
        name: lora.quantize(layer["kernel"]) if "kernel" in layer else layer for name, layer in params["blocks"].items()
    }
    return adapted({**params, "blocks": blocks})


@pytest.mark.parametrize("remat", ["full", "attention", "most", "dots"])  # "none" keeps everything that was computed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights_of", [lambda params: params, adapted, quantized], ids=["whole", "adapters", "int8"])
def test_weights_are_not_handed_out(weights_of, dtype, remat):
    """Neither as they are, nor gathered or in another dtype: the backward pass is given them once more.

    A matrix that FORWARD returned would be copied for every micro-batch. Layers without a gradient of their own are no
    exception, nor is the head.
    """
    scorer, params = make(dtype=dtype, remat=remat)
    weights = weights_of(params)
    rows = scorer.place(data().batch(0).micro_batches)[0]
    _, residuals = jax.eval_shape(scorer.forward, weights, scorer.no_estimates(), rows)
    matrices = {tuple(sorted(leaf.shape[-2:])) for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    found = {leaf.shape for leaf in jax.tree.leaves(residuals)}
    assert found
    assert not {shape for shape in found if tuple(sorted(shape[-2:])) in matrices}
