"""A conversation in the terminal, in which the answer is seen to form.

    python -m elbo_kto_jax.chat --checkpoint=DIR

Every line of the input is a message; Ctrl-D or Ctrl-C ends the conversation. In a terminal the answer is rewritten in
place after every step, with a light mark where a token is still masked; elsewhere only finished answers are printed.
Without --config the settings are those of configs/chat.py. Where a conversation grows too long for the model, the
oldest messages are left out.
"""

import dataclasses
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from io import TextIOBase
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from elbo_kto_jax import cli
from elbo_kto_jax.data import chat
from elbo_kto_jax.data.records import Message, Record
from elbo_kto_jax.reports.denoising import MASK
from elbo_kto_jax.runtime import terminal
from elbo_kto_jax.runtime.config import Config, Sampler
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling.respond import Checkpoint, open_checkpoint, respond
from elbo_kto_jax.sampling.stops import cut_response

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "chat.py"


def main(argv: list[str]) -> dict[str, Any]:
    parser = cli.Flags("elbo_kto_jax.chat", "A conversation in which the answer is seen to form.")
    parser.add_config(default=str(DEFAULT_CONFIG))
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model to talk to")
    flags, config = parser.parse(argv)
    checkpoint = open_checkpoint(flags.checkpoint, config, flag="--checkpoint")
    if checkpoint.tokenizer.chat_template is None:
        raise UserError(
            f"--checkpoint={flags.checkpoint}: its tokenizer has no chat template; use an instruct model, or `generate`"
        )
    sampler = fit(config.sampler, checkpoint.model.config.max_sequence_length)
    config = dataclasses.replace(config, sampler=sampler)
    cli.log.info("answers of at most %d tokens; Ctrl-D ends the conversation", sampler.gen_length)
    conversation = Conversation(checkpoint, config, sys.stdout)
    try:
        for message in _messages():
            try:
                conversation.answer(message)
            except UserError as error:  # a message that is too long need not end the conversation
                cli.log.warning("%s", error)
    except KeyboardInterrupt:
        print()
    return conversation.summary


class Conversation:
    """The messages so far, and how answers to them are shown on `out`."""

    def __init__(self, checkpoint: Checkpoint, config: Config, out: TextIOBase):
        self._checkpoint, self._config, self._out = checkpoint, config, out
        self._messages: list[Message] = []
        self._tokens = self._passes = self._forward_tokens = self._turns = 0
        self._seconds = 0.0

    def answer(self, text: str) -> str:
        """The model's answer to a message, which is shown and kept for the messages that follow.

        Raises:
          UserError: the message is not text or alone too long for the model, or the weights are not usable.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"this message is not UTF-8 text: {text}") from None
        messages = self._that_fit([*self._messages, {"role": "user", "content": text}])
        record = Record(f"turn {self._turns}", messages, None, None, "this message")
        canvas = _Canvas(self._out) if self._out.isatty() else None
        watch = None
        if canvas:
            canvas.draw(MASK * self._config.sampler.gen_length)

            def watch(_: int, tokens: Int32[np.ndarray, " g"]) -> None:
                canvas.draw(self._forming(tokens))

        answers = respond(self._checkpoint, [record], self._config, watch=watch)
        (answered,) = answers.texts
        if canvas:
            canvas.erase()
        print(terminal.printable(answered), file=self._out, flush=True)
        self._messages = [*messages, {"role": "assistant", "content": answered}]
        self._turns += 1
        self._tokens += int((answers.responses.written_at >= 0).sum())
        self._passes += answers.responses.forward_passes
        self._forward_tokens += answers.responses.forward_tokens
        self._seconds += answers.seconds
        return answered

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
        while len(messages) > 1 and len(chat.encode_prompt(self._checkpoint.tokenizer, messages)) > longest:
            messages, dropped = messages[2:], dropped + 2
        if dropped:
            cli.log.warning("the oldest %d messages are left out: the model takes no more", dropped)
        return messages

    def _forming(self, tokens: Int32[np.ndarray, " g"]) -> str:
        """An unfinished answer as text, up to its first stop token."""
        mask_id, decode = self._checkpoint.model.config.mask_token_id, self._checkpoint.tokenizer.decode
        tokens = cut_response(tokens, self._checkpoint.stop_ids)
        (masked,) = np.nonzero(tokens == mask_id)
        runs = np.split(tokens, np.unique([*masked, *(masked + 1)])) if len(masked) else [tokens]
        text = "".join(
            MASK if len(run) == 1 and run[0] == mask_id else decode(run.tolist(), skip_special_tokens=True)
            for run in runs
        )
        return text.replace("\ufffd", MASK)  # a character of which some tokens are still masked


class _Canvas:
    """Lines at the end of a terminal that are drawn over each other."""

    def __init__(self, out: TextIOBase):
        self._out, self._lines = out, 0

    def draw(self, text: str) -> None:
        """Replaces what was drawn before; of a text that is higher than the terminal its end is shown."""
        columns, rows = shutil.get_terminal_size()
        # A terminal obeys control characters, and a line that it breaks itself would be counted wrongly.
        text = re.sub(r"[^\S\n]", " ", text)
        text = "".join(character for character in text if character.isprintable() or character == "\n")
        is_wide = any(unicodedata.east_asian_width(character) in "WF" for character in text)
        width = max(1, (columns - 1) // (2 if is_wide else 1))
        lines = [line[at : at + width] for line in text.split("\n") for at in range(0, max(len(line), 1), width)]
        lines = lines[-max(rows - 1, 1) :]
        self._out.write(self._cleared() + "\n".join(lines) + "\n")
        self._out.flush()
        self._lines = len(lines)

    def erase(self) -> None:
        self._out.write(self._cleared())
        self._lines = 0

    def _cleared(self) -> str:
        """Control sequence: to the start of the first line that was drawn, and everything from there is erased."""
        return f"\x1b[{self._lines}F\x1b[J" if self._lines else ""


def fit(sampler: Sampler, longest: int) -> Sampler:
    """The sampler with as many blocks, at least one, as leave half of the `longest` tokens to the conversation."""
    blocks = sampler.gen_length // sampler.block_length
    fitting = min(blocks, max(1, longest // 2 // sampler.block_length))
    return dataclasses.replace(
        sampler, gen_length=fitting * sampler.block_length, steps=sampler.steps // blocks * fitting
    )


def _messages() -> Iterator[str]:
    """The lines of the input that are not empty."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # lets input() edit lines and remember them
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            if prompt:
                print()
            return
        if line.strip():
            yield line


if __name__ == "__main__":
    cli.run(main)
