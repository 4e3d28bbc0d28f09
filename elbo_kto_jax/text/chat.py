"""Records to tokens (METHOD 5): the tokenizer's chat template around the prompt, then the completion as it is.

Two ways to tokenise a record:

  one string    (`exact_window=False`, the authors') template(prompt) + completion is tokenised as one string and
                `prompt_length` is the token count of template(prompt) alone. A token may straddle the border, so the
                window [prompt_length, prompt_length + completion_length) may start a token away from the completion.
  exact window  (`exact_window=True`) the two texts are tokenised apart and joined: the window is the completion.

A plain-string prompt with a plain-string completion follows TRL: no template, no beginning-of-text token. Where only
one of the two is a string, the record is a conversation: a string prompt is one user message, a string completion is
the content of the assistant message.

Special tokens written out in a text ("<|eot_id|>") become those tokens, in both ways, as in the authors' code.
"""

import dataclasses
from collections.abc import Sequence

import jinja2
import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from elbo_kto_jax.errors import UserError
from elbo_kto_jax.model.config import ModelConfig
from elbo_kto_jax.text.records import Message, Record

EOT_TOKEN = "<|eot_id|>"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The tokens of one record.

    Attributes:
      tokens: int32[min(text_length, max_length)], prompt then completion, not padded.
      prompt_length: tokens of the prompt, NOT cut: where it reaches max_length, completion_length is 0.
      completion_length: tokens of the window after the cut.
      text_length: tokens of the whole before the cut.
    """

    tokens: Int32[np.ndarray, "length"]
    prompt_length: int
    completion_length: int
    text_length: int


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model_config: ModelConfig, where: str) -> None:
    """Checks that `tokenizer`, read from `where`, belongs to the model.

    Raises:
      UserError: an id differs from the model's, or there are more tokens than rows of the embedding.
    """
    if len(tokenizer) > model_config.embedding_size:
        raise UserError(
            f"{where}: wrong tokenizer: it has {len(tokenizer)} tokens, the model embeds {model_config.embedding_size}"
        )
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) != getattr(model_config, name):
            raise UserError(
                f"{where}: wrong tokenizer: its {name} is {getattr(tokenizer, name)}, "
                f"the model's config.json says {getattr(model_config, name)}"
            )
    # The published tokenizer declares no mask token, so the id comes from the model. It must be a special token:
    # an ordinary one would turn up in texts and be taken for a mask.
    mask_id = model_config.mask_token_id
    if tokenizer.mask_token_id not in (None, mask_id) or mask_id not in tokenizer.added_tokens_decoder:
        token = tokenizer.convert_ids_to_tokens(mask_id) if mask_id < len(tokenizer) else None
        raise UserError(
            f"{where}: wrong tokenizer: the model's mask_token_id {mask_id} is {token!r} there, not its mask token"
        )


def find_eot_id(tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """The id of the end-of-turn token <|eot_id|>.

    Raises:
      UserError: the tokenizer has no such token.
    """
    if EOT_TOKEN not in tokenizer.get_added_vocab():
        raise UserError(f"{where}: the tokenizer has no end-of-turn token {EOT_TOKEN}; switch the option off")
    return tokenizer.get_added_vocab()[EOT_TOKEN]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: list[Message] | str) -> list[int]:
    """Token ids of a prompt: messages with the template and the assistant header, a plain string as it is.

    Raises:
      UserError: messages, and a tokenizer without a chat template or one that refuses them.
    """
    text = prompt if isinstance(prompt, str) else _apply_template(tokenizer, prompt, "the prompt")
    return tokenise(tokenizer, [text])[0]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    record: Record,
    *,
    max_length: int,
    exact_window: bool,
    append_eot: bool,
    eot_id: int,
) -> Encoded:
    """Tokenises one record; `encode_batch` says how."""
    (encoded,) = encode_batch(
        tokenizer, [record], max_length=max_length, exact_window=exact_window, append_eot=append_eot, eot_id=eot_id
    )
    return encoded


def encode_batch(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    max_length: int,
    exact_window: bool,
    append_eot: bool,
    eot_id: int,
) -> list[Encoded]:
    """Tokenises records that have a completion (METHOD 5); one call per few hundred records is fast.

    Args:
      tokenizer: a fast tokenizer.
      records: prompts with completions.
      max_length: tokens kept of each record, from the left.
      exact_window: tokenise prompt and completion apart (see the module's docstring).
      append_eot: continue every completion with `eot_id`, before the cut.
      eot_id: the end-of-turn token.

    Raises:
      UserError: a chat template is needed and missing, or refuses a record.
    """
    texts = [_texts(tokenizer, record) for record in records]
    prompts = tokenise(tokenizer, [prompt for prompt, _ in texts])
    if exact_window:
        completions = tokenise(tokenizer, [completion for _, completion in texts])
        wholes = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    else:
        wholes = tokenise(tokenizer, [prompt + completion for prompt, completion in texts])
    if append_eot:
        wholes = [[*whole, eot_id] for whole in wholes]
    return [_cut(whole, len(prompt), max_length) for prompt, whole in zip(prompts, wholes, strict=True)]


def _cut(whole: list[int], prompt_length: int, max_length: int) -> Encoded:
    tokens = np.asarray(whole[:max_length], np.int32)
    return Encoded(tokens, prompt_length, max(len(tokens) - prompt_length, 0), len(whole))


def _texts(tokenizer: PreTrainedTokenizerBase, record: Record) -> tuple[str, str]:
    """(prompt, completion) of a record as the texts to tokenise."""
    prompt, completion = record.prompt, record.completion
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(completion, str):
        completion = completion[0]["content"]
    return _apply_template(tokenizer, prompt, record.where), completion


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: the tokenizer of this model has no chat template for messages; use the tokenizer of an instruct "
            "model, or plain strings for prompt and completion"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: field `prompt`: the tokenizer's chat template refuses it: {error}") from error


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text as it is: nothing is added, nothing is cut."""
    # The template writes the beginning-of-text token itself. verbose=False: texts longer than the tokenizer's
    # model_max_length are cut by us.
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
