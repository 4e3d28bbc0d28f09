"""The architectures beside LLaDA, small: their config.json, random folders, and their network written down plainly."""

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from elbo_kto_jax.checkpoints import names
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.registry import read_config
from tests.published import DTYPES

_SHARED = {
    "attention_dropout": 0.0,
    "bos_token_id": 36,
    "eos_token_id": 37,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 37,
    "rope_scaling": None,
    "use_cache": True,
    "vocab_size": 48,
}
# As their authors publish them, but for the dimensions; every dimension divides over eight devices.
CONFIGS: dict[str, dict[str, Any]] = {
    "illada": {
        **_SHARED,
        "architectures": ["ILLaDAForCausalLM"],
        "attention_bias": False,
        "auto_map": {"AutoModel": "modeling_illada.ILLaDAForCausalLM"},
        "dtype": "float32",
        "layer_norm_eps": None,
        "mlp_bias": False,
        "model_type": "illada",
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "dream": {
        **_SHARED,
        "_name_or_path": "Dream-org/Dream-v0-Instruct-7B",
        "architectures": ["DreamModel"],
        "attn_implementation": "flash_attention_2",
        "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
        "mask_token_id": 39,
        "max_window_layers": 2,
        "model_type": "Dream",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "a2d_qwen3": {
        **_SHARED,
        "architectures": ["A2DQwen3LMHeadModel"],
        "attention_bias": False,
        "auto_map": {"AutoModel": "modeling_qwen3.A2DQwen3LMHeadModel"},
        "dtype": "float32",
        "head_dim": 8,  # not hidden_size / heads
        "layer_types": ["full_attention"] * 2,
        "max_window_layers": 2,
        "model_type": "a2d-qwen3",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
}
FAMILIES = tuple(CONFIGS)


def config(family: str, **changes: Any) -> ModelConfig:
    """The model of CONFIGS[family] with its special tokens; `changes` are fields of ModelConfig."""
    found = read_config(CONFIGS[family], family)
    return dataclasses.replace(found, **{"mask_token_id": 39, **changes})


def write(
    folder: Path,
    family: str,
    *,
    dtype: str = "float32",
    changes: dict[str, Any] | None = None,
    edit: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a published folder of finite random bits, in one file, and returns its tensors.

    Args:
      changes: of config.json.
      edit: changes the dictionary of tensors before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mapping = copy.deepcopy(CONFIGS[family]) | (changes or {})
    rng, word = np.random.default_rng(0), np.dtype(f"uint{8 * np.dtype(DTYPES[dtype]).itemsize}")
    infinity = np.array(np.inf, DTYPES[dtype]).view(word)
    tensors = {}
    for name, tensor in names.published_tensors(read_config(mapping, "test")).items():
        words = rng.integers(0, np.iinfo(word).max, tensor.shape, word, endpoint=True)
        words[words & infinity == infinity] &= ~infinity
        tensors[name] = words.view(DTYPES[dtype])
        tensors[name][(0,) * len(tensor.shape)] = -0.0
    if edit is not None:
        edit(tensors)
    (folder / "config.json").write_text(json.dumps(mapping, indent=1))
    (folder / "tokenizer.json").write_bytes(b'{"not": "read here"}\n')
    save_file(tensors, folder / "model.safetensors")
    return tensors


class Plain:
    """The network of docs/method.md 4 and 10 in numpy and float64, for one row of tokens, with kept keys and values.

    What is run replaces the kept keys and values of its columns, whatever else has changed since (Fast-dLLM,
    arXiv 2505.22618).
    """

    def __init__(self, config: ModelConfig, params: dict):
        self.config = config
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        self.kept: dict[int, np.ndarray] = {}

    def logits(self, tokens: np.ndarray, columns: Sequence[int] | None = None) -> np.ndarray:
        """float64[s, v]: of what each token is predicted from, at `columns` (all: None) and -inf elsewhere.

        Where the network predicts the next token, the column before the first of `columns` is run as well, with its
        kept keys and values.
        """
        if columns is None:
            self.kept = {}
        renewed = np.arange(len(tokens)) if columns is None else np.asarray(columns)
        shift = int(self.config.predicts_next)
        run = np.arange(max(0, renewed[0] - shift), renewed[-1] + 1)
        raw = np.full((len(tokens), self.config.embedding_size), -np.inf)
        raw[run] = self._run(tokens, run, renewed)
        out = np.full_like(raw, -np.inf)
        out[renewed] = raw[np.maximum(renewed - shift, 0)]  # aligned[i] = logits[i - 1], aligned[0] = logits[0]
        return out

    def _run(self, tokens, run, renewed) -> np.ndarray:
        cfg, p = self.config, self.params
        rows = {path for path, _ in _leaves(p["blocks"])}
        x = p["wte"]["embedding"][tokens[run]]
        for n in range(cfg.n_layers):
            layer = {path: leaf[n] for path, leaf in _leaves(p["blocks"])}

            def linear(name, h, layer=layer):
                return h @ layer[name, "kernel"] + (layer[name, "bias"] if (name, "bias") in rows else 0.0)

            h = self._norm(x, layer["attn_norm", "scale"])
            q, k, v = (linear(f"{name}_proj", h).reshape(len(run), -1, cfg.head_dim) for name in "qkv")
            if ("q_norm", "scale") in rows:
                q, k = self._norm(q, layer["q_norm", "scale"]), self._norm(k, layer["k_norm", "scale"])
            keys, values = self.kept.setdefault(n, np.zeros((2, len(tokens), *k.shape[1:])))
            fresh = np.isin(run, renewed)
            keys[run[fresh]], values[run[fresh]] = self._rotate(k, run)[fresh], v[fresh]
            theirs = np.arange(cfg.n_heads) // (cfg.n_heads // cfg.n_kv_heads)
            scores = np.einsum("qhe,the->hqt", self._rotate(q, run), keys[:, theirs]) / np.sqrt(cfg.head_dim)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed = np.einsum("hqt,the->qhe", weights / weights.sum(axis=-1, keepdims=True), values[:, theirs])
            x = x + linear("attn_out", mixed.reshape(len(run), -1))
            h = self._norm(x, layer["ff_norm", "scale"])
            gate = linear("ff_proj", h)
            x = x + linear("ff_out", gate / (1 + np.exp(-gate)) * linear("up_proj", h))
        head = p["head"]["kernel"] if "head" in p else p["wte"]["embedding"].T
        return self._norm(x, p["ln_f"]["scale"]) @ head

    def _norm(self, x, scale):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.config.rms_norm_eps) * scale

    def _rotate(self, x, columns):
        half = self.config.head_dim // 2
        angle = np.outer(columns, self.config.rope_theta ** (-np.arange(half) / half))[:, None]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
        )


def _leaves(tree: dict) -> list[tuple[tuple[str, ...], Any]]:
    return [(tuple(key.key for key in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
