"""Records to tokens (docs/method.md 5): the tokenizer's chat template around the prompt, then the completion as it is.

Two ways to tokenise a record:

  one string    (`exact_window=False`, the authors') template(prompt) + completion is tokenised as one string and
                `prompt_length` is the token count of template(prompt) alone. A token may straddle the border, so the
                window [prompt_length, prompt_length + completion_length) may start a token away from the completion.
  exact window  (`exact_window=True`) the two texts are tokenised apart and joined: the window is the completion.

A plain-string prompt with a plain-string completion follows TRL: no template, no beginning-of-text token. Where only
one of the two is a string, the record is a conversation: a string prompt is one user message, a string completion is
the content of the assistant message.

A prompt that ends with an assistant message is left open there, as by TRL: the completion continues that message. An
empty one there is the same as none.

Only as much of a text is tokenised as max_length tokens can need. Chat templates run in a process of their own
(`data.foreign`).

Special tokens written out in a message or a completion ("<|eot_id|>") are ordinary text in the second way, so that no
user can end a turn or mask a token; only what the template writes becomes a control token. A plain-string prompt went
through a template elsewhere, if any: its special tokens are meant. The first way reads them all as the authors' code
does: they become those tokens.

A template may ask for the time (`strftime_now`). A working folder fixes what it is told (`make_repeatable`), so that a
run that is interrupted goes on with the same texts; elsewhere it is told the present.
"""

import dataclasses
import datetime
import re
import sys
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Int32

from elbo_kto_jax.data import foreign
from elbo_kto_jax.data.portable import TextTokenizer
from elbo_kto_jax.data.records import Message, Record
from elbo_kto_jax.runtime.errors import UserError

