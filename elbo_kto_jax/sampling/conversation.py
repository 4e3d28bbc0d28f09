"""A conversation in the terminal: messages in, and an answer that is seen to form."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from io import TextIOBase
from typing import Any, TextIO

import numpy as np
from jaxtyping import Int32

from elbo_kto_jax.data import chat
from elbo_kto_jax.data.records import Message, Record
from elbo_kto_jax.reports.denoising import MASK
from elbo_kto_jax.runtime import terminal
from elbo_kto_jax.runtime.config import Config, Sampler
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling.canvas import Canvas
from elbo_kto_jax.sampling.respond import Checkpoint, open_checkpoint, respond
from elbo_kto_jax.sampling.stops import cut_response, decoded

log = logging.getLogger(__name__)
EMPTY = "(empty answer)"  # shown for one that says nothing


def begin(source: str, config: Config, out: TextIO | TextIOBase) -> "Conversation":
    """A conversation with the checkpoint `source`, whose answers leave it room.

    Raises:
      UserError: the checkpoint is not usable, or its tokenizer has no chat template.
    """
    checkpoint = open_checkpoint(source, config, flag="--checkpoint")
    if checkpoint.tokenizer.chat_template is None:
        raise UserError(
            f"--checkpoint={source}: its tokenizer has no chat template; use an instruct model, or `generate`"
        )
    sampler = fit(config.sampler, checkpoint.model.config.max_sequence_length)
    log.info("answers of at most %d tokens; /help lists the commands, Ctrl-D ends the conversation", sampler.gen_length)
    return Conversation(checkpoint, dataclasses.replace(config, sampler=sampler), out)


class Conversation:
    """The messages so far, and how answers to them are shown on `out`."""

    def __init__(self, checkpoint: Checkpoint, config: Config, out: TextIO | TextIOBase):
        self._checkpoint, self._config, self._out = checkpoint, config, out
        self._system: list[Message] = []
        self._said: list[Message] = []
        self._start = 0  # of what the model still takes of it
        self._tokens = self._passes = self._forward_tokens = self._turns = 0
        self._seconds = 0.0

    def answer(self, text: str) -> str:
        """The model's answer to a message, which is shown and kept for the messages that follow.

        Raises:
          UserError: the message is not text or alone too long for the model, or the weights are not usable.
        """
        _check_text(text)
        said: list[Message] = [*self._said, {"role": "user", "content": text}]
        sent = self._that_fit(said[self._start :])
        record = Record(f"turn {self._turns}", [*self._system, *sent], None, None, "this message")
        canvas = Canvas(self._out) if self._out.isatty() else None
        watch: Callable[[int, Any], None] | None = None
        if canvas:
            canvas.draw(MASK * self._config.sampler.gen_length)

            def watch(_: int, tokens: Int32[np.ndarray, " g"]) -> None:
                canvas.draw(self._forming(tokens))

        try:
            answers = respond(self._checkpoint, [record], self._config, watch=watch)
        finally:
            if canvas:
                canvas.erase()
        (answered,) = answers.texts
        print(terminal.printable(answered if answered.strip() else EMPTY), file=self._out, flush=True)
        self._said, self._start = [*said, {"role": "assistant", "content": answered}], len(said) - len(sent)
        self._turns += 1
        self._tokens += int((answers.responses.written_at >= 0).sum())
        self._passes += answers.responses.forward_passes
        self._forward_tokens += answers.responses.forward_tokens
        self._seconds += answers.seconds
        return answered

    @property
    def source(self) -> str:
        """The checkpoint."""
        return self._checkpoint.source

    @property
    def messages(self) -> list[Message]:
        """All that was said, the system message first; nothing where there was no answer yet."""
        return [*self._system, *self._said] if self._said else []

    def reset(self) -> None:
        """Forgets what was said; the system message stays."""
        self._said, self._start = [], 0

    def set_system(self, text: str) -> None:
        """Makes a text the system message from now on; "": there is none.

        Raises:
          UserError: it is not text, or the chat template takes no system message.
        """
        _check_text(text)
        system: list[Message] = [{"role": "system", "content": text}] if text else []
        try:
            chat.encode_prompt(self._checkpoint.tokenizer, [*system, {"role": "user", "content": "x"}])
        except UserError as error:
            raise UserError(f"/system: {error}") from None
        self._system = system

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "turns": self._turns,
            "tokens_per_second": self._tokens / self._seconds if self._turns else None,
            "forward_passes": self._passes,
            "forward_tokens": self._forward_tokens,
            "seconds": self._seconds,
        }

    def _that_fit(self, messages: list[Message]) -> list[Message]:
        """The last messages, from one of the user's on, that leave room for the answer; at least the last one."""
        longest = self._checkpoint.model.config.max_sequence_length - self._config.sampler.gen_length
        dropped = 0
        tokenizer = self._checkpoint.tokenizer
        while len(messages) > 1 and len(chat.encode_prompt(tokenizer, [*self._system, *messages])) > longest:
            messages, dropped = messages[2:], dropped + 2
        if dropped:
            log.warning("the oldest %d messages are left out: the model takes no more", dropped)
        return messages

    def _forming(self, tokens: Int32[np.ndarray, " g"]) -> str:
        """An unfinished answer as text, up to its first stop token."""
        mask_id = self._checkpoint.model.config.mask_id
        decode = functools.partial(decoded, self._checkpoint.tokenizer, skip_special_tokens=True)
        tokens = cut_response(tokens, self._checkpoint.stop_ids)
        (masked,) = np.nonzero(tokens == mask_id)
        runs = np.split(tokens, np.unique([*masked, *(masked + 1)])) if len(masked) else [tokens]
        text = "".join(MASK if len(run) == 1 and run[0] == mask_id else decode(run.tolist()) for run in runs)
        return text.replace("\ufffd", MASK)  # a character of which some tokens are still masked


def _check_text(text: str) -> None:
    """Raises UserError where a line of the input has bytes that are not text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"this message is not UTF-8 text: {text}") from None


def fit(sampler: Sampler, longest: int) -> Sampler:
    """The sampler with as many blocks, at least one, as leave half of the `longest` tokens to the conversation."""
    blocks = sampler.gen_length // sampler.block_length
    fitting = min(blocks, max(1, longest // 2 // sampler.block_length))
    return dataclasses.replace(
        sampler, gen_length=fitting * sampler.block_length, steps=sampler.steps // blocks * fitting
    )
