"""Which tokens mean mask, end of text and end of turn, from all that says so (docs/method.md 10)."""

import dataclasses
import logging

from transformers import PreTrainedTokenizerBase

from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.runtime.errors import UserError

log = logging.getLogger(__name__)
MASK_KEY = "config.model.mask_token_id"
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>")  # of LLaDA's chat template, and of Qwen's


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that ends a message; None where the tokenizer has none."""
    added = tokenizer.get_added_vocab()
    return next((added[token] for token in _END_OF_TURN if token in added), None)


def find_eot_id(tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """The id of the end-of-turn token.

    Raises:
      UserError: the tokenizer has none.
    """
    eot_id = end_of_turn(tokenizer)
    if eot_id is None:
        tokens = " or ".join(_END_OF_TURN)
        raise UserError(f"{where}: the tokenizer has no end-of-turn token ({tokens}); switch the option off")
    return eot_id


def with_special_tokens(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, mask_token_id: int, where: str
) -> ModelConfig:
    """`model` with every special token known, after a check that `tokenizer`, read from `where`, belongs to it.

    What config.json leaves open, the tokenizer says; the mask token, then, what the model's authors have published.
    `mask_token_id` is above them all, unless it is -1.

    Raises:
      UserError: nobody says a token, the two contradict each other, or there are more tokens than rows of the
        embedding.
    """
    if len(tokenizer) > model.embedding_size:
        raise UserError(
            f"{where}: wrong tokenizer: it has {len(tokenizer)} tokens, the model embeds {model.embedding_size}"
        )
    eos_id = _agreed(model, tokenizer, "eos_token_id", where)
    if eos_id is None:
        raise UserError(
            f"{where}: neither config.json nor the tokenizer says `eos_token_id`; write it into config.json"
        )
    pad_id = _pad_token(model, tokenizer, where)
    return dataclasses.replace(
        model,
        eos_token_id=eos_id,
        pad_token_id=eos_id if pad_id is None else pad_id,
        mask_token_id=_mask_token(model, tokenizer, mask_token_id, where),
        mask_is_chosen=model.mask_is_chosen or mask_token_id >= 0,
    )


def _agreed(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, name: str, where: str) -> int | None:
    """A token that config.json or the tokenizer says, or both."""
    said, declared = getattr(model, name), getattr(tokenizer, name)
    if said is not None and declared not in (None, said):
        raise UserError(f"{where}: wrong tokenizer: its {name} is {declared}, the model's config.json says {said}")
    return declared if said is None else said


def _pad_token(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> int | None:
    """The padding. DiffuCoder's config.json pads with the end of text, and its tokenizer with a token made for that."""
    declared = tokenizer.pad_token_id
    if model.pad_token_id == model.eos_token_id and declared in tokenizer.added_tokens_decoder:
        return declared
    return _agreed(model, tokenizer, "pad_token_id", where)


def _mask_token(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, chosen: int, where: str) -> int:
    published = registry.architecture(model).mask_ids.get(model.vocab_size)
    said = (chosen if chosen >= 0 else None, model.mask_token_id, tokenizer.mask_token_id, published)
    mask_id = next((value for value in said if value is not None), None)
    if mask_id is None:
        raise UserError(
            f"{where}: neither config.json nor the tokenizer says which token is the mask; "
            f"set --{MASK_KEY} to the id that the model's README names"
        )
    if mask_id >= model.embedding_size:
        raise UserError(f"{MASK_KEY}: {mask_id} is outside the embedding of {where}, {model.embedding_size} rows")
    token = tokenizer.convert_ids_to_tokens(mask_id) if mask_id < len(tokenizer) else None
    is_special = mask_id in tokenizer.added_tokens_decoder
    # It must be a special token: an ordinary one would turn up in texts and be taken for a mask.
    is_agreed = tokenizer.mask_token_id in (None, mask_id) and (is_special or mask_id == published)
    if chosen < 0 and not model.mask_is_chosen and not is_agreed:
        raise UserError(
            f"{where}: wrong tokenizer: the model's mask_token_id {mask_id} is {token!r} there, not its mask token; "
            f"if it is meant, set --{MASK_KEY}"
        )
    if not is_special:
        log.warning(
            "%s: the mask token %d is %r, no special token of the tokenizer: where a text has it, it is a mask",
            where,
            mask_id,
            token,
        )
    return mask_id
