"""Dream-7B, Dream-Coder-7B and DiffuCoder-7B (docs/method.md 10).

Queries, keys and values have biases, and the network's output at a position is about the token after it: it was made
from Qwen2.5, which predicts the next token.
"""

from collections.abc import Mapping
from typing import Any

from elbo_kto_jax.models import llama_style
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.llama_style import LAYER
from elbo_kto_jax.models.registry import Architecture
from elbo_kto_jax.models.table import Table, bias


def parameters(c: ModelConfig) -> Table:
    """The table of parameters."""
    n, heads, kv_heads = c.n_layers, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return llama_style.parameters(
        c,
        bias("blocks/q_proj", LAYER + "self_attn.q_proj", layers=n, heads=heads),
        bias("blocks/k_proj", LAYER + "self_attn.k_proj", layers=n, kv_heads=kv_heads),
        bias("blocks/v_proj", LAYER + "self_attn.v_proj", layers=n, kv_heads=kv_heads),
    )


def read(mapping: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that the parsed config.json at `where` describes; see `llama_style.read`."""
    return llama_style.read(mapping, where, architecture="dream", family="Dream", tied=False, predicts_next=True)


def published(c: ModelConfig) -> dict[str, Any]:
    """Dream-v0-Instruct-7B's config.json with these dimensions."""
    off = {"attention_dropout": 0.0, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False}
    return llama_style.published(c, "Dream", "DreamModel", **off, use_mrope=False, max_window_layers=c.n_layers)


# As published (Dream-org/Dream-v0-Instruct-7B, config.json).
_7B = ModelConfig(
    architecture="dream",
    d_model=3584,
    n_layers=28,
    n_heads=28,
    n_kv_heads=4,
    head_dim=128,
    mlp_hidden_size=18944,
    embedding_size=152064,
    vocab_size=152064,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    max_sequence_length=131072,
    tied_head=False,
    predicts_next=True,
    mask_token_id=151666,
    eos_token_id=151643,
    pad_token_id=151643,
)
ARCHITECTURE = Architecture(
    name="dream",
    model_type="Dream",
    classes=("DreamModel",),
    example="Dream-v0-7B, Dream-Coder-7B, DiffuCoder-7B",
    read=read,
    parameters=parameters,
    published=published,
    sizes={"7b": _7B},
    mask_ids={152064: 151666},
    recipe="dream_kto_mix",
)
