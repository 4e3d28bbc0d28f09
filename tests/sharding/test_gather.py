"""sharding/gather.py: what each device gathers and sums, over one and over two fsdp axes."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from elbo_kto_jax.models import axes
from elbo_kto_jax.runtime import config
from elbo_kto_jax.sharding import gather, rules
from tests import tiny

AXES_OF = functools.partial(axes.axes_of, model=tiny.MODEL)

MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp_x": 4, "fsdp_y": 2, "tensor": 1},
    {"data": 1, "fsdp": 1, "tensor": 1},
]


@pytest.fixture(params=MESHES, ids=str)
def mesh(request, cpu_devices):
    sizes = tuple(request.param.values())
    devices = np.asarray(cpu_devices[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, tuple(request.param), axis_types=(AxisType.Auto,) * len(sizes))


def test_rows_meet_whole_parameters_and_gradients_are_sums_over_rows(mesh):
    rng = np.random.default_rng(0)
    params = {
        "wte": {"embedding": jnp.asarray(rng.normal(size=(6, 16)), jnp.float32)},
        "head": {"kernel": jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)},
    }
    tokens = jnp.asarray(rng.integers(0, 6, (8, 3)), jnp.int32)
    weight = jnp.asarray(rng.normal(size=(8, 3, 6)), jnp.float32)

    def of_part(params, rows):
        tokens, weight = rows
        embedded = gather.embed(params["wte"]["embedding"], tokens, mesh, jnp.float32)
        head = gather.whole({"head": params["head"]}, mesh, jnp.float32, AXES_OF)["head"]["kernel"]
        return jnp.sum(weight * jnp.tanh(embedded @ head), axis=(1, 2))

    def plain(params, rows):
        tokens, weight = rows
        return jnp.sum(weight * jnp.tanh(params["wte"]["embedding"][tokens] @ params["head"]["kernel"]), axis=(1, 2))

    def value_and_gradient(function):
        total = lambda params: jnp.sum(jnp.arange(1.0, 9.0) * function(params, (tokens, weight)))  # noqa: E731
        return jax.jit(jax.value_and_grad(total))(params)

    shardings = {
        group: {name: jax.NamedSharding(mesh, rules.spec(axes.axes_of(f"{group}/{name}", tiny.MODEL), mesh))}
        for group, name in (("wte", "embedding"), ("head", "kernel"))
    }
    expected = value_and_gradient(plain)
    params = jax.device_put(params, shardings)
    found = value_and_gradient(gather.over_rows(of_part, mesh, params, AXES_OF))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_two_axes_are_gathered_at_once_and_summed_in_sends_along_both(cpu_devices):
    """On a TPU the first keeps the links of both axes busy; the second, in single sends, runs beside products."""
    mesh = Mesh(np.asarray(cpu_devices[:8]).reshape(1, 4, 2, 1), tuple(MESHES[1]), axis_types=(AxisType.Auto,) * 4)
    params = {"head": {"kernel": jnp.zeros((16, 6))}}

    def of_part(params, rows):
        return rows * jnp.sum(gather.whole(params, mesh, jnp.float32, AXES_OF)["head"]["kernel"])

    def total(params):
        return jnp.sum(gather.over_rows(of_part, mesh, params, AXES_OF)(params, jnp.ones(8)))

    text = str(jax.make_jaxpr(jax.grad(total))(params))
    assert re.findall(r"all_gather\[.*?axis_name=(\(.*?\))", text, re.DOTALL) == ["('fsdp_x', 'fsdp_y')"]
    assert re.findall(r"ppermute\[.*?axis_name=\(.(\w+)", text, re.DOTALL) == [
        *["fsdp_x"] * 3,
        "fsdp_y",
        "fsdp_y",
        *["fsdp_x"] * 3,
    ]
    assert "reduce_scatter[" not in text


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("dimension", [0, 1])
def test_a_ring_of_sends_is_a_reduce_scatter(devices, dimension, cpu_devices):
    mesh = Mesh(np.asarray(cpu_devices[:devices]), ("x",))
    values = jnp.asarray(np.random.default_rng(0).normal(size=(devices * 24, 48)), jnp.float32)

    def summed(function):
        of_each = lambda part: function(part, "x", dimension)  # noqa: E731
        spec = jax.P("x")
        return jax.jit(jax.shard_map(of_each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(values)

    def plain(part, name, dimension):
        return jax.lax.psum_scatter(part, name, scatter_dimension=dimension, tiled=True)

    def ring(part, name, dimension):
        parts = part.reshape(*part.shape[:dimension], devices, -1, *part.shape[dimension + 1 :])
        return gather.ring_reduce_scatter(parts, name, dimension)

    np.testing.assert_allclose(summed(ring), summed(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sides", [(2, 4), (4, 2)])
@pytest.mark.parametrize(("shape", "dimension"), [((16, 5), 0), ((5, 16), 1), ((16,), 0), ((3, 16, 2), 1)])
def test_half_a_gradient_goes_along_either_axis_first(sides, shape, dimension, cpu_devices):
    mesh = Mesh(np.asarray(cpu_devices).reshape(sides), ("x", "y"))
    values = jnp.asarray(np.random.default_rng(0).normal(size=(8, *shape)), jnp.float32)

    def summed(function):
        of_each = lambda part: function(part[0])[None]  # noqa: E731
        spec = jax.P(("x", "y"))
        return jax.jit(jax.shard_map(of_each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(values)

    ours = summed(lambda part: gather.sum_along_both(part, "x", "y", dimension))
    plain = summed(lambda part: jax.lax.psum_scatter(part, ("x", "y"), scatter_dimension=dimension, tiled=True))
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sides", [(2, 4), (4, 2)])
@pytest.mark.parametrize("dimension", [0, 1])
def test_a_product_is_summed_as_its_pieces_are_computed(sides, dimension, cpu_devices):
    mesh = Mesh(np.asarray(cpu_devices).reshape(sides), ("fsdp_x", "fsdp_y"))
    rng = np.random.default_rng(0)
    x, d_out = (jnp.asarray(rng.normal(size=(8, 6, n)), jnp.float32) for n in ((16, 5), (5, 16))[dimension])

    def summed(function):
        of_each = lambda x, d_out: function(x[0], d_out[0])[None]  # noqa: E731
        spec = jax.P(mesh.axis_names)
        return jax.jit(jax.shard_map(of_each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(x, d_out)

    def plain(x, d_out):
        return jax.lax.psum_scatter(x.T @ d_out, mesh.axis_names, scatter_dimension=dimension, tiled=True)

    ours = summed(lambda x, d_out: gather.summed_product(x, d_out, mesh.axis_names, dimension, None))
    np.testing.assert_allclose(ours, summed(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ((1, 1), {"data": 1, "fsdp": 1, "tensor": 1}),
        ((2, 4), {"data": 1, "fsdp": 8, "tensor": 1}),
        ((4, 4), {"data": 1, "fsdp_x": 4, "fsdp_y": 4, "tensor": 1}),
        ((8, 8), {"data": 1, "fsdp_x": 8, "fsdp_y": 8, "tensor": 1}),
    ],
)
def test_a_square_of_tpus_has_two_fsdp_axes(sides, expected, monkeypatch, cpu_devices):
    def device(*coords):
        found = mock.Mock(spec=jax.Device, platform="tpu")
        found.coords = (*coords, 0)
        return found

    made = []
    any_mesh = jax.make_mesh((1,), ("fsdp",), devices=cpu_devices[:1])

    def note(shape, names, *_, devices):
        made.append(dict(zip(names, shape, strict=True)))
        return any_mesh

    monkeypatch.setattr(jax, "make_mesh", note)
    rules.make_mesh(config.Mesh(1, -1, 1), [device(x, y) for x in range(sides[0]) for y in range(sides[1])])
    assert made == [expected]
