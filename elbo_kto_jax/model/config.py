"""The architecture, read from the published config.json of a LLaDA checkpoint (METHOD 4).

Every key of that file is either used, known to have no effect on what we compute, or refused by its name: a feature
that is switched on and not implemented here is never ignored.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from elbo_kto_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Dimensions and constants of a LLaDA mask predictor."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    embedding_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    max_sequence_length: int
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any], where: str) -> "ModelConfig":
        """The architecture that `mapping`, the parsed config.json at `where`, describes.

        Raises:
          UserError: a key is missing or out of range, or switches on a feature that is not implemented.
        """
        _refuse_unsupported(mapping, where)

        def positive(key: str, kind=int, default=None):
            value = mapping.get(key, default)
            if value is None:
                raise UserError(f"{where}: `{key}` is missing; is this the config.json of a LLaDA checkpoint?")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < 0 or value != kind(value):
                raise UserError(f"{where}: `{key}`: expected a positive {kind.__name__}, got {value!r}")
            return kind(value)

        d_model, n_heads = positive("d_model"), positive("n_heads")
        multi_query = mapping.get("multi_query_attention")
        n_kv_heads = positive("n_kv_heads", default=1 if multi_query else n_heads)
        vocab_size = positive("vocab_size")
        config = cls(
            d_model=d_model,
            n_layers=positive("n_layers"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            mlp_hidden_size=positive("mlp_hidden_size", default=positive("mlp_ratio", default=4) * d_model),
            embedding_size=positive("embedding_size", default=vocab_size),
            vocab_size=vocab_size,
            rope_theta=positive("rope_theta", float),
            rms_norm_eps=positive("rms_norm_eps", float),
            max_sequence_length=positive("max_sequence_length"),
            mask_token_id=positive("mask_token_id"),
            eos_token_id=positive("eos_token_id"),
            pad_token_id=positive("pad_token_id"),
        )
        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "rope_theta"):
            if not getattr(config, name):
                raise UserError(f"{where}: `{name}`: expected a positive number, got 0")
        if d_model % n_heads or config.head_dim % 2:
            raise UserError(f"{where}: `n_heads`: {n_heads} heads must split d_model {d_model} into an even head_dim")
        if n_heads % n_kv_heads:
            raise UserError(f"{where}: `n_kv_heads`: {n_kv_heads} does not divide n_heads {n_heads}")
        if config.embedding_size < vocab_size:
            raise UserError(f"{where}: `embedding_size`: {config.embedding_size} is less than vocab_size {vocab_size}")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            if getattr(config, name) >= config.embedding_size:
                raise UserError(f"{where}: `{name}`: {getattr(config, name)} is outside the embedding")
        return config


# What each feature key must say for the network to be the one of METHOD 4. None: any value that means "off".
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
# Keys without influence on the function that is computed (initialisation, storage, bookkeeping), or read above.
_IRRELEVANT = {
    *"""alibi_bias_max architectures attention_layer_norm_with_affine auto_map dtype d_model embedding_size eos_token_id
    flash_attention init_cutoff_factor init_device init_fn init_std mask_token_id max_sequence_length mlp_hidden_size
    mlp_ratio multi_query_attention n_heads n_kv_heads n_layers pad_token_id precision rms_norm_eps rope_theta
    torch_dtype transformers_version use_cache vocab_size _name_or_path return_dict bos_token_id tie_word_embeddings
    use_return_dict""".split()  # noqa: SIM905
}


def _refuse_unsupported(mapping: Mapping[str, Any], where: str) -> None:
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: expected a JSON object with the keys of a LLaDA config.json")
    if mapping.get("model_type") != "llada":
        raise UserError(f"{where}: `model_type`: expected 'llada', got {mapping.get('model_type')!r}")
    for key, allowed in _REQUIRED.items():
        value = mapping.get(key, _CLASS_DEFAULTS.get(key, allowed[0]))
        if value not in allowed or (isinstance(value, bool) != isinstance(allowed[0], bool)):
            raise UserError(f"{where}: `{key}`: {value!r} is not implemented; only {allowed[0]!r} is")
    for key, value in mapping.items():
        if key not in _REQUIRED and key not in _IRRELEVANT and value not in (None, False, 0, "", [], {}):
            raise UserError(f"{where}: `{key}`: {value!r} switches on something that is not known here")
    if mapping.get("tie_word_embeddings"):
        raise UserError(f"{where}: `tie_word_embeddings`: True is not implemented; the output head must be untied")
