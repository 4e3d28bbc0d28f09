"""models/lora.py: adapters beside kernels do what merged kernels do, and int8 kernels are as near as they can be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.models import axes, lora, memory
from elbo_kto_jax.models.network import MaskPredictor, abstract_params
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from tests import tiny

RANK = 3
MATRICES = {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, tiny.MODEL.eos_token_id, (2, 8)))


def adapters(seed: int, *, random_b: bool) -> dict:
    """Adapters of the tiny model; with `random_b` such that they matter."""
    abstract = lora.abstract_adapters(abstract_params(tiny.model()), RANK, jnp.float32)
    everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = lora.init_adapters(abstract, jax.tree.map(lambda _: everywhere, abstract), seed)
    if not random_b:
        return tree
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype) / np.sqrt(x.shape[1]), tree)


def quantized(params: dict) -> dict:
    layers = {
        name: lora.quantize(layer["kernel"]) if "kernel" in layer else layer for name, layer in params["blocks"].items()
    }
    return {**params, "blocks": layers}


def merged(base: dict, tree: dict, scale: float) -> dict:
    """The whole model as one plain tree."""

    def layer(name, group):
        group = {"kernel": lora.dequantize(**group)} if "kernel_scale" in group else group
        if name not in tree["blocks"]:
            return group
        kernel = group["kernel"]
        return {"kernel": lora.merge(kernel, **tree["blocks"][name], scale=scale, dtype=jnp.float32)}

    return {**base, "blocks": {name: layer(name, group) for name, group in base["blocks"].items()}}


@functools.partial(jax.jit, static_argnames="dtype")
def logits(params, dtype: str = "float32"):
    return tiny.model(dtype).apply({"params": params}, TOKENS, method=MaskPredictor.logits)


@pytest.mark.parametrize("quantize", [False, True])
def test_the_adapted_model_is_the_merged_model(quantize):
    base = quantized(tiny.params(0)) if quantize else tiny.params(0)
    tree = adapters(1, random_b=True)
    adapted = logits(lora.parameters(lora.Base(base, 0.7).policy(tree)))
    np.testing.assert_allclose(adapted, logits(merged(base, tree, 0.7)), atol=2e-5)
    assert np.abs(adapted - logits(merged(base, tree, 0.0))).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [False, True])
def test_adapters_that_are_new_or_off_are_the_base_in_one_program(dtype, quantize):
    base = lora.Base(quantized(tiny.params(0)) if quantize else tiny.params(0), 0.7)
    new, off = base.policy(adapters(0, random_b=False)), base.reference(adapters(1, random_b=True))
    new, off = (logits(lora.parameters(weights), dtype) for weights in (new, off))
    np.testing.assert_array_equal(new, off)
    # The program without adapters may round differently.
    np.testing.assert_allclose(new, logits(base.params, dtype), atol=1e-5 if dtype == "float32" else 0.1)


def test_adapters_belong_to_the_matrices_of_the_blocks_and_start_at_nothing():
    tree, other = adapters(0, random_b=False), adapters(1, random_b=False)
    assert tree.keys() == {"blocks"}
    assert tree["blocks"].keys() == MATRICES
    for name, adapter in tree["blocks"].items():
        a = np.asarray(adapter["lora_a"])
        assert not np.asarray(adapter["lora_b"]).any()
        assert not np.array_equal(a, other["blocks"][name]["lora_a"])
        # The mean square of n normal values: 5 standard deviations, false alarms 1e-6.
        assert abs(np.mean(a**2) * a.shape[1] - 1) < 5 * np.sqrt(2 / a.size)


def test_targets_choose_the_matrices():
    """Each adapter is the one that it is among all; the axes of a mesh and the plan know of no others."""
    options = config.Lora(RANK, 1.0, "none", ["v_proj", "ff_out"], "")
    abstract = train_state.abstract_trained(tiny.model(), options)
    assert abstract["blocks"].keys() == {"v_proj", "ff_out"}
    mesh = rules.make_mesh(config.Mesh(2, 2, 2), jax.devices()[:8])
    tree = lora.init_adapters(abstract, axes.param_shardings(abstract, mesh, tiny.MODEL), 0)
    every = adapters(0, random_b=False)["blocks"]
    jax.tree.map(np.testing.assert_array_equal, tree["blocks"], {name: every[name] for name in abstract["blocks"]})
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert memory.adapters(tiny.MODEL, RANK, options.targets) == size
    with pytest.raises(UserError, match=r"config\.lora\.targets: .*attn_out.*v_proj.*, got 'qproj'"):
        train_state.abstract_trained(tiny.model(), config.Lora(RANK, 1.0, "none", ["q_proj", "qproj"], ""))


def test_new_adapters_do_not_depend_on_the_devices():
    abstract = lora.abstract_adapters(abstract_params(tiny.model()), RANK, jnp.float32)
    mesh = rules.make_mesh(config.Mesh(2, 2, 2), jax.devices()[:8])
    spread = lora.init_adapters(abstract, axes.param_shardings(abstract, mesh, tiny.MODEL), 0)
    jax.tree.map(np.testing.assert_array_equal, spread, adapters(0, random_b=False))


def test_int8_is_off_by_half_a_scale_at_most():
    kernel = tiny.params(0)["blocks"]["ff_out"]["kernel"].at[:, :, 0].set(0.0).at[0, :, 1].multiply(1e4)
    packed = lora.quantize(kernel)
    assert packed["kernel"].dtype == jnp.int8
    scale = np.asarray(packed["kernel_scale"])
    np.testing.assert_allclose(scale, np.abs(kernel).max(axis=1) / 127, rtol=1e-6)
    error = np.abs(np.asarray(lora.dequantize(**packed)) - np.asarray(kernel))
    assert (error <= scale[:, None] * (0.5 + 1e-5)).all()
    assert error.max() > 0
    assert not error[:, :, 0].any()  # a channel of zeros stays one


def test_int8_changes_the_model_little():
    base = tiny.params(0)
    exact, near = logits(base), logits(quantized(base))
    assert 0 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.03


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_abstract_base_is_that_of_the_real_one(quantization):
    options = config.Lora(RANK, 1.0, quantization, [], "")
    abstract = train_state.abstract_base(tiny.model("bfloat16"), options)
    real = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params(0))
    real = quantized(real) if quantization == "int8" else real
    as_struct = lambda x: (x.shape, jnp.dtype(x.dtype))  # noqa: E731
    assert jax.tree.map(as_struct, abstract) == jax.tree.map(as_struct, real)
