"""models/attention*.py: the formula in numpy, and the tiled form against it in values and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from elbo_kto_jax.models import attention, attention_cpu, attention_kernels
from elbo_kto_jax.models.attention_cpu import block_attention
from elbo_kto_jax.models.attention_kernels import cudnn_attention, splash_attention
from elbo_kto_jax.models.attention_plain import plain_attention


def random_inputs(s, *, h=4, kv=2, b=2, e=6, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(b, s, n, e)), dtype) for n in (h, kv, kv)]


def random_segments(s, *, b=2, seed=0, padding=4):
    """Four runs of random lengths, of which the one numbered `padding` is padding in every row but the first."""
    rng, rows = np.random.default_rng(seed), []
    for r in range(b):
        cuts = np.sort(rng.choice(np.arange(1, s), 3, replace=False))
        ids = 1 + np.searchsorted(cuts, np.arange(s), side="right")
        rows.append(np.where((ids == padding) & (r > 0), 0, ids))
    return jnp.asarray(np.stack(rows), jnp.int32)


def naive(query, key, value, segment_ids):
    """One query and one head at a time, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    b, s, h, e = query.shape
    for r, i, head in np.ndindex(b, s, h):
        seen = np.asarray(segment_ids[r] == segment_ids[r, i])
        of = head // (h // key.shape[2])
        scores = key[r, seen, of] @ query[r, i, head] / np.sqrt(e)
        weights = np.exp(scores - scores.max())
        out[r, i, head] = weights / weights.sum() @ value[r, seen, of]
    return out


@pytest.mark.parametrize("form", [plain_attention, block_attention])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_formula(monkeypatch, form, kv):
    monkeypatch.setattr(attention_cpu, "BLOCK", 8)
    inputs, segment_ids = random_inputs(21, kv=kv), random_segments(21)
    is_real = np.asarray(segment_ids > 0)
    assert not is_real.all()
    found = np.asarray(form(*inputs, segment_ids))
    np.testing.assert_allclose(found[is_real], naive(*inputs, segment_ids)[is_real], rtol=1e-5, atol=1e-5)


