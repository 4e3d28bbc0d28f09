"""A random model small enough for every test, random examples for it, and the method written down plainly."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elbo_kto_jax.data.examples import Examples
from elbo_kto_jax.data.packing import Layout
from elbo_kto_jax.diffusion.masks import draw_masks
from elbo_kto_jax.models.network import MaskPredictor, abstract_params
from elbo_kto_jax.models.registry import read_config
from elbo_kto_jax.runtime import config
from tests.published import CONFIG

MODEL = read_config(CONFIG, "tests")  # n_kv_heads < n_heads; every dimension divides over 8 devices
LENGTH = 32  # tokens of a row
KTO = config.Objective("elbo_kto", 0.1, 1.33, 0.75, "global_mean", 0.0)
DPO = config.Objective("elbo_dpo", 0.3, 1.0, 1.0, "zero", 0.0)
SFT = config.Objective("sft", 0.1, 1.0, 1.0, "global_mean", 0.0)


def model(dtype: str = "float32", remat: str = "none") -> MaskPredictor:
    return MaskPredictor(MODEL, jnp.dtype(dtype), jnp.float32, remat)


def params(seed: int) -> dict:
    """Random parameters at which every part of the network matters: matrices of gain 1, norms around 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        noise = rng.normal(size=shape.shape)
        is_norm, is_embedding = path[-1].key == "scale", path[-1].key == "embedding"
        value = 1 + 0.2 * noise if is_norm else noise if is_embedding else noise / np.sqrt(shape.shape[-2])
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(MaskPredictor(MODEL)))


def examples(num: int, seed: int = 0, max_length: int = LENGTH) -> Examples:
    """Random token sequences of random lengths, both labels among them."""
    rng = np.random.default_rng(seed)
    prompt, completion = rng.integers(1, max_length // 2, num), rng.integers(1, max_length // 2, num)
    offsets = np.cumsum([0, *(prompt + completion)])
    return Examples(
        tokens=rng.integers(0, MODEL.eos_token_id, offsets[-1]).astype(np.int32),
        offsets=offsets.astype(np.int64),
        prompt_length=prompt.astype(np.int32),
        completion_length=completion.astype(np.int32),
        is_desirable=np.arange(num) % 3 > 0,
        ids=[f"example {i}" for i in range(num)],
        id_words=rng.integers(0, 2**32, (num, 2), np.uint32),
        report="",
    )


def layout(rows: int, packed: bool = True, length: int = LENGTH) -> Layout:
    return Layout(rows, length, MODEL.mask_token_id, MODEL.pad_token_id, packed)


def plain_estimates(
    params: dict, examples: Examples, indices: Sequence[int], estimator: config.Estimator, *, seed: int, epoch: int = 0
) -> jax.Array:
    """B of every draw [n, k] by docs/method.md 1: each draw alone, with none of the code under test."""
    inputs, targets, hidden, weights = [], [], [], []
    for i in map(int, indices):
        start, length = int(examples.prompt_length[i]), int(examples.completion_length[i])
        draws = draw_masks(
            estimator.scheme,
            seed=seed,
            id_words=examples.id_words[i],
            epoch=epoch,
            draws=estimator.draws,
            length=length,
        )
        for mask, weight in zip(draws.mask, draws.weight, strict=True):
            tokens, where = np.full(LENGTH, MODEL.pad_token_id, np.int32), np.zeros(LENGTH, bool)
            tokens[: start + length] = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]
            where[start : start + length] = mask
            inputs.append(np.where(where, MODEL.mask_token_id, tokens))
            targets.append(tokens)
            hidden.append(where)
            weights.append(weight)
    is_padding = np.array(targets) == MODEL.pad_token_id
    logits = model().apply(
        {"params": params}, jnp.array(inputs), segment_ids=jnp.array(1 - is_padding), method="logits"
    )
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.array(targets)[..., None], axis=-1)[..., 0]
    estimates = jnp.array(weights) * jnp.sum(jnp.where(np.array(hidden), log_probs, 0.0), axis=1)
    return estimates.reshape(len(indices), estimator.draws)
