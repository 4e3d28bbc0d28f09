"""The digest sees every bit of a tree and nothing else."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from elbo_kto_jax.checkpoints.digest import params_digest
from tests.published import DTYPES


@pytest.fixture
def tree() -> dict:
    rng = np.random.default_rng(0)
    return {
        "a": {"kernel": rng.normal(size=(16, 24)).astype(np.float32)},
        "b": rng.normal(size=(8, 3, 16)).astype(ml_dtypes.bfloat16),
        "count": np.array(3, np.int32),
    }


def test_sharding_and_host_or_device_do_not_matter(tree, cpu_devices):
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=cpu_devices)
    specs = {"a": {"kernel": PartitionSpec("y", "x")}, "b": PartitionSpec(("x", "y")), "count": PartitionSpec()}
    sharded = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)
    assert params_digest(sharded) == params_digest(tree) == params_digest(jax.tree.map(jnp.asarray, tree))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype):
    word = np.dtype(f"uint{8 * np.dtype(DTYPES[dtype]).itemsize}")
    values = np.random.default_rng(0).integers(0, np.iinfo(word).max, (5, 7), word)
    digests = {params_digest({"w": values.view(DTYPES[dtype])})}
    places = [(0, 0), (2, 3), (4, 6)]
    for place in places:
        for bit in range(8 * word.itemsize):
            flipped = values.copy()
            flipped[place] ^= word.type(1 << bit)
            digests.add(params_digest({"w": flipped.view(DTYPES[dtype])}))
    assert len(digests) == 1 + len(places) * 8 * word.itemsize


def test_order_shape_dtype_and_name_count():
    values = np.arange(12, dtype=np.float32)
    variants = [
        {"w": values},
        {"v": values},
        {"w": {"v": values}},
        {"w": values[::-1].copy()},
        {"w": values.reshape(3, 4)},
        {"w": values.reshape(4, 3)},
        {"w": values.view(np.int32)},
        {"w": values[:11]},
        {"w": np.concatenate([values, [np.float32(0)]])},
        {"w": np.concatenate([values[:1] * -1, values[1:]])},  # -0.0
        {"w": values, "x": values},
    ]
    assert len({params_digest(variant) for variant in variants}) == len(variants)


def test_swapped_leaves_count(tree):
    one, other = np.ones(4, np.float32), np.zeros(4, np.float32)
    assert params_digest({"a": one, "b": other}) != params_digest({"a": other, "b": one})