_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b(?=\s*\()")  # what Jinja has of it
CLOCK = "strftime_now"
_CHARACTERS = 16  # of a text that are tokenised for every token wanted; again four times as many if they are too few
_BEYOND = 256  # tokens beyond those wanted: where a text is cut, its last tokens are others than the whole text's
_lock = threading.Lock()  # for how a tokenizer is set


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The tokens of one record.

    Attributes:
      tokens: int32[min(text_length, max_length)], prompt then completion, not padded.
      prompt_length: tokens of the prompt, NOT cut: where it reaches max_length, completion_length is 0.
      completion_length: tokens of the window after the cut.
      text_length: tokens of the whole before the cut. Of a text with far more than max_length tokens, this and
        prompt_length count those of its beginning.
    """

    tokens: Int32[np.ndarray, "length"]
    prompt_length: int
    completion_length: int
    text_length: int


def make_repeatable(tokenizer: Any, moment: datetime.datetime, where: str) -> None:
    """Makes `tokenizer`, read from `where`, render a conversation in the same way on every day.

    A template that asks for the time is told `moment` from now on.

    Raises:
      UserError: the chat template draws random numbers.
    """
    found = tokenizer.chat_template or ""
    templates = "\n".join(found.values() if isinstance(found, dict) else [found])
    if drawing := _RANDOM.search(templates):
        raise UserError(
            f"{where}: the tokenizer's chat template uses `{drawing[0]}`, which gives another text at every start; "
            "a run that is interrupted could not go on: write a template without it"
        )
    if CLOCK in templates:
        tokenizer.moment = moment  # which `foreign.render` hands on


def encode_prompt(tokenizer: TextTokenizer, prompt: list[Message] | str, max_length: int | None = None) -> list[int]:
    """Token ids of a prompt: messages with the template and the assistant header, a plain string as it is.

    With a `max_length`, of a prompt that has far more tokens only more than so many are given.

    Raises:
      UserError: messages, and a tokenizer without a chat template or one that refuses them.
    """
    return _tokenise_prompts(tokenizer, [prompt], ["the prompt"], max_length)[0]


def writes_special_tokens(tokenizer: TextTokenizer, records: Sequence[Record]) -> list[bool]:
    """Whether a special token stands in a message or the completion of each record."""
    special = _special_tokens(tokenizer)
    return [any(map(special.search, _written(record))) for record in records]


def _written(record: Record) -> list[str]:
    """The texts of a record that are no plain-string prompt."""
    prompt, completion = _turns(record)
    messages = [] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return [*messages, completion]


def encode(
    tokenizer: TextTokenizer,
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
    tokenizer: TextTokenizer,
    records: Sequence[Record],
    *,
    max_length: int,
    exact_window: bool,
    append_eot: bool,
    eot_id: int,
) -> list[Encoded]:
    """Tokenises records that have a completion (docs/method.md 5); one call per few hundred records is fast.

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
    turns = [_turns(record) for record in records]
    where = [record.where for record in records]
    if exact_window:
        prompts = _tokenise_prompts(tokenizer, [prompt for prompt, _ in turns], where, max_length)
        completions = tokenise(tokenizer, [completion for _, completion in turns], max_length, as_text=True)
        wholes = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    else:
        texts = _render(tokenizer, [prompt for prompt, _ in turns], where)
        prompts = tokenise(tokenizer, texts, max_length)
        texts = [text + completion for text, (_, completion) in zip(texts, turns, strict=True)]
        wholes = tokenise(tokenizer, texts, max_length)
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
    if completion is None:
        raise ValueError(f"{record.where}: expected a record with a completion")
    return prompt, completion if isinstance(completion, str) else completion[0]["content"]


def _render(tokenizer: TextTokenizer, prompts: Sequence[list[Message] | str], where: Sequence[str]) -> list[str]:
    """The texts of prompts: messages with the template, plain strings as they are; `where` each is, for errors.

    Raises:
      UserError: the tokenizer has no chat template, or it refuses a prompt.
    """
    places = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    if places and tokenizer.chat_template is None:
        raise UserError(
            f"{where[places[0]]}: the tokenizer of this model has no chat template for messages; use the tokenizer of "
            "an instruct model, or plain strings for prompt and completion"
        )
    conversations = [_without_empty_answer(prompt) for prompt in prompts if not isinstance(prompt, str)]
    are_open = [conversation[-1]["role"] == "assistant" for conversation in conversations]
    texts = [prompt if isinstance(prompt, str) else "" for prompt in prompts]
    try:
        rendered = foreign.render(tokenizer, conversations, are_open) if places else []
    except foreign.ForeignError as error:
        place = where[places[error.index]]
        raise UserError(f"{place}: field `prompt`: the tokenizer's chat template refuses it: {error}") from error
    for i, text in zip(places, rendered, strict=True):
        texts[i] = text
    return texts


def render(tokenizer: TextTokenizer, messages: list[Message], is_open: bool) -> str:
    """The text of messages; it ends with the content of the last one if that is open, else with an answer's header.

    Raises:
      UserError: the template refuses them.
    """
    try:
        (text,) = foreign.render(tokenizer, [messages], [is_open])
    except foreign.ForeignError as error:
        raise UserError(f"the tokenizer's chat template refuses a conversation: {error}") from error
    return text


def _without_empty_answer(messages: list[Message]) -> list[Message]:
    """Messages without an empty assistant message at the end: there is nothing of it to be continued."""
    last = messages[-1]
    is_empty = last["role"] == "assistant" and not last["content"].strip()
    return messages[:-1] if is_empty and len(messages) > 1 else messages


def _tokenise_prompts(
    tokenizer: TextTokenizer,
    prompts: Sequence[list[Message] | str],
    where: Sequence[str],
    max_length: int | None,
) -> list[list[int]]:
    """Prompts with the template's control tokens and no others; `where` each of them is, for errors."""
    special = _special_tokens(tokenizer)
    guards = [
        _Guard(special, prompt, place)
        if not isinstance(prompt, str) and any(special.search(message["content"]) for message in prompt)
        else None
        for prompt, place in zip(prompts, where, strict=True)
    ]
    texts = _render(
        tokenizer, [guard.disguised if guard else prompt for guard, prompt in zip(guards, prompts, strict=True)], where
    )
    usual = [text for guard, text in zip(guards, texts, strict=True) if guard is None]
    tokens = iter(tokenise(tokenizer, usual, max_length))  # many texts at once are fast
    return [
        next(tokens) if guard is None else guard.tokenise(tokenizer, text, max_length)
        for guard, text in zip(guards, texts, strict=True)
    ]


class _Guard:
    """Messages in whose texts special tokens are written out.

    They go through the template in disguise, so that what looks like a special token afterwards is the template's.

    Attributes:
      disguised: the messages with a mark in the place of every special token.
    """

    def __init__(self, special: re.Pattern, messages: list[Message], where: str):
        used = set().union(*(message["content"] for message in messages))
        self._mark = next((char for char in map(chr, range(0xE000, 0x110000)) if char not in used), "")  # private use
        if not self._mark:
            raise UserError(f"{where}: field `prompt`: uses every character that Unicode keeps free")
        self._special = special
        self._written: list[str] = []
        self.disguised = [{**m, "content": special.sub(self._disguise, m["content"])} for m in messages]

    def _disguise(self, match: re.Match) -> str:
        self._written.append(match[0])
        return f"{self._mark}{len(self._written) - 1}{self._mark}"

    def tokenise(self, tokenizer: TextTokenizer, text: str, max_length: int | None) -> list[int]:
        """The tokens of what the template made of the disguised messages."""
        tokens: list[int] = []
        for part in re.split(f"({self._special.pattern})", text):
            if max_length is not None and len(tokens) > max_length + _BEYOND:
                break
            if self._special.fullmatch(part):
                tokens.append(cast(int, tokenizer.convert_tokens_to_ids(part)))  # of one token, one id
            elif part:
                plain = re.sub(f"{self._mark}(\\d+){self._mark}", lambda match: self._written[int(match[1])], part)
                tokens += tokenise(tokenizer, [plain], max_length, as_text=True)[0]
        return tokens


def _special_tokens(tokenizer: TextTokenizer) -> re.Pattern:
    """Matches every special token. It is slow to build where there are hundreds: once for many texts."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def tokenise(
    tokenizer: TextTokenizer, texts: Sequence[str], max_length: int | None = None, as_text: bool = False
) -> list[list[int]]:
    """Token ids of each text as it is, nothing added; all cores take part.

    With a `max_length`, of a text with far more tokens its first ones, more than so many; `as_text` takes special
    tokens in texts for text.

    Raises:
      UserError: the tokenizer fails.
    """
    enough = sys.maxsize if max_length is None else max_length + _BEYOND
    most = sys.maxsize if max_length is None else _CHARACTERS * enough
    found: dict[str, list[int]] = {}
    left = list(dict.fromkeys(texts))
    while left:
        encoded = _encode(tokenizer, [text[:most] for text in left], as_text)
        found.update(zip(left, encoded, strict=True))
        # What a normalizer deletes has no tokens.
        left = [text for text in left if len(text) > most and len(found[text]) <= enough]
        most *= 4
    return [found[text] for text in texts]


def _encode(tokenizer: TextTokenizer, texts: list[str], as_text: bool) -> list[list[int]]:
    # Past transformers, which looks at model_max_length: texts are cut by us.
    backend = tokenizer.backend_tokenizer
    try:
        with _lock:
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = as_text
            # The template writes the beginning-of-text token itself.
            encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]
    except BaseException as error:
        reason = foreign.failure(error)
        if not reason:
            raise
        raise UserError(f"the tokenizer fails on one of {len(texts)} texts: {reason}") from None
