"""training/rounding.py: bfloat16 parameters learn from updates that rounding to nearest loses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elbo_kto_jax.runtime import config
from elbo_kto_jax.sharding import rules
from elbo_kto_jax.training import rounding, step
from elbo_kto_jax.training import state as train_state

ROUNDINGS = 40_000


@pytest.mark.parametrize("value", [0.02 + 1e-6, -0.02 - 1e-6, 1.0 - 1e-4, 3e-39, 1e-30])
def test_the_mean_is_the_number_itself(value):
    """By chance in one of 16,000 runs at most (4 standard errors), for each number."""
    x = jnp.full(ROUNDINGS, value, jnp.float32)
    found = np.asarray(jax.jit(rounding.stochastic_round)(x, jax.random.key(0))).astype(np.float64)
    exact, (low, high) = float(x[0]), (found.min(), found.max())
    assert low < exact < high
    assert sorted(set(found)) == [low, high]
    assert float(np.nextafter(jnp.bfloat16(low), jnp.bfloat16(high))) == high  # neighbours
    up = (exact - low) / (high - low)
    assert abs((found == high).mean() - up) < 4 * (up * (1 - up) / ROUNDINGS) ** 0.5


@pytest.mark.parametrize("value", [0.0, -0.0, 0.5, -1.25, np.inf, -np.inf, np.nan])
def test_numbers_of_bfloat16_stay_what_they_are(value):
    found = np.asarray(rounding.stochastic_round(jnp.full(100, value, jnp.float32), jax.random.key(1)))
    np.testing.assert_array_equal(found.astype(np.float32), np.full(100, value, np.float32))
    assert (np.signbit(found) == np.signbit(value)).all()


def test_bits_depend_on_key_and_leaf_and_on_nothing_else(cpu_devices):
    x = jnp.full((8, 64), 0.02 + 1e-5, jnp.float32)
    like = {"a": jnp.bfloat16(0), "b": jnp.bfloat16(0), "exact": jnp.float32(0), "count": jnp.int32(0)}
    tree = {"a": x, "b": x, "exact": x, "count": jnp.int32(3)}
    one = rounding.round_like(tree, like, jax.random.key(0))
    assert (one["a"] != one["b"]).any()
    assert (one["a"] != rounding.round_like(tree, like, jax.random.key(1))["a"]).any()
    np.testing.assert_array_equal(one["exact"], x)
    assert one["count"] == 3
    alone = rounding.round_like({"a": x}, {"a": like["a"]}, jax.random.key(0))
    np.testing.assert_array_equal(alone["a"], one["a"])

    mesh = rules.make_mesh(config.Mesh(2, 2, 2), cpu_devices)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    program = jax.jit(rounding.stochastic_round, out_shardings=split)
    key = jax.random.key(5)
    np.testing.assert_array_equal(program(jax.device_put(x, split), key), rounding.stochastic_round(x, key))


def descend(param_dtype: str, moments_dtype: str, steps: int) -> list[float]:
    """Half the mean square of 4,096 weights of size 0.02 as AdamW moves them at rate 1e-6: the loss of every step."""
    options = config.Optimizer(1e-6, "cosine", 0.0, 0.9, 0.95, 0.0, 1e9, moments_dtype)
    adam = train_state.optimizer(options, steps)
    start = np.random.default_rng(0).normal(0.02, 0.004, 4096).astype(np.float32)
    params = {"w": {"kernel": jnp.asarray(start).astype(param_dtype)}}
    state = train_state.TrainState(params, adam.init(params))
    assert {str(x.dtype) for x in jax.tree.leaves(state.opt_state) if x.ndim} == {moments_dtype}

    @jax.jit
    def one(state):
        loss, grads = jax.value_and_grad(lambda p: 0.5 * jnp.mean(jnp.square(p["w"]["kernel"])))(
            rounding.in_float32(state.params)
        )
        return step.update(adam, 0, state, grads, loss, jnp.bool_(True))[0], loss

    losses = []
    for _ in range(steps):
        state, loss = one(state)
        losses.append(float(loss))
    assert state.params["w"]["kernel"].dtype == param_dtype
    return losses


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_bfloat16_parameters_follow_float32_ones(moments_dtype):
    """Rounded to nearest they would stand still: an update of 1e-6 is below half a unit of a weight of 0.02."""
    exact = descend("float32", "float32", 300)
    rounded = descend("bfloat16", moments_dtype, 300)
    fall = exact[0] - exact[-1]
    assert fall > 0
    # A weight of 0.02 moves by its unit 2^-13 with probability 1e-6 / 2^-13 a step. So the fall of all 4,096 together
    # has a standard deviation of 2%; by chance 5 of them are exceeded once in 1.7 million times.
    assert rounded[0] - rounded[-1] == pytest.approx(fall, rel=0.1)


def test_nearest_rounding_would_stand_still():
    w = jnp.full(100, 0.02, jnp.bfloat16)
    assert (optax.apply_updates({"w": w}, {"w": jnp.full(100, -1e-6, jnp.float32)})["w"] == w).all()
