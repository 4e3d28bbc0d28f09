"""What a mask predictor is made of, and how its published config.json is read.

The reader of an architecture (models/llada.py and the others) goes through `Reader`. Every key of a config.json is
either used, known to have no effect on what we compute, or refused by its name: a feature that is switched on and not
implemented here is never ignored. So is a dimension that no network has: nothing is allocated or looped over that a
number in a file alone asks for.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from elbo_kto_jax.runtime.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Dimensions and constants of a mask predictor.

    Attributes:
      architecture: the file of models/ that describes it.
      head_dim: numbers of one head; d_model / n_heads in most models, but not in all.
      embedding_size: rows of the embedding, at least vocab_size.
      tied_head: the output head is the embedding.
      predicts_next: the network's output at position i is about token i + 1 of its segment (docs/method.md 10).
      mask_token_id, eos_token_id, pad_token_id: None where config.json does not say them (data/special.py finds them).
      mask_is_chosen: a user said the mask token, now or when the checkpoint was trained, whatever its files say.
    """

    architecture: str
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_hidden_size: int
    embedding_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    max_sequence_length: int
    tied_head: bool
    predicts_next: bool
    mask_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    mask_is_chosen: bool = False

    @property
    def mask_id(self) -> int:
        """The mask token of a model whose special tokens are known."""
        return self._known("mask_token_id")

    @property
    def eos_id(self) -> int:
        """The end of text of such a model."""
        return self._known("eos_token_id")

    @property
    def pad_id(self) -> int:
        """The padding of such a model."""
        return self._known("pad_token_id")

    def _known(self, name: str) -> int:
        """A token that data/special.py finds.

        Raises:
          ValueError: it has not been asked.
        """
        token = getattr(self, name)
        if token is None:
            raise ValueError(f"{name}: not known; complete the config by `with_special_tokens`")
        return token


# Bounds of what may be asked for: several times what the largest published models of any kind have.
_LARGEST = {
    "d_model": 2**18,
    "n_layers": 2**12,
    "n_heads": 2**14,
    "n_kv_heads": 2**14,
    "head_dim": 2**14,
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
# What transformers (4 and 5), and tools around it, write into every config.json: labels of classifiers, what a forward
# pass returns, defaults of `generate`, names, versions and initialisation. None of it changes the logits.
_BOOKKEEPING = {
    *"""architectures attn_implementation auto_map bad_words_ids base_model_name_or_path base_model_pp_plan
    base_model_tp_plan begin_suppress_tokens bos_token_id chunk_size_feed_forward cls_token_id custom_pipelines
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label initializer_range label2id length_penalty max_length max_new_tokens min_length model_max_length
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores prefix problem_type processor_class
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unk_token_id use_bfloat16 use_cache
    use_return_dict""".split()  # noqa: SIM905
}
# _attn_implementation, _commit_hash, _name_or_path ... are private to transformers; unsloth_version, unsloth_fixed.
_BOOKKEEPING_PREFIXES = ("_", "unsloth_")
OFF: tuple[Any, ...] = (None, False, 0, "", [], {})  # values of an unknown key that switch nothing on


@dataclasses.dataclass(frozen=True)
class Reader:
    """The parsed config.json of a published model.

    Attributes:
      mapping: its keys.
      where: the file, for errors.
      family: what the models are called, for errors.
      names: our name of a number -> its key in this family's files; a number that is not there has our name.
    """

    mapping: Mapping[str, Any]
    where: str
    family: str
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def key(self, name: str) -> str:
        """The key that holds the number which we call `name`."""
        return self.names.get(name, name)

    def number(self, name: str, kind=int, default: Any = None) -> Any:
        """The number which we call `name`, at least 0.

        Raises:
          UserError: it is missing and has no default, or is out of range.
        """
        key, most = self.key(name), _LARGEST[name]
        value = self.mapping.get(key)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.where}: `{key}` is missing; is this the config.json of a {self.family} checkpoint?")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Compared before it is converted: an integer of 400 digits is no float.
        if not is_number or not 0 <= value <= most or value != kind(value):
            raise UserError(
                f"{self.where}: `{key}`: expected a positive {kind.__name__} of at most {most:g}, got {shown(value)}"
            )
        return kind(value)

    def positive(self, name: str, kind=int, default: Any = None) -> Any:
        """The same, more than 0."""
        value = self.number(name, kind, default)
        if not value:
            raise UserError(f"{self.where}: `{self.key(name)}`: expected a positive number, got 0")
        return value

    def token_id(self, name: str) -> int | None:
        """A token id; None where the file does not say it."""
        return None if self.mapping.get(self.key(name)) is None else self.number(name)

    def require(self, required: Mapping[str, tuple], defaults: Mapping[str, Any], known: Collection[str]) -> None:
        """Refuses what the network that is implemented does not have.

        Args:
          required: what each key that switches something must say.
          defaults: what a missing key means to the published class, where that is not the first allowed value.
          known: keys that are read elsewhere, or change nothing.

        Raises:
          UserError: by the first key that says something else, or that nobody knows and that says anything at all.
        """
        for key, allowed in required.items():
            value = self.mapping.get(key, defaults.get(key, allowed[0]))
            if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
                raise UserError(
                    f"{self.where}: `{key}`: {shown(value)} is not implemented; only {allowed[0]!r} is"
                    if key in self.mapping
                    else f"{self.where}: `{key}` is missing, which means {value!r} and is not implemented; only "
                    f"{allowed[0]!r} is; is this the config.json of a {self.family} checkpoint?"
                )
        known = {*required, *known, *self.names.values(), *_BOOKKEEPING}
        for key, value in self.mapping.items():
            is_known = key in known or key.startswith(_BOOKKEEPING_PREFIXES)
            if not is_known and value not in OFF:
                raise UserError(
                    f"{self.where}: `{shown(key)[1:-1]}`: {shown(value)} switches on something that is not known here; "
                    "remove the key if it changes nothing"
                )

    def checked(self, config: ModelConfig) -> ModelConfig:
        """`config`, whose numbers fit together.

        Raises:
          UserError: by the key that does not fit.
        """
        heads, kv_heads, embedding = map(self.key, ("n_heads", "n_kv_heads", "embedding_size"))
        if config.head_dim % 2:
            raise UserError(f"{self.where}: `{self.key('head_dim')}`: expected an even number, got {config.head_dim}")
        if config.n_heads % config.n_kv_heads:
            raise UserError(f"{self.where}: `{kv_heads}`: {config.n_kv_heads} does not divide {heads} {config.n_heads}")
        if config.embedding_size < config.vocab_size:
            raise UserError(
                f"{self.where}: `{embedding}`: {config.embedding_size} is less than vocab_size {config.vocab_size}"
            )
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name)
            if value is not None and value >= config.embedding_size:
                raise UserError(f"{self.where}: `{self.key(name)}`: {value} is outside the embedding")
        return config

    def split_evenly(self, d_model: int, n_heads: int) -> int:
        """The size of a head where the heads share the model's width.

        Raises:
          UserError: they cannot.
        """
        if d_model % n_heads or d_model // n_heads % 2:
            width, heads = self.key("d_model"), self.key("n_heads")
            raise UserError(
                f"{self.where}: `{heads}`: {n_heads} heads must split {width} {d_model} into an even head_dim"
            )
        return d_model // n_heads
