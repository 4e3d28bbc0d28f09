"""sharding/rules.py: the two tables cover every parameter once, and what does not fit is refused, never replicated."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from elbo_kto_jax.models import axes
from elbo_kto_jax.models.network import MaskPredictor, abstract_params
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import state as train_state
from tests import tiny
from tests.conftest import PROJECT_ROOT


def mesh_of(data: int, fsdp: int, tensor: int):
    return rules.make_mesh(config.Mesh(data, fsdp, tensor), jax.devices()[:8])


def leaves_by_name(tree) -> dict:
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def abstract():
    return abstract_params(MaskPredictor(tiny.MODEL))


def test_every_parameter_has_exactly_one_line_and_every_line_a_parameter(abstract):
    parameters, *_ = axes.parameter_axes(tiny.MODEL)
    assert parameters.keys() == leaves_by_name(abstract).keys()


def test_adapters_and_int8_matrices_lie_as_their_matrices_do(abstract):
    options, model = config.Lora(4, 1.0, "int8", [], ""), MaskPredictor(tiny.MODEL)
    mesh, found = mesh_of(2, 2, 2), {}
    for tree in (train_state.abstract_base(model, options), train_state.abstract_trained(model, options)):
        names = leaves_by_name(tree)
        found |= leaves_by_name(axes.param_shardings(tree, mesh, tiny.MODEL))
        for name in names:
            assert sum(name in table for table in axes.parameter_axes(tiny.MODEL)) == 1, name
    for name, sharding in leaves_by_name(axes.param_shardings(abstract, mesh, tiny.MODEL)).items():
        if name.startswith("blocks/") and name.endswith("/kernel"):
            layers, rows, columns = sharding.spec
            assert found[name] == sharding
            assert found[f"{name}_scale"].spec == P(layers, columns)
            assert found[name.replace("kernel", "lora_a")].spec == P(layers, rows, None)
            assert found[name.replace("kernel", "lora_b")].spec == P(layers, None, columns)


@pytest.mark.parametrize("missing", ["lora_a", "lora_b"])
def test_an_adapter_without_its_other_half_is_an_error(abstract, missing):
    tree = train_state.abstract_trained(MaskPredictor(tiny.MODEL), config.Lora(4, 1.0, "none", [], ""))
    del tree["blocks"]["attn_out"][missing]
    with pytest.raises(ValueError, match=f"attn_out/{missing}"):
        axes.param_shardings(tree, mesh_of(2, 2, 2), tiny.MODEL)


def test_matrices_are_split_over_fsdp_and_tensor_and_scales_are_whole(abstract):
    shardings, shapes = (
        leaves_by_name(axes.param_shardings(abstract, mesh_of(2, 2, 2), tiny.MODEL)),
        leaves_by_name(abstract),
    )
    for name, leaf in shapes.items():
        parts = 1 if name.endswith("scale") else 4
        size = shardings[name].shard_shape(leaf.shape)
        assert jnp.prod(jnp.array(leaf.shape)) == parts * jnp.prod(jnp.array(size)), name


def test_moments_of_adam_lie_where_their_parameters_do(abstract):
    tx = train_state.optimizer(config.Optimizer(1e-3, "cosine", 0.1, 0.9, 0.95, 0.01, 1.0, "float32"), 10)
    shardings = train_state.state_shardings(tx, abstract, mesh_of(2, 2, 2), tiny.MODEL)
    expected, found = leaves_by_name(shardings.params), 0
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings.opt_state):
        name = "/".join(key.key for key in path if hasattr(key, "key"))
        if name in expected:
            assert sharding == expected[name]
            found += 1
        else:
            assert sharding.is_fully_replicated
    assert found == 2 * len(expected)


def test_a_parameter_without_a_line_is_an_error(abstract):
    with pytest.raises(ValueError, match="blocks/q_proj/bias"):
        axes.param_shardings(
            {**abstract, "blocks": {**abstract["blocks"], "q_proj": {"bias": jnp.zeros((2, 16))}}},
            mesh_of(8, 1, 1),
            tiny.MODEL,
        )


def test_a_line_without_a_parameter_is_an_error(abstract):
    with pytest.raises(ValueError, match="ln_f"):
        axes.param_shardings(
            {name: leaf for name, leaf in abstract.items() if name != "ln_f"}, mesh_of(8, 1, 1), tiny.MODEL
        )


def test_a_line_of_another_rank_is_an_error(abstract):
    with pytest.raises(ValueError, match="head/kernel"):
        axes.param_shardings({**abstract, "head": {"kernel": jnp.zeros((2, 16, 48))}}, mesh_of(8, 1, 1), tiny.MODEL)


@pytest.mark.parametrize(
    ("shape", "mesh", "named"),
    [((15, 48), (1, 8, 1), ("fsdp", "model")), ((16, 47), (4, 1, 2), ("tensor", "vocabulary"))],
)
def test_a_dimension_that_does_not_divide_is_an_error(abstract, shape, mesh, named):
    with pytest.raises(UserError) as refused:
        axes.param_shardings({**abstract, "head": {"kernel": jnp.zeros(shape)}}, mesh_of(*mesh), tiny.MODEL)
    message = str(refused.value)
    assert f"config.mesh.{named[0]}" in message
    assert all(word in message for word in (named[1], "head/kernel"))


def test_a_head_is_never_split(abstract):
    with pytest.raises(UserError, match="n_kv_heads 2"):
        axes.check_heads(tiny.MODEL, mesh_of(2, 1, 4))
    axes.check_heads(tiny.MODEL, mesh_of(4, 1, 2))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 1), (2, 4, 1)), ((1, 2, -1), (1, 2, 4)), ((2, 2, 2), (2, 2, 2))],
)
def test_mesh_sizes(cpu_devices, sizes, expected):
    mesh = mesh_of(*sizes)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), expected, strict=True))
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in cpu_devices)
    assert rules.row_shards(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, 16, 1)])
def test_a_mesh_that_does_not_use_every_device_is_refused(sizes):
    with pytest.raises(UserError, match=r"config\.mesh.*8 devices"):
        mesh_of(*sizes)


SPLIT = """
import os, jax
os.cpu_count = lambda: 4
from elbo_kto_jax.runtime.config import Mesh
from elbo_kto_jax.sharding import rules
rules.split_cpu(Mesh({}))
print(len(jax.devices()), end="")
"""


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [("data=4, fsdp=1, tensor=1", 4), ("data=1, fsdp=-1, tensor=2", 1), ("data=2, fsdp=4, tensor=1", 1)],
)
def test_the_cpu_is_split_as_the_mesh_says(sizes, devices):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", SPLIT.format(sizes)]
    done = subprocess.run(words, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == str(devices)
