"""scoring/likelihood.py against the golden likelihoods (docs/method.md 7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.data.packing import Layout
from elbo_kto_jax.diffusion.exact import all_masks, exact_weights
from elbo_kto_jax.diffusion.masks import Draws, spread_counts
from elbo_kto_jax.models.network import MaskPredictor
from elbo_kto_jax.runtime import config
from elbo_kto_jax.scoring import likelihood
from elbo_kto_jax.scoring.likelihood import log_likelihoods
from elbo_kto_jax.sharding import rules
from tests import tiny


def test_golden_counts(golden):
    arrays, described = golden.arrays, golden.described["likelihood"]
    for j, case in enumerate(described):
        counts, length, batch = arrays[f"likelihood.{j}.l"], len(arrays[f"likelihood.{j}.answer"]), case["batch_size"]
        expected = [spread_counts(int(counts[at]), batch, length) for at in range(0, len(counts), batch)]
        np.testing.assert_array_equal(np.concatenate(expected), counts)


def test_golden_values(golden):
    """The masks hide what the counts say, and their estimates average to the golden likelihood."""
    arrays = golden.arrays
    for j in range(len(golden.described["likelihood"])):
        prompt, answer = arrays[f"likelihood.{j}.prompt"], arrays[f"likelihood.{j}.answer"]
        counts, mask = arrays[f"likelihood.{j}.l"], arrays[f"likelihood.{j}.mask"]
        np.testing.assert_array_equal(mask[:, len(prompt) :].sum(axis=1), counts)
        whole = np.concatenate([prompt, answer])
        tokens = np.where(mask, golden.config.mask_token_id, whole)
        logits = MaskPredictor(golden.config).apply({"params": golden.policy}, jnp.asarray(tokens), method="logits")
        log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)[:, np.arange(len(whole)), whole]
        value = np.mean(len(answer) / counts * (log_probs * mask).sum(axis=1))
        np.testing.assert_allclose(value, arrays[f"likelihood.{j}.value"], atol=1e-3)


def test_golden_likelihoods(golden, cpu_devices, monkeypatch):
    """Through the code that draws, packs and scores, all records together."""
    arrays, described = golden.arrays, golden.described["likelihood"]
    batches = {case["batch_size"] for case in described}
    assert len(batches) == 1
    expected = []
    for j in range(len(described)):
        start, length = len(arrays[f"likelihood.{j}.prompt"]), len(arrays[f"likelihood.{j}.answer"])
        mask, counts = arrays[f"likelihood.{j}.mask"][:, start:], arrays[f"likelihood.{j}.l"]
        cuts = range(0, len(counts), *batches)
        expected += [Draws(mask[at : at + cuts.step], length / counts[at : at + cuts.step]) for at in cuts]

    def draw_masks(scheme, *, draws, **_):
        assert (scheme, draws) == ("likelihood", len(expected[0].mask))
        return expected.pop(0)

    monkeypatch.setattr(likelihood, "draw_masks", draw_masks)
    found = log_likelihoods(
        MaskPredictor(golden.config),
        golden.policy,
        [arrays[f"likelihood.{j}.prompt"] for j in range(len(described))],
        [arrays[f"likelihood.{j}.answer"] for j in range(len(described))],
        draws=len(arrays["likelihood.0.l"]),
        batch=next(iter(batches)),
        seed=0,
        layout=Layout(4, 256, golden.config.mask_token_id, golden.config.pad_token_id, True),
        mesh=rules.make_mesh(config.Mesh(1, 1, 1), cpu_devices[:1]),
    )
    values = [float(arrays[f"likelihood.{j}.value"]) for j in range(len(described))]
    np.testing.assert_allclose(found, values, atol=1e-3)
    assert not expected


def tiny_likelihoods(prompts, answers, devices, *, draws=8, batch=4, **more):
    arguments = {"draws": draws, "batch": batch, "seed": 0, "layout": tiny.layout(rows=8), **more}
    mesh = rules.make_mesh(config.Mesh(-1, 1, 1), devices)
    params = jax.device_put(tiny.params(0), rules.replicated(mesh))
    return log_likelihoods(tiny.model(), params, prompts, answers, mesh=mesh, **arguments)


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    draw = lambda size: rng.integers(0, tiny.MODEL.eos_token_id, size).astype(np.int32)  # noqa: E731
    return [draw(size) for size in (4, 9, 0, 6)], [draw(size) for size in (5, 1, 3, 0)]


def test_neither_the_batch_nor_the_devices_change_an_estimate(pairs, cpu_devices, monkeypatch):
    prompts, answers = pairs
    seen = []
    together = tiny_likelihoods(prompts, answers, cpu_devices[:1], progress=seen.append)
    assert sum(seen) == len(answers)
    assert together[3] == 0.0  # nothing to predict
    monkeypatch.setattr(likelihood, "_AT_ONCE", 8)  # answers that go on in the next chunk
    np.testing.assert_allclose(tiny_likelihoods(prompts[::-1], answers[::-1], cpu_devices)[::-1], together, rtol=1e-5)
    np.testing.assert_allclose(tiny_likelihoods(prompts[:1], answers[:1], cpu_devices[:1]), together[:1], rtol=1e-5)
    assert (tiny_likelihoods(prompts, answers, cpu_devices[:1], seed=1)[[0, 2]] != together[[0, 2]]).all()


def test_estimates_average_to_the_elbo(pairs, cpu_devices):
    """A thousand draws against all masks; within 4 standard errors, which chance exceeds once in 16,000 times."""
    prompt, answer = pairs[0][0], pairs[1][0]
    masks = all_masks(len(answer))
    whole = np.concatenate([prompt, answer])
    hidden = np.concatenate([np.zeros((len(masks), len(prompt)), bool), masks], axis=1)
    tokens = jnp.asarray(np.where(hidden, tiny.MODEL.mask_token_id, whole))
    logits = tiny.model().apply({"params": tiny.params(0)}, tokens, method="logits")
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)[:, np.arange(len(whole)), whole]
    sums = (log_probs * hidden).sum(axis=1)
    exact = float((exact_weights(masks) * sums).sum())
    # One mask per batch: draws are independent, and their variance is that of L / l * sum.
    weight, term = exact_weights(masks) * masks.sum(axis=1) / len(answer), len(answer) / masks.sum(axis=1) * sums
    deviation = np.sqrt((weight * term**2).sum() - exact**2)
    draws = 1000
    (found,) = tiny_likelihoods([prompt], [answer], cpu_devices[:1], draws=draws, batch=1)
    assert abs(found - exact) < 4 * deviation / np.sqrt(draws)


def test_an_answer_of_one_token_takes_one_mask(pairs, cpu_devices, monkeypatch):
    sizes = []
    pack = likelihood.pack
    monkeypatch.setattr(
        likelihood, "pack", lambda segments, layout: sizes.append(len(segments)) or pack(segments, layout)
    )
    tiny_likelihoods(*pairs, cpu_devices[:1])
    assert sizes == [8 + 1 + 8]


def test_refuses_a_batch_that_does_not_divide(pairs, cpu_devices):
    with pytest.raises(ValueError, match="expected a divisor of the 8 draws, got 3"):
        tiny_likelihoods(*pairs, cpu_devices[:1], batch=3)


def test_the_sum_is_rounded_half_to_even():
    np.testing.assert_array_equal(spread_counts(1, 2, 3), [1, 2])  # 1, 2.5 -> 2; 1 + round(1.5) would be 3
    np.testing.assert_array_equal(spread_counts(2, 2, 3), [2, 1])  # 2, 3.5 -> 4, around the end
    np.testing.assert_array_equal(spread_counts(7, 4, 8), [7, 1, 3, 5])
    np.testing.assert_array_equal(spread_counts(3, 1, 3), [3])


@pytest.mark.parametrize(("first", "length", "batch"), [(0, 3, 1), (4, 3, 1), (1, 3, 0)])
def test_refuses_arguments_out_of_range(first, length, batch):
    with pytest.raises(ValueError, match="expected 1 <= first"):
        spread_counts(first, batch, length)
