"""diffusion/elbo.py against a plain log-softmax over all positions, in values, gradients and memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.diffusion import elbo


def problem(num_targets, *, s=11, d=6, v=17, p=10, dtype=jnp.float32, seed=0):
    """Random hidden states and head, and random targets; those behind `num_targets` must not matter."""
    rng, m = np.random.default_rng(seed), len(num_targets)
    position = np.stack([rng.permutation(s)[:p] for _ in range(m)]).astype(np.int32)
    for row, count in zip(position, num_targets, strict=True):
        row[count:] = 0
    return (
        jnp.asarray(rng.normal(size=(m, s, d)), dtype),
        jnp.asarray(rng.normal(size=(d, v)), jnp.float32),
        jnp.asarray(position),
        jnp.asarray(rng.integers(0, v, (m, p)), jnp.int32),
        jnp.asarray(num_targets, jnp.int32),
    )


def plain(hidden, head, position, token, num_targets):
    """log softmax(hidden @ head) of every position, then a choice."""
    logits = jnp.einsum("msd,dv->msv", hidden.astype(jnp.float32), head, precision="highest")
    rows = jnp.arange(len(hidden))[:, None]
    log_probs = jax.nn.log_softmax(logits)[rows, position, token]
    return jnp.where(jnp.arange(position.shape[1]) < num_targets[:, None], log_probs, 0.0)


@pytest.fixture(params=[4, 5, 256], ids=lambda chunk: f"chunk{chunk}")
def chunk(request, monkeypatch):
    """Several chunks, the last one full or not, or a single one that is wider than the row."""
    monkeypatch.setattr(elbo, "CHUNK", request.param)
    return request.param


@pytest.mark.parametrize("num_targets", [(10, 3, 0, 5), (4, 8, 1, 4), (0, 0)], ids=str)
def test_values_and_gradients(chunk, num_targets):
    hidden, head, *targets = problem(num_targets)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=targets[0].shape), jnp.float32)

    def run(function):
        value = lambda h, w: jnp.sum(weight * function(h, w, *targets))  # noqa: E731
        return function(hidden, head, *targets), *jax.grad(value, argnums=(0, 1))(hidden, head)

    for found, expected in zip(run(elbo.target_log_probs), run(plain), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_gradient_against_finite_differences(chunk):
    hidden, head, *targets = problem((6, 2), s=7, d=3, v=5, p=6)
    log_probs = lambda h, w: jnp.sum(elbo.target_log_probs(h, w, *targets))  # noqa: E731
    gradients = jax.grad(log_probs, argnums=(0, 1))(hidden, head)
    rng, step = np.random.default_rng(2), 1e-2
    for argument, gradient in enumerate(gradients):
        direction = [jnp.zeros_like(hidden), jnp.zeros_like(head)]
        direction[argument] = jnp.asarray(rng.normal(size=gradient.shape), jnp.float32)
        ahead, behind = (log_probs(hidden + t * direction[0], head + t * direction[1]) for t in (step, -step))
        slope = (ahead - behind) / (2 * step)
        np.testing.assert_allclose(jnp.vdot(gradient, direction[argument]), slope, rtol=2e-3, atol=2e-3)


def test_a_position_may_be_a_target_twice(chunk):
    """Its gradients add up, within a chunk and across chunks."""
    hidden, head, position, token, num_targets = problem((6,), p=6)
    position = jnp.asarray([[2, 2, 3, 3, 2, 5]], jnp.int32)
    gradient, expected = (
        jax.grad(lambda h: jnp.sum(f(h, head, position, token, num_targets)))(hidden)  # noqa: B023
        for f in (elbo.target_log_probs, plain)
    )
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-5)


def test_bfloat16_states_give_float32_values():
    """The logits and the softmax are float32: only the states and the head are rounded."""
    hidden, head, *targets = problem((10, 3), dtype=jnp.bfloat16)
    found = elbo.target_log_probs(hidden, head, *targets)
    assert found.dtype == jnp.float32
    rounded_head = head.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(found, plain(hidden, rounded_head, *targets), rtol=1e-5, atol=1e-5)
    gradients = jax.grad(lambda h, w: jnp.sum(elbo.target_log_probs(h, w, *targets)), argnums=(0, 1))(hidden, head)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


def test_estimates_by_slot():
    """weight * sum of log p over the targets of each slot; a slot without targets has 0."""
    hidden, head, *targets = problem((9, 2))
    rng, slots = np.random.default_rng(3), 4
    slot = rng.integers(0, slots - 1, targets[0].shape).astype(np.int32)
    weight = rng.uniform(1, 9, targets[0].shape).astype(np.float32)
    position, token, num_targets = targets
    found = elbo.elbo_draws(hidden, head, position, token, jnp.asarray(slot), jnp.asarray(weight), num_targets, slots)
    log_probs = np.asarray(plain(hidden, head, *targets), np.float64)
    expected = [[(weight * log_probs)[m][slot[m] == g].sum() for g in range(slots)] for m in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[:, slots - 1], 0.0)


def largest_array(function, *arguments) -> int:
    """Elements of the largest array in the compiled program."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    shapes = re.findall(r"\b(?:f|bf|s|u)(?:16|32|64)\[([\d,]+)\]|\bpred\[([\d,]+)\]", text)
    assert shapes
    return max(int(np.prod([int(n) for n in (a or b).split(",")])) for a, b in shapes)


def test_a_long_row_is_added_up_with_little_rounding():
    """Against the same float32 log-probabilities added up in float64; in one sum the error would be 4e-7 and more."""
    hidden, head, *targets = problem((4096,) * 4, s=4096, p=4096, v=700)
    log_probs = np.asarray(elbo.target_log_probs(hidden, head, *targets), np.float64)
    slot, weight = jnp.zeros((4, 4096), jnp.int32), jnp.full((4, 4096), 1.7)
    found = elbo.elbo_draws(hidden, head, *targets[:2], slot, weight, targets[2], slots=2)
    np.testing.assert_allclose(found[:, 0], 1.7 * log_probs.sum(axis=1), rtol=1.5e-7)
    np.testing.assert_array_equal(found[:, 1], 0.0)


def test_no_array_of_length_times_vocabulary(monkeypatch):
    """Neither forward nor backward, for one row in which every position is a target."""
    monkeypatch.setattr(elbo, "CHUNK", 8)
    s, v = 96, 1000
    arguments = problem((s,), s=s, v=v, p=s)

    def gradient(function):
        return jax.grad(lambda h, w, *targets: jnp.sum(function(h, w, *targets)), argnums=(0, 1))

    assert largest_array(gradient(plain), *arguments) >= s * v  # the measure sees what it has to see
    assert largest_array(gradient(elbo.target_log_probs), *arguments) <= 8 * v
