"""What models with the config keys and tensor names of transformers' Llama classes have in common.

iLLaDA, Dream and A2D-Qwen3 differ from LLaDA in names, and from one another in few rows and switches; each file says
which.
"""

from collections.abc import Mapping
from typing import Any

from elbo_kto_jax.models.config import ModelConfig, Reader
from elbo_kto_jax.models.table import Parameter, Table, embedding, kernel, scale, table
from elbo_kto_jax.runtime.errors import UserError, shown

NAMES = {  # our name of a number -> its key in config.json
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "embedding_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
}
LAYER = "model.layers.{}."
# What each feature key must say. Windows are read by `_refuse_windows`.
_REQUIRED = {
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "embd_pdrop": (0,),
    "hidden_act": ("silu",),
    "layer_norm_eps": (None,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
    "resid_pdrop": (0,),
    "rope_scaling": (None,),
    "use_mrope": (False,),
}
_KNOWN = {
    *"""eos_token_id head_dim layer_types mask_token_id max_window_layers model_type pad_token_id rms_norm_eps
    rope_parameters rope_theta sliding_window tie_word_embeddings use_sliding_window""".split()  # noqa: SIM905
}


def parameters(c: ModelConfig, *more: Parameter) -> Table:
    """The table of parameters: those that all have, and `more`."""
    n, d, v, mlp = c.n_layers, c.d_model, c.embedding_size, c.mlp_hidden_size
    heads, kv_heads = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    # A folder of a tied model may hold the head as well; published tools then take the embedding.
    head = () if c.tied_head else (kernel("head", "lm_head", model=d, vocabulary=v),)
    duplicate = "lm_head.weight" if c.tied_head else None
    return table(
        embedding("wte", "model.embed_tokens", duplicate, vocabulary=v, model=d),
        scale("blocks/attn_norm", LAYER + "input_layernorm", layers=n, norm=d),
        kernel("blocks/q_proj", LAYER + "self_attn.q_proj", layers=n, model=d, heads=heads),
        kernel("blocks/k_proj", LAYER + "self_attn.k_proj", layers=n, model=d, kv_heads=kv_heads),
        kernel("blocks/v_proj", LAYER + "self_attn.v_proj", layers=n, model=d, kv_heads=kv_heads),
        kernel("blocks/attn_out", LAYER + "self_attn.o_proj", layers=n, heads=heads, model=d),
        scale("blocks/ff_norm", LAYER + "post_attention_layernorm", layers=n, norm=d),
        kernel("blocks/ff_proj", LAYER + "mlp.gate_proj", layers=n, model=d, mlp=mlp),
        kernel("blocks/up_proj", LAYER + "mlp.up_proj", layers=n, model=d, mlp=mlp),
        kernel("blocks/ff_out", LAYER + "mlp.down_proj", layers=n, mlp=mlp, model=d),
        *more,
        scale("ln_f", "model.norm", norm=d),
        *head,
    )


def read(
    mapping: Mapping[str, Any],
    where: str,
    *,
    architecture: str,
    family: str,
    tied: bool,
    predicts_next: bool = False,
    head_dim: int | None = None,
    required: Mapping[str, tuple] | None = None,
) -> ModelConfig:
    """The architecture that the parsed config.json at `where` describes.

    Args:
      architecture: ModelConfig.architecture.
      family: what the models are called, for errors.
      tied: what a missing `tie_word_embeddings` means.
      predicts_next: see ModelConfig.
      head_dim: what a missing `head_dim` means; None: the heads share the model's width, and the key may say no more.
      required: what further keys of this architecture must say, or others than the shared ones; see `Reader.require`.

    Raises:
      UserError: a key is missing or out of range, or switches on a feature that is not implemented.
    """
    reader = Reader(mapping, where, family, NAMES)
    reader.require({**_REQUIRED, **(required or {})}, {}, _KNOWN)
    _refuse_windows(mapping, where)
    is_tied = mapping.get("tie_word_embeddings")
    if is_tied not in (None, True, False) or (is_tied is not None and not isinstance(is_tied, bool)):
        raise UserError(f"{where}: `tie_word_embeddings`: expected true or false, got {shown(is_tied)}")
    d_model, n_heads = reader.positive("d_model"), reader.positive("n_heads")
    if head_dim is not None:
        head_dim = reader.positive("head_dim", default=head_dim)
    else:
        head_dim = _shared_head_dim(reader, d_model, n_heads)
    vocab_size = reader.positive("embedding_size")
    return reader.checked(
        ModelConfig(
            architecture=architecture,
            d_model=d_model,
            n_layers=reader.positive("n_layers"),
            n_heads=n_heads,
            n_kv_heads=reader.positive("n_kv_heads"),
            head_dim=head_dim,
            mlp_hidden_size=reader.positive("mlp_hidden_size"),
            embedding_size=vocab_size,
            vocab_size=vocab_size,
            rope_theta=_rope_theta(reader),
            rms_norm_eps=reader.number("rms_norm_eps", float),
            max_sequence_length=reader.number("max_sequence_length"),
            tied_head=tied if is_tied is None else is_tied,
            predicts_next=predicts_next,
            mask_token_id=reader.token_id("mask_token_id"),
            eos_token_id=reader.token_id("eos_token_id"),
            pad_token_id=reader.token_id("pad_token_id"),
        )
    )


def _shared_head_dim(reader: Reader, d_model: int, n_heads: int) -> int:
    """The size of a head where the heads share the model's width; the key may say no other."""
    head_dim, said = reader.split_evenly(d_model, n_heads), reader.mapping.get("head_dim")
    if said not in (None, head_dim):
        raise UserError(
            f"{reader.where}: `head_dim`: {shown(said)} is not implemented; {reader.family} splits hidden_size "
            f"{d_model} into {n_heads} heads of {head_dim}"
        )
    return head_dim


def published(c: ModelConfig, model_type: str, model_class: str, **more: Any) -> dict[str, Any]:
    """A config.json that `read` understands, with the keys of `more` beside those that all have."""
    numbers = {NAMES.get(name, name): getattr(c, name) for name in NAMES}
    ids = ("mask_token_id", "eos_token_id", "pad_token_id")
    return {
        "model_type": model_type,
        "architectures": [model_class],
        "hidden_act": "silu",
        **numbers,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tied_head,
        **{name: getattr(c, name) for name in ids if getattr(c, name) is not None},
        **more,
    }


def _rope_theta(reader: Reader) -> float:
    """transformers 5 writes it among the `rope_parameters`, which may ask for another rotation."""
    inner = reader.mapping.get("rope_parameters")
    if inner is None:
        return reader.positive("rope_theta", float)
    is_plain = isinstance(inner, Mapping) and inner.keys() <= {"rope_type", "rope_theta"}
    if not is_plain or inner.get("rope_type", "default") != "default":
        raise UserError(
            f"{reader.where}: `rope_parameters`: {shown(inner)} is not implemented; only rope_type 'default' is"
        )
    return Reader({**reader.mapping, **inner}, reader.where, reader.family, reader.names).positive("rope_theta", float)


def _refuse_windows(mapping: Mapping[str, Any], where: str) -> None:
    """Attention must reach over the whole sequence in every layer; a window that is switched off changes nothing."""
    window = mapping.get("sliding_window")
    switch = mapping.get("use_sliding_window", None if window is None else True)
    if switch not in (None, False):
        key = "use_sliding_window" if "use_sliding_window" in mapping else "sliding_window"
        raise UserError(f"{where}: `{key}`: {shown(mapping[key])} is not implemented; attention has no window")
    kinds = mapping.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise UserError(f"{where}: `layer_types`: {shown(kinds)} is not implemented; only 'full_attention' is")
