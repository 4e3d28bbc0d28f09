"""iLLaDA-8B (ML-GSAI, docs/method.md 10): grouped queries, and the embedding is the output head.

Its config.json names no mask token; the README of the published model says 5.
"""

from collections.abc import Mapping
from typing import Any

from elbo_kto_jax.models import llama_style
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.registry import Architecture


def read(mapping: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that the parsed config.json at `where` describes; see `llama_style.read`."""
    return llama_style.read(mapping, where, architecture="illada", family="iLLaDA", tied=True)


def published(c: ModelConfig) -> dict[str, Any]:
    """iLLaDA-8B-Instruct's config.json with these dimensions."""
    off = {"attention_bias": False, "mlp_bias": False, "layer_norm_eps": None, "rope_scaling": None}
    return llama_style.published(c, "illada", "ILLaDAForCausalLM", **off)


# As its authors publish (the model's card, arXiv 2606.25331); rope_theta and rms_norm_eps are LLaDA-8B's, since the
# published config.json was not at hand. A model that is loaded has its own.
_8B = ModelConfig(
    architecture="illada",
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    mlp_hidden_size=14336,
    embedding_size=155136,
    vocab_size=155136,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    max_sequence_length=8192,
    tied_head=True,
    predicts_next=False,
    mask_token_id=5,
    eos_token_id=2,
    pad_token_id=1,
)
ARCHITECTURE = Architecture(
    name="illada",
    model_type="illada",
    classes=("ILLaDAForCausalLM",),
    example="iLLaDA-8B",
    read=read,
    parameters=llama_style.parameters,
    published=published,
    sizes={"8b": _8B},
    mask_ids={155136: 5},
    recipe="illada_kto_mix",
)
