"""Records to tokens (METHOD 5): the tokenizer's chat template around the prompt, then the completion as it is.

Two ways to tokenise a record:

  one string    (`exact_window=False`, the authors') template(prompt) + completion is tokenised as one string and
                `prompt_length` is the token count of template(prompt) alone. A token may straddle the border, so the
                window [prompt_length, prompt_length + completion_length) may start a token away from the completion.
  exact window  (`exact_window=True`) the two texts are tokenised apart and joined: the window is the completion.

A plain-string prompt with a plain-string completion follows TRL: no template, no beginning-of-text token. Where only
one of the two is a string, the record is a conversation: a string prompt is one user message, a string completion is
the content of the assistant message.

Special tokens written out in a message or a completion ("<|eot_id|>") are ordinary text in the second way, so that no
user can end a turn or mask a token; only what the template writes becomes a control token. A plain-string prompt went
through a template elsewhere, if any: its special tokens are meant. The first way reads them all as the authors' code
does: they become those tokens.

A template may ask for the time (`strftime_now`). A working folder fixes what it is told (`make_repeatable`), so that a
run that is interrupted goes on with the same texts; elsewhere it is told the present.
"""

import contextlib
import dataclasses
import datetime
import re
import threading
import types
from collections.abc import Iterator, Sequence

import numpy as np
import transformers
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from elbo_kto_jax.errors import UserError
from elbo_kto_jax.model.config import ModelConfig
from elbo_kto_jax.text.records import Message, Record

EOT_TOKEN = "<|eot_id|>"
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b(?=\s*\()")  # what Jinja has of it
_CLOCK = "strftime_now"
_clock_lock = threading.RLock()


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


def make_repeatable(tokenizer: PreTrainedTokenizerBase, moment: datetime.datetime, where: str) -> None:
    """Makes `tokenizer`, read from `where`, render a conversation in the same way on every day.

    A template that asks for the time is told `moment` from now on.

    Raises:
      UserError: the chat template draws random numbers, or its clock cannot be set.
    """
    found = tokenizer.chat_template or ""
    templates = "\n".join(found.values() if isinstance(found, dict) else [found])
    if drawing := _RANDOM.search(templates):
        raise UserError(
            f"{where}: the tokenizer's chat template uses `{drawing[0]}`, which gives another text at every start; "
            "a run that is interrupted could not go on: write a template without it"
        )
    if _CLOCK in templates:
        tokenizer.moment = moment
        probe = f"{{{{ {_CLOCK}('%Y-%m-%dT%H:%M:%S') }}}}"
        with template_clock(tokenizer):
            message = {"role": "user", "content": ""}
            told = tokenizer.apply_chat_template([message], chat_template=probe, tokenize=False)
        if told != moment.isoformat():
            raise UserError(
                f"{where}: the tokenizer's chat template reads the clock (`{_CLOCK}`), which cannot be set under "
                f"transformers {transformers.__version__}: write the date into the template"
            )


@contextlib.contextmanager
def template_clock(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within it, a template of `tokenizer` is told the moment that `make_repeatable` fixed, if any."""
    moment = getattr(tokenizer, "moment", None)
    if moment is None:
        yield
        return
    # Templates get their functions from transformers alone, and this one reads the module's `datetime`.
    with _clock_lock:
        before = chat_template_utils.datetime
        chat_template_utils.datetime = types.SimpleNamespace(now=lambda: moment)
        try:
            yield
        finally:
            chat_template_utils.datetime = before


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
    return _tokenise_prompts(tokenizer, [prompt], ["the prompt"])[0]


def writes_special_tokens(tokenizer: PreTrainedTokenizerBase, record: Record) -> bool:
    """Whether a special token stands in a message or the completion of the record."""
    prompt, completion = _turns(record)
    messages = [] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return any(_special_tokens(tokenizer).search(text) for text in (*messages, completion))


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
      exact_window: tokenise prompt and completion apart, special tokens in messages as text (see above).
      append_eot: continue every completion with `eot_id`, before the cut.
      eot_id: the end-of-turn token.

    Raises:
      UserError: a chat template is needed and missing, or refuses a record.
    """
    if exact_window:
        turns = [_turns(record) for record in records]
        prompts = _tokenise_prompts(tokenizer, [prompt for prompt, _ in turns], [record.where for record in records])
        completions = tokenise(tokenizer, [completion for _, completion in turns], as_text=True)
        wholes = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    else:
        texts = [_texts(tokenizer, record) for record in records]
        prompts = tokenise(tokenizer, [prompt for prompt, _ in texts])
        wholes = tokenise(tokenizer, [prompt + completion for prompt, completion in texts])
    if append_eot:
        wholes = [[*whole, eot_id] for whole in wholes]
    return [_cut(whole, len(prompt), max_length) for prompt, whole in zip(prompts, wholes, strict=True)]


def _cut(whole: list[int], prompt_length: int, max_length: int) -> Encoded:
    tokens = np.asarray(whole[:max_length], np.int32)
    return Encoded(tokens, prompt_length, max(len(tokens) - prompt_length, 0), len(whole))


def _turns(record: Record) -> tuple[list[Message] | str, str]:
    """(prompt, text of the completion) of a record; the prompt is messages unless both are plain strings."""
    prompt, completion = record.prompt, record.completion
    if isinstance(prompt, str) and not isinstance(completion, str):
        prompt = [{"role": "user", "content": prompt}]
    return prompt, completion if isinstance(completion, str) else completion[0]["content"]


def _texts(tokenizer: PreTrainedTokenizerBase, record: Record) -> tuple[str, str]:
    """(prompt, completion) of a record as the authors' texts to tokenise."""
    prompt, completion = _turns(record)
    return prompt if isinstance(prompt, str) else _apply_template(tokenizer, prompt, record.where), completion


def _tokenise_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[Message] | str], where: Sequence[str]
) -> list[list[int]]:
    """Prompts with the template's control tokens and no others; `where` each of them is, for errors."""
    special = _special_tokens(tokenizer)
    tokens: list[list[int]] = [[] for _ in prompts]
    rendered: dict[int, str] = {}
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            rendered[i] = prompt
        elif any(special.search(message["content"]) for message in prompt):
            tokens[i] = _tokenise_guarded(tokenizer, prompt, where[i])
        else:
            rendered[i] = _apply_template(tokenizer, prompt, where[i])
    if rendered:  # many texts at once are fast
        for i, ids in zip(rendered, tokenise(tokenizer, list(rendered.values())), strict=True):
            tokens[i] = ids
    return tokens