def test_keys_of_other_positions():
    """Some queries, and all keys in any order: each attends to the keys of its segment, wherever they stand."""
    (query, key, value), segment_ids = random_inputs(21), random_segments(21, padding=None)
    order = np.random.default_rng(0).permutation(21)
    some = slice(5, 12)
    found = attention.attention(
        query[:, some],
        key[:, order],
        value[:, order],
        segment_ids[:, some],
        key_segment_ids=segment_ids[:, order],
    )
    np.testing.assert_allclose(found, naive(query, key, value, segment_ids)[:, some], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("s", "kv", "dtype", "padding"),
    [
        (32, 2, "float32", 4),
        (37, 2, "float32", 4),
        (37, 2, "float32", 1),
        (37, 2, "float32", 2),
        (8, 2, "float32", 1),
        (5, 4, "float32", 4),
        (37, 1, "float32", None),
        (37, 2, "bfloat16", 4),
    ],
)
def test_the_tiled_form_is_the_plain_one(monkeypatch, s, kv, dtype, padding):
    """In values and gradients; rows shorter than a tile and rows that end within one, padding anywhere."""
    monkeypatch.setattr(attention_cpu, "BLOCK", 8)
    inputs = random_inputs(s, kv=kv, dtype=jnp.dtype(dtype))
    segment_ids = random_segments(s, padding=padding)
    is_real = segment_ids > 0
    weight = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32) * is_real[..., None, None]

    def run(form):
        @jax.jit
        def value(*args):
            out = form(*args, segment_ids)
            return jnp.sum(weight * out), out * is_real[..., None, None]

        gradients, out = jax.grad(value, argnums=(0, 1, 2), has_aux=True)(*inputs)
        assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(dtype)}
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    tolerance = 2e-5 if dtype == "float32" else 4e-2
    for found, expected in zip(run(block_attention), run(plain_attention), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("form", "options"),
    [(splash_attention, {"interpret": True}), (cudnn_attention, {"implementation": "xla"})],
)
@pytest.mark.parametrize(
    ("s", "kv", "padding"),
    [(256, 1, 4), (130, 2, 1), (41, 1, 2)],
)
def test_the_kernels_are_the_plain_form(form, options, s, kv, padding):
    """In values and gradients, interpreted or by XLA: rows that fill their tiles or not, padding anywhere."""
    inputs, segment_ids = random_inputs(s, h=2, kv=kv, e=8), random_segments(s, padding=padding)
    is_real = (segment_ids > 0)[..., None, None]
    weight = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32) * is_real

    def run(form, **options):
        @jax.jit
        def value(*args):
            out = form(*args, segment_ids, **options)
            return jnp.sum(weight * out), out * is_real

        gradients, out = jax.grad(value, argnums=(0, 1, 2), has_aux=True)(*inputs)
        return [np.asarray(x) for x in (out, *gradients)]

    for found, expected in zip(run(form, **options), run(plain_attention), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def packed_rows(length):
    """One segment; many short ones; padding at the end; a border that is no border of blocks; the same id twice."""
    at = np.arange(length)
    rows = [at * 0 + 1, 1 + at // 7, np.where(at < 300, 1 + at // 130, 0), 1 + (at >= 200), 1 + (at // 256) % 2]
    return jnp.asarray(np.stack(rows), jnp.int32)


def test_the_kernel_for_tpus_on_rows_of_many_blocks():
    """In values and gradients, also where a row has blocks in which nothing is visited; 600 positions are 5 blocks."""
    segment_ids = packed_rows(600)
    inputs = random_inputs(600, b=len(segment_ids), h=2, kv=1, e=8)
    is_real = (segment_ids > 0)[..., None, None]
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32) * is_real

    def run(form):
        @jax.jit
        def both(*inputs):
            found, pull = jax.vjp(lambda *inputs: form(*inputs, segment_ids), *inputs)
            return found * is_real, *pull(cotangent)

        return [np.asarray(x) for x in both(*inputs)]

    for found, expected in zip(
        run(functools.partial(splash_attention, interpret=True)), run(plain_attention), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_kernel_for_tpus_visits_no_block_without_a_common_segment():
    """What is no number in another segment's blocks reaches neither values nor gradients: zero times it would."""
    first = slice(0, 256)  # two blocks; the other segment has three
    segment_ids = jnp.where(jnp.arange(640) < 256, 1, 2)[None]
    inputs = [x.at[:, 256:].set(jnp.nan) for x in random_inputs(640, b=1, h=1, kv=1, e=8)]

    @jax.jit
    def both(*inputs):
        found, pull = jax.vjp(lambda *inputs: splash_attention(*inputs, segment_ids, interpret=True), *inputs)
        return found, *pull(jnp.ones_like(found))

    found = both(*inputs)
    assert all(np.isfinite(x[:, first]).all() for x in found)
    alone = plain_attention(*(x[:, first] for x in inputs), segment_ids[:, first])
    np.testing.assert_allclose(found[0][:, first], alone, rtol=1e-4, atol=1e-5)


def test_the_blocks_that_are_visited():
    found = attention_kernels.visited_blocks(jnp.asarray([1, 1, 1, 2, 2, 2, 3, 3, 0, 0]), 2)
    touching = np.eye(5, dtype=bool)
    touching[0, 1] = touching[1, 0] = touching[1, 2] = touching[2, 1] = True  # by segments 1 and 2
    touching[1, 1:3] = True
    np.testing.assert_array_equal(found, touching)


def test_a_jax_without_the_tables_visits_all_blocks_and_says_so(caplog):
    nothing: Any = None
    whole = attention_kernels.splash.SplashAttentionKernel(nothing, nothing, nothing)
    assert attention_kernels._skipping(whole, jnp.ones((2, 2), bool)) is whole
    assert "attention visits all blocks" in caplog.text


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_the_kernel_for_tpus_compiles_for_them(monkeypatch, topology):
    """Forward and backward, several rows of several blocks, grouped heads."""
    pytest.importorskip("libtpu")
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(name, value)
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))

    def loss(query, key, value, segment_ids):
        return splash_attention(query, key, value, segment_ids).astype(jnp.float32).sum()

    inputs = shape(2, 640, 2, 64), shape(2, 640, 1, 64), shape(2, 640, 1, 64), shape(2, 640, dtype=jnp.int32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*inputs).lower(lowering_platforms=("tpu",)).compile()
    text = gradient.as_text()
    assert "splash_mha_fwd" in text
    assert "splash_mha_dkv" in text


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "form"),
    [
        ("cpu", "float32", 128, block_attention),
        ("cpu", "bfloat16", 128, block_attention),
        ("tpu", "float32", 128, plain_attention),
        ("tpu", "bfloat16", 128, splash_attention),
        ("gpu", "bfloat16", 128, cudnn_attention),
        ("gpu", "bfloat16", 256, plain_attention),
        ("gpu", "bfloat16", 6, plain_attention),
        ("gpu", "float32", 128, plain_attention),
        ("unknown", "float32", 128, plain_attention),
    ],
)
def test_the_platform_decides_and_the_log_says_so(platform, dtype, head_dim, form, caplog):
    attention.form_for.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):  # the second time it is known
            assert attention.form_for(platform, jnp.dtype(dtype), head_dim) is form
    assert caplog.messages == [f"attention on {platform}: {form.__name__}, {dtype}"]


needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="jax has no GPU here")


@needs_gpu
@pytest.mark.parametrize("form", ["cudnn_attention", "packed_attention"])
@pytest.mark.parametrize(
    ("s", "runs"),
    [(1024, 4), (1023, 4), (256, 1), (512, 40)],
    ids=["even", "odd", "one", "more than there is room for"],
)
def test_the_kernels_for_gpus_are_the_plain_form(form, s, runs):
    """In values and gradients, in bfloat16; every position is written, padding too."""
    if form == "packed_attention" and not attention_kernels.has_packed_kernel():
        pytest.skip("this GPU has no kernel for packed segments")
    inputs, segment_ids = random_inputs(s, e=128, dtype=jnp.bfloat16), []
    for seed in range(2):
        cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, s), runs - 1, replace=False))
        segment_ids.append(1 + np.searchsorted(cuts, np.arange(s), side="right"))
    segment_ids = jnp.asarray(np.stack(segment_ids), jnp.int32).at[1, s // 2 :].set(0)
    is_real = np.asarray(segment_ids > 0)
    cotangent = jnp.asarray(np.random.default_rng(9).normal(size=inputs[0].shape), jnp.float32)

    def both(form, inputs, dtype):
        found, pull = jax.vjp(lambda *inputs: form(*inputs, segment_ids), *(x.astype(dtype) for x in inputs))
        return [np.asarray(x, np.float64) for x in (found, *pull((cotangent * is_real[..., None, None]).astype(dtype)))]

    exact = both(plain_attention, inputs, jnp.float32)
    for found, expected in zip(both(getattr(attention_kernels, form), inputs, jnp.bfloat16), exact, strict=True):
        assert np.isfinite(found).all()
        apart = (found - expected)[is_real]
        assert np.linalg.norm(apart) < 6e-3 * np.linalg.norm(expected[is_real])  # bfloat16 keeps 8 bits: 2 to 4e-3
