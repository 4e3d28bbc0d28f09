"""LLaDA-8B and 1.5 (arXiv 2502.09992, docs/method.md 4): no biases, an output head of its own."""

from collections.abc import Mapping
from typing import Any

from elbo_kto_jax.models.config import ModelConfig, Reader
from elbo_kto_jax.models.registry import Architecture
from elbo_kto_jax.models.table import Table, embedding, kernel, scale, table
from elbo_kto_jax.runtime.errors import UserError


def parameters(c: ModelConfig) -> Table:
    """The table of parameters."""
    top, layer = "model.transformer.", "model.transformer.blocks.{}."
    n, d, v, mlp = c.n_layers, c.d_model, c.embedding_size, c.mlp_hidden_size
    heads, kv_heads = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return table(
        embedding("wte", top + "wte", vocabulary=v, model=d),
        scale("blocks/attn_norm", layer + "attn_norm", layers=n, norm=d),
        kernel("blocks/q_proj", layer + "q_proj", layers=n, model=d, heads=heads),
        kernel("blocks/k_proj", layer + "k_proj", layers=n, model=d, kv_heads=kv_heads),
        kernel("blocks/v_proj", layer + "v_proj", layers=n, model=d, kv_heads=kv_heads),
        kernel("blocks/attn_out", layer + "attn_out", layers=n, heads=heads, model=d),
        scale("blocks/ff_norm", layer + "ff_norm", layers=n, norm=d),
        kernel("blocks/ff_proj", layer + "ff_proj", layers=n, model=d, mlp=mlp),
        kernel("blocks/up_proj", layer + "up_proj", layers=n, model=d, mlp=mlp),
        kernel("blocks/ff_out", layer + "ff_out", layers=n, mlp=mlp, model=d),
        scale("ln_f", top + "ln_f", norm=d),
        kernel("head", top + "ff_out", model=d, vocabulary=v),
    )


# What each feature key must say for the network to be the one of docs/method.md 4. None: any value that means "off".
_REQUIRED = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_dropout": (0,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False,),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "embedding_dropout": (0,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "model_type": ("llada",),
    "quantization_config": (None,),
    "residual_dropout": (0,),
    "rope": (True,),
    "rope_full_precision": (True,),
    "rope_scaling": (None,),
    "scale_logits": (False,),
    "weight_tying": (False,),
}
# A missing key has the default of the published LLaDA configuration class; where that default is not the value
# that we need, a config.json without the key describes another network and is refused as well.
_CLASS_DEFAULTS = {
    "activation_type": "swiglu",
    "block_type": "sequential",
    "include_bias": True,
    "layer_norm_type": "default",
    "rope": False,
    "weight_tying": True,
    "attention_dropout": 0.1,
    "embedding_dropout": 0.1,
    "residual_dropout": 0.1,
}
# Keys without influence on the function that is computed (initialisation, storage, bookkeeping), or read below.
_KNOWN = {
    *"""alibi_bias_max attention_layer_norm_with_affine d_model embedding_size eos_token_id flash_attention
    init_cutoff_factor init_device init_fn init_std mask_token_id max_sequence_length mlp_hidden_size mlp_ratio
    multi_query_attention n_heads n_kv_heads n_layers pad_token_id precision rms_norm_eps rope_theta
    tie_word_embeddings vocab_size""".split()  # noqa: SIM905
}


def read(mapping: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that the parsed config.json at `where` describes.

    Raises:
      UserError: a key is missing or out of range, or switches on a feature that is not implemented.
    """
    reader = Reader(mapping, where, "LLaDA")
    reader.require(_REQUIRED, _CLASS_DEFAULTS, _KNOWN)
    if mapping.get("tie_word_embeddings"):
        raise UserError(f"{where}: `tie_word_embeddings`: True is not implemented; the output head must be untied")
    d_model, n_heads = reader.positive("d_model"), reader.positive("n_heads")
    n_kv_heads = reader.positive("n_kv_heads", default=1 if mapping.get("multi_query_attention") else n_heads)
    vocab_size = reader.positive("vocab_size")
    return reader.checked(
        ModelConfig(
            architecture="llada",
            d_model=d_model,
            n_layers=reader.positive("n_layers"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=reader.split_evenly(d_model, n_heads),
            mlp_hidden_size=reader.positive("mlp_hidden_size", default=reader.number("mlp_ratio", default=4) * d_model),
            embedding_size=reader.positive("embedding_size", default=vocab_size),
            vocab_size=vocab_size,
            rope_theta=reader.positive("rope_theta", float),
            rms_norm_eps=reader.number("rms_norm_eps", float),
            max_sequence_length=reader.number("max_sequence_length"),
            tied_head=False,
            predicts_next=False,
            mask_token_id=reader.number("mask_token_id"),
            eos_token_id=reader.number("eos_token_id"),
            pad_token_id=reader.number("pad_token_id"),
        )
    )


def published(c: ModelConfig) -> dict[str, Any]:
    """LLaDA-8B-Instruct's config.json with these dimensions."""
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rms_norm_eps": c.rms_norm_eps,
        "rope": True,
        "rope_theta": c.rope_theta,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "d_model": c.d_model,
        "n_layers": c.n_layers,
        "n_heads": c.n_heads,
        "n_kv_heads": c.n_kv_heads,
        "mlp_hidden_size": c.mlp_hidden_size,
        "max_sequence_length": c.max_sequence_length,
        "embedding_size": c.embedding_size,
        "vocab_size": c.vocab_size,
        "mask_token_id": c.mask_token_id,
        "eos_token_id": c.eos_token_id,
        "pad_token_id": c.pad_token_id,
    }


# As published (GSAI-ML/LLaDA-8B-Instruct, config.json).
_8B = ModelConfig(
    architecture="llada",
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    head_dim=128,
    mlp_hidden_size=12288,
    embedding_size=126464,
    vocab_size=126464,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    max_sequence_length=4096,
    tied_head=False,
    predicts_next=False,
    mask_token_id=126336,
    eos_token_id=126081,
    pad_token_id=126081,
)
ARCHITECTURE = Architecture("llada", "llada", ("LLaDAModelLM",), "LLaDA-8B", read, parameters, published, {"8b": _8B})