def _tokenise_guarded(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str) -> list[int]:
    """The tokens of messages in whose texts special tokens are written out.

    They go through the template in disguise, so that what looks like a special token afterwards is the template's.
    """
    special, contents = _special_tokens(tokenizer), "".join(message["content"] for message in messages)
    mark = next(char for char in map(chr, range(0xE000, 0x110000)) if char not in contents)  # private use
    written: list[str] = []

    def disguise(match: re.Match) -> str:
        written.append(match[0])
        return f"{mark}{len(written) - 1}{mark}"

    disguised = [{**m, "content": special.sub(disguise, m["content"])} for m in messages]
    text = _apply_template(tokenizer, disguised, where)
    tokens: list[int] = []
    for part in re.split(f"({special.pattern})", text):
        if special.fullmatch(part):
            tokens.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            plain = re.sub(f"{mark}(\\d+){mark}", lambda match: written[int(match[1])], part)
            tokens += tokenise(tokenizer, [plain], as_text=True)[0]
    return tokens


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Matches every special token; `re` keeps the compiled pattern."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: the tokenizer of this model has no chat template for messages; use the tokenizer of an instruct "
            "model, or plain strings for prompt and completion"
        )
    try:
        with template_clock(tokenizer):
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template came with the checkpoint and may raise anything, e.g. TypeError
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: field `prompt`: the tokenizer's chat template refuses it: {reason}") from error


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str], as_text: bool = False) -> list[list[int]]:
    """Token ids of each text as it is, nothing added and nothing cut; `as_text` takes special tokens in it for text."""
    # The template writes the beginning-of-text token itself. verbose=False: texts longer than the tokenizer's
    # model_max_length are cut by us.
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=as_text,
        verbose=False,
    )["input_ids"]
