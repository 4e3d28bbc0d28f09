"""models/llada.py against the golden logits and a naive model, and models/config.py against what it must refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elbo_kto_jax.models.layers import CACHE
from elbo_kto_jax.models.network import REMAT_POLICIES, MaskPredictor
from elbo_kto_jax.models.registry import read_config
from elbo_kto_jax.runtime.errors import UserError
from tests import tiny
from tests.published import CONFIG


def logits(params, tokens, positions=None, segment_ids=None, model=None):
    return (model or tiny.model()).apply(
        {"params": params}, jnp.asarray(tokens), positions, segment_ids, method="logits"
    )


def random_tokens(*shape):
    return np.random.default_rng(0).integers(0, tiny.MODEL.embedding_size, shape)


@pytest.mark.parametrize("name", ["logits.0", "logits.1", "logits.2", "logits.padded"])
def test_golden_logits(golden, name):
    tokens = golden.arrays[f"{name}.input_ids"][None]
    found = logits(golden.policy, tokens, model=MaskPredictor(golden.config))
    np.testing.assert_allclose(found[0], golden.arrays[name], atol=1e-4, rtol=0)


def naive_logits(params, tokens):
    """docs/method.md 4 in float64, one sequence, one head at a time."""
    cfg, p = tiny.MODEL, jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + cfg.rms_norm_eps) * scale

    def rotate(x):
        half = cfg.head_dim // 2
        angle = np.outer(np.arange(len(x)), cfg.rope_theta ** (-2 * np.arange(half) / cfg.head_dim))
        return np.concatenate(
            [
                x[:, :half] * np.cos(angle) - x[:, half:] * np.sin(angle),
                x[:, half:] * np.cos(angle) + x[:, :half] * np.sin(angle),
            ],
            axis=1,
        )

    x = p["wte"]["embedding"][tokens]
    for i in range(cfg.n_layers):
        layer = jax.tree.map(lambda leaf: leaf[i], p["blocks"])  # noqa: B023
        h = norm(x, layer["attn_norm"]["scale"])
        q, k, v = (h @ layer[name]["kernel"] for name in ("q_proj", "k_proj", "v_proj"))
        heads = []
        for head in range(cfg.n_heads):
            mine = slice(head * cfg.head_dim, (head + 1) * cfg.head_dim)
            shared = head // (cfg.n_heads // cfg.n_kv_heads)
            theirs = slice(shared * cfg.head_dim, (shared + 1) * cfg.head_dim)
            weights = np.exp(rotate(q[:, mine]) @ rotate(k[:, theirs]).T / np.sqrt(cfg.head_dim))
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, theirs])
        x = x + np.concatenate(heads, axis=1) @ layer["attn_out"]["kernel"]
        h = norm(x, layer["ff_norm"]["scale"])
        gate = h @ layer["ff_proj"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up_proj"]["kernel"])) @ layer["ff_out"]["kernel"]
    return norm(x, p["ln_f"]["scale"]) @ p["head"]["kernel"]


def test_fewer_key_value_heads_than_heads():
    assert tiny.MODEL.n_kv_heads < tiny.MODEL.n_heads
    params, tokens = tiny.params(0), random_tokens(2, 13)
    found = logits(params, tokens)
    for row, expected in zip(found, tokens, strict=True):
        np.testing.assert_allclose(row, naive_logits(params, expected), rtol=1e-4, atol=1e-4)


def test_packed_segments_are_each_alone_and_padding_is_invisible():
    params, tokens, lengths = tiny.params(0), random_tokens(20), (7, 1, 9)
    segment_ids = np.repeat([1, 2, 3, 0], [*lengths, 3])
    positions = np.concatenate([np.arange(n) for n in (*lengths, 3)])
    packed = logits(params, tokens[None], jnp.asarray(positions)[None], jnp.asarray(segment_ids)[None])[0]
    for g in (1, 2, 3):
        alone = logits(params, tokens[None, segment_ids == g])[0]
        np.testing.assert_allclose(packed[segment_ids == g], alone, rtol=1e-5, atol=1e-5)


def test_remat_changes_no_gradient():
    params, tokens = tiny.params(0), random_tokens(1, 9)
    gradients = {
        name: jax.jit(
            jax.grad(lambda p, name=name: jnp.sum(jnp.tanh(logits(p, tokens, model=tiny.model(remat=name)))))
        )(params)
        for name in REMAT_POLICIES
    }
    for name in REMAT_POLICIES:
        for found, expected in zip(jax.tree.leaves(gradients[name]), jax.tree.leaves(gradients["none"]), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("alibi", True),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("layer_norm_type", "low_precision"),
        ("block_type", "sequential"),
        ("activation_type", "gelu"),
        ("weight_tying", True),
        ("tie_word_embeddings", True),
        ("scale_logits", True),
        ("input_emb_norm", True),
        ("attention_layer_norm", True),
        ("rope", False),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("clip_qkv", 8.0),
        ("attention_dropout", 0.1),
        ("quantization_config", {"bits": 4}),
        ("sliding_window", 512),
        ("n_kv_heads", 3),
        ("n_heads", 3),
        ("d_model", 0),
        ("n_layers", -1),
        ("n_layers", float("nan")),
        ("n_layers", float("inf")),
        ("rope_theta", float("inf")),
        ("rms_norm_eps", "small"),
        ("embedding_size", 39),
        ("mask_token_id", 48),
        ("vocab_size", 40.5),
    ],
)
def test_config_refuses(key, value):
    with pytest.raises(UserError, match=f"^here: .*`{key}`"):
        read_config(CONFIG | {key: value}, "here")


@pytest.mark.parametrize(
    "key",
    """d_model n_heads n_layers vocab_size rope_theta rms_norm_eps max_sequence_length mask_token_id eos_token_id
    pad_token_id model_type block_type layer_norm_type include_bias weight_tying rope""".split(),  # noqa: SIM905
)
def test_config_names_a_missing_key(key):
    with pytest.raises(UserError, match=f"^here: `{key}`"):
        read_config({name: value for name, value in CONFIG.items() if name != key}, "here")


def test_kept_keys_and_values_stand_in_for_the_tokens_that_left_them():
    """A window of a row, with what the whole row left of the rest: the same hidden states, and nothing is left."""
    model, params = tiny.model(), tiny.params(0)
    tokens, positions = jnp.asarray(random_tokens(2, 12)), jnp.broadcast_to(jnp.arange(12), (2, 12))
    whole, left = model.apply({"params": params}, tokens, positions, mutable=[CACHE])
    assert jax.tree.leaves(left)[0].shape[:3] == (tiny.MODEL.n_layers, 2, 12)
    window, column = slice(3, 8), jnp.arange(12)
    kept = jnp.where((column >= 3) & (column < 8), -1, 1)
    key_segment_ids = jnp.broadcast_to(jnp.concatenate([kept, jnp.ones(5, jnp.int32)]), (2, 17))
    variables = {"params": params, **left}
    found = model.apply(variables, tokens[:, window], positions[:, window], jnp.ones((2, 5), int), key_segment_ids)
    np.testing.assert_allclose(found, whole[:, window], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole, model.apply({"params": params}, tokens, positions))
