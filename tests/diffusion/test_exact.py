"""diffusion/exact.py against the golden enumeration, and against the probabilities of the masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.diffusion.exact import MAX_LENGTH, all_masks, exact_weights
from elbo_kto_jax.models.network import MaskPredictor


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_golden_elbo(golden, which):
    arrays = golden.arrays
    prompt, answer = arrays["exact.prompt"], arrays["exact.answer"]
    masks = all_masks(len(answer))
    np.testing.assert_array_equal(masks, arrays["exact.mask"])

    hidden = np.where(masks, golden.config.mask_token_id, answer)
    tokens = np.concatenate([np.broadcast_to(prompt, (len(masks), len(prompt))), hidden], axis=1)
    logits = MaskPredictor(golden.config).apply(
        {"params": getattr(golden, which)}, jnp.asarray(tokens), method="logits"
    )[:, len(prompt) :]
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)[:, np.arange(len(answer)), answer]
    log_probs = np.where(masks, log_probs, 0.0)

    np.testing.assert_allclose(log_probs[masks], arrays[f"exact.{which}.logp"][masks], atol=1e-4)
    elbo = (exact_weights(masks) * log_probs.sum(axis=1)).sum()
    np.testing.assert_allclose(elbo, arrays[f"exact.{which}.elbo"], atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 7, MAX_LENGTH])
def test_every_mask_once_and_every_token_weighs_one(length):
    masks = all_masks(length)
    assert masks.dtype == bool
    assert masks.shape == (2**length - 1, length)
    assert len({row.tobytes() for row in masks}) == len(masks)
    assert masks.any(axis=1).all()
    # A model with log p = a_i, whatever is hidden, has the ELBO sum a_i.
    np.testing.assert_allclose(exact_weights(masks) @ masks, np.ones(length), rtol=1e-12)


@pytest.mark.parametrize("length", [0, MAX_LENGTH + 1])
def test_refuses_other_lengths(length):
    with pytest.raises(ValueError, match=f"got {length}"):
        all_masks(length)


def test_refuses_an_empty_mask():
    with pytest.raises(ValueError, match="at least one"):
        exact_weights(np.zeros((1, 3), bool))
