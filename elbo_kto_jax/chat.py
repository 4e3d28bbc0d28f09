"""A conversation in the terminal, in which the answer is seen to form.

    python -m elbo_kto_jax.chat --checkpoint=DIR

Every line of the input is a message, or a command that begins with a slash: /help, /reset, /system TEXT, /save FILE.
Ctrl-D or Ctrl-C ends the conversation. In a terminal the answer is rewritten in
place after every step, with a light mark where a token is still masked; elsewhere only finished answers are printed.
Without --config the settings are those of the run to which the checkpoint belongs; for other models they are those of
the recipe `chat`, which is quick. Where a conversation grows too long for the model, the
oldest messages are left out.
"""

import sys
from collections.abc import Iterator
from typing import Any

from elbo_kto_jax import cli
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.sampling import commands, conversation


def main(argv: list[str]) -> dict[str, Any]:
    parser = cli.Flags("elbo_kto_jax.chat", "A conversation in which the answer is seen to form.")
    parser.add_config_of_model("chat")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model to talk to")
    parser.epilog = commands.HELP
    flags, config = parser.parse(argv)
    talk = conversation.begin(flags.checkpoint, config, sys.stdout)
    try:
        for message in _messages():
            try:
                if not commands.obey(message, talk):
                    talk.answer(message)
            except UserError as error:  # a message that is too long need not end the conversation
                cli.log.warning("%s", error)
    except KeyboardInterrupt:
        print()
    return talk.summary


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
