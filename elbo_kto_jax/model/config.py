"""The architecture, read from the published config.json of a LLaDA checkpoint (docs/method.md 4).

Every key of that file is either used, known to have no effect on what we compute, or refused by its name: a feature
that is switched on and not implemented here is never ignored. So is a dimension that no network has: nothing is
allocated or looped over that a number in a file alone asks for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from elbo_kto_jax.errors import UserError, shown


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
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # Compared before it is converted: an integer of 400 digits is no float.
            if not is_number or not 0 <= value <= _LARGEST[key] or value != kind(value):
                raise UserError(
                    f"{where}: `{key}`: expected a positive {kind.__name__} of at most {_LARGEST[key]:g}, "
                    f"got {shown(value)}"
                )
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


# Bounds of what may be asked for: several times what the largest published models of any kind have.
_LARGEST = {
    "d_model": 2**18,
    "n_layers": 2**12,
    "n_heads": 2**14,
    "n_kv_heads": 2**14,
    "mlp_hidden_size": 2**20,
    "mlp_ratio": 2**10,
    "embedding_size": 2**24,
    "vocab_size": 2**24,
    "rope_theta": 1e15,
    "rms_norm_eps": 1.0,
    "max_sequence_length": 2**31 - 1,  # positions are int32
    "mask_token_id": 2**24,
    "eos_token_id": 2**24,
    "pad_token_id": 2**24,
}
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
# Keys without influence on the function that is computed (initialisation, storage, bookkeeping), or read above.
_IRRELEVANT = {
    *"""alibi_bias_max architectures attention_layer_norm_with_affine auto_map dtype d_model embedding_size eos_token_id
    flash_attention init_cutoff_factor init_device init_fn init_std mask_token_id max_sequence_length mlp_hidden_size
    mlp_ratio multi_query_attention n_heads n_kv_heads n_layers pad_token_id precision rms_norm_eps rope_theta
    torch_dtype transformers_version use_cache vocab_size return_dict bos_token_id tie_word_embeddings
    use_return_dict""".split()  # noqa: SIM905
}
# What transformers (4 and 5), and tools around it, write into every config.json: labels of classifiers, what a forward
# pass returns, defaults of `generate`, names and versions. None of it changes the logits of a mask predictor.
_BOOKKEEPING = {
    *"""attn_implementation bad_words_ids base_model_name_or_path base_model_pp_plan base_model_tp_plan
    begin_suppress_tokens chunk_size_feed_forward cls_token_id custom_pipelines decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range
    label2id length_penalty max_length max_new_tokens min_length model_max_length no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores prefix problem_type processor_class remove_invalid_values
    repetition_penalty return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tokenizer_class top_k top_p torchscript transformers.js_config typical_p unk_token_id
    use_bfloat16""".split()  # noqa: SIM905
}
# _attn_implementation, _commit_hash, _name_or_path ... are private to transformers; unsloth_version, unsloth_fixed.
_BOOKKEEPING_PREFIXES = ("_", "unsloth_")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


def _refuse_unsupported(mapping: Mapping[str, Any], where: str) -> None:
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: expected a JSON object with the keys of a LLaDA config.json")
    _refuse_experts(mapping, where)
    if mapping.get("model_type") != "llada":
        raise UserError(f"{where}: `model_type`: expected 'llada', got {shown(mapping.get('model_type'))}")
    for key, allowed in _REQUIRED.items():
        value = mapping.get(key, _CLASS_DEFAULTS.get(key, allowed[0]))
        if value not in allowed or (isinstance(value, bool) != isinstance(allowed[0], bool)):
            raise UserError(
                f"{where}: `{key}`: {shown(value)} is not implemented; only {allowed[0]!r} is"
                if key in mapping
                else f"{where}: `{key}` is missing, which means {value!r} and is not implemented; only {allowed[0]!r} "
                "is; is this the config.json of a LLaDA checkpoint?"
            )
    known = _REQUIRED.keys() | _IRRELEVANT | _BOOKKEEPING
    for key, value in mapping.items():
        is_known = key in known or key.startswith(_BOOKKEEPING_PREFIXES)
        if not is_known and value not in (None, False, 0, "", [], {}):
            raise UserError(
                f"{where}: `{shown(key)[1:-1]}`: {shown(value)} switches on something that is not known here; "
                "remove the key if it changes nothing"
            )
    if mapping.get("tie_word_embeddings"):
        raise UserError(f"{where}: `tie_word_embeddings`: True is not implemented; the output head must be untied")


def _refuse_experts(mapping: Mapping[str, Any], where: str) -> None:
    """Says what a LLaDA-MoE is: its model_type may be 'llada' too, and its other keys are those of another class."""
    architectures = mapping.get("architectures")
    classes = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    kind = mapping["model_type"] if isinstance(mapping.get("model_type"), str) else ""
    if not any("llada" in name.lower() for name in (kind, *classes)):
        return
    found = [key for key in _EXPERTS if mapping.get(key)]
    found += ["architectures"] if any("moe" in name.lower() for name in classes) else []
    found += ["model_type"] if "moe" in kind.lower() else []
    if found:
        raise UserError(
            f"{where}: `{found[0]}`: {shown(mapping[found[0]])}: this is LLaDA-MoE, a mixture of experts, which is "
            "not supported; choose a LLaDA with dense layers, such as LLaDA-8B"
        )
