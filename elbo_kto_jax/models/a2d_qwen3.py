"""A2D-Qwen3: Qwen3 made into a masked diffusion model, such as Tiny-A2D's 0.6B (docs/method.md 10).

An RMSNorm over each head of queries and keys before they are rotated, heads of a size of their own, and the embedding
is the output head.
"""

from collections.abc import Mapping
from typing import Any

from elbo_kto_jax.models import llama_style
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.llama_style import LAYER
from elbo_kto_jax.models.registry import Architecture
from elbo_kto_jax.models.table import Table, scale

_HEAD_DIM = 128  # of the published class, where config.json does not say it


def parameters(c: ModelConfig) -> Table:
    """The table of parameters."""
    return llama_style.parameters(
        c,
        scale("blocks/q_norm", LAYER + "self_attn.q_norm", layers=c.n_layers, norm=c.head_dim),
        scale("blocks/k_norm", LAYER + "self_attn.k_norm", layers=c.n_layers, norm=c.head_dim),
    )


def read(mapping: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that the parsed config.json at `where` describes; see `llama_style.read`."""
    return llama_style.read(
        mapping, where, architecture="a2d_qwen3", family="A2D-Qwen3", tied=False, head_dim=_HEAD_DIM
    )


def published(c: ModelConfig) -> dict[str, Any]:
    """Tiny-A2D's config.json with these dimensions."""
    off = {"attention_bias": False, "attention_dropout": 0.0, "rope_scaling": None, "use_sliding_window": False}
    return llama_style.published(c, "a2d-qwen3", "A2DQwen3LMHeadModel", head_dim=c.head_dim, **off)


# Qwen3-0.6B's.
_600M = ModelConfig(
    architecture="a2d_qwen3",
    d_model=1024,
    n_layers=28,
    n_heads=16,
    n_kv_heads=8,
    head_dim=128,
    mlp_hidden_size=3072,
    embedding_size=151936,
    vocab_size=151936,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    max_sequence_length=40960,
    tied_head=True,
    predicts_next=False,
    mask_token_id=None,
    eos_token_id=151645,
    pad_token_id=151643,
)
ARCHITECTURE = Architecture(
    name="a2d_qwen3",
    model_type="a2d-qwen3",
    classes=("A2DQwen3LMHeadModel",),
    example="Qwen3-0.6B as a mask predictor",
    read=read,
    parameters=parameters,
    published=published,
    sizes={"0.6b": _600M},
)
