"""evaluation/likelihood.py against the golden likelihoods (METHOD 7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.evaluation.likelihood import stratified_counts
from elbo_kto_jax.model.llada import LLaDA


def test_golden_counts(golden):
    arrays, described = golden.arrays, golden.described["likelihood"]
    for j, case in enumerate(described):
        counts, length, batch = arrays[f"likelihood.{j}.l"], len(arrays[f"likelihood.{j}.answer"]), case["batch_size"]
        expected = [stratified_counts(int(counts[at]), length, batch) for at in range(0, len(counts), batch)]
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
        logits = LLaDA(golden.config).apply({"params": golden.policy}, jnp.asarray(tokens), method="logits")
        log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)[:, np.arange(len(whole)), whole]
        value = np.mean(len(answer) / counts * (log_probs * mask).sum(axis=1))
        np.testing.assert_allclose(value, arrays[f"likelihood.{j}.value"], atol=1e-3)


def test_the_sum_is_rounded_half_to_even():
    np.testing.assert_array_equal(stratified_counts(1, 3, 2), [1, 2])  # 1, 2.5 -> 2; 1 + round(1.5) would be 3
    np.testing.assert_array_equal(stratified_counts(2, 3, 2), [2, 1])  # 2, 3.5 -> 4, around the end
    np.testing.assert_array_equal(stratified_counts(7, 8, 4), [7, 1, 3, 5])
    np.testing.assert_array_equal(stratified_counts(3, 3, 1), [3])


@pytest.mark.parametrize(("first", "length", "batch"), [(0, 3, 1), (4, 3, 1), (1, 3, 0)])
def test_refuses_arguments_out_of_range(first, length, batch):
    with pytest.raises(ValueError, match="expected 1 <= first"):
        stratified_counts(first, length, batch)
