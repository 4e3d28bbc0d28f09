"""The benchmark's peer against the golden values: what we are compared with computes the authors' numbers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `bench`)")

from tests.peer import torch_elbo_kto as peer  # noqa: E402


@pytest.fixture(scope="module")
def examples(golden):
    arrays = golden.arrays
    found = []
    for i, length in enumerate(arrays["completion_length"][: len(arrays["grads.r"])]):
        start = int(arrays["prompt_length"][i])
        end = start + int(length)
        found.append(
            {
                "tokens": arrays["input_ids"][i][:end],
                "start": start,
                "masks": arrays["mask"][i][:, start:end],
                "weights": length / arrays["l_values"][i],
                "desirable": bool(arrays["label"][i]),
            }
        )
    return found


@pytest.mark.parametrize("mode", ["padded", "unpadded"])
def test_estimates(golden, examples, mode):
    model = peer.LLaDA.load(golden.folder / "policy")
    longest = golden.arrays["input_ids"].shape[1]
    length_of = (lambda _: longest) if mode == "padded" else (lambda x: len(x["tokens"]))
    with torch.no_grad():
        found = [[float(b) for b in peer.elbo_draws(model, x, length_of(x))] for x in examples]
    np.testing.assert_allclose(found, golden.arrays[f"{mode}.B_theta_draws"][: len(examples)], rtol=1e-5)


def test_gradient(golden, examples):
    """Also with activation checkpointing, which must change nothing."""
    arrays, longest = golden.arrays, golden.arrays["input_ids"].shape[1]
    elbo_ref, z0 = golden.elbo("padded", "ref")[: len(examples)], golden.described["grads.z0"]
    for checkpointing in (False, True):
        model = peer.LLaDA.load(golden.folder / "policy")
        model.activation_checkpointing = checkpointing
        loss, rewards = peer.accumulate_gradient(model, examples, lambda _: longest, elbo_ref, z0, beta=0.1)
        np.testing.assert_allclose(loss, golden.described["grads.loss"], atol=2e-5)
        np.testing.assert_allclose(rewards, arrays["grads.r"], atol=3e-3)
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        np.testing.assert_allclose(float(norm), golden.described["grads.global_norm"], rtol=1e-4)
