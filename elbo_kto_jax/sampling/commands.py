"""What a line of a conversation may be beside a message: a command, which begins with a slash."""

import logging

from elbo_kto_jax.runtime import paths, processes, terminal
from elbo_kto_jax.runtime.errors import UserError, shown
from elbo_kto_jax.runtime.files import atomic_write, check_writable, is_taken, to_json
from elbo_kto_jax.sampling.conversation import Conversation

log = logging.getLogger(__name__)
_OVERWRITE = "--overwrite"
HELP = f"""commands of a conversation:
  /help                 shows this
  /reset                forgets what was said; the system message stays
  /system TEXT          makes TEXT the system message from now on; without TEXT, there is none
  /save FILE            writes what was said into FILE, as JSON; a FILE that exists stays as it
                        is, unless it is /save {_OVERWRITE} FILE
  Ctrl-D                ends the conversation
A line that begins with a space is a message, whatever follows."""


def obey(line: str, talk: Conversation) -> bool:
    """Does what a command says; False: the line is a message.

    Raises:
      UserError: there is no such command, or it cannot be done.
    """
    if not line.startswith("/"):
        return False
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if name == "/system":
        talk.set_system(argument)
        log.info("the system message is %s", "set" if argument else "removed")
    elif name == "/save":
        _save(argument, talk)
    elif name not in ("/help", "/reset"):
        raise UserError(f"there is no command {shown(name)}; /help lists them, and a line after a space is a message")
    elif argument:
        raise UserError(f"{name}: takes nothing, got {shown(argument)}; a line after a space is a message")
    elif name == "/help":
        terminal.say(HELP)
    else:
        talk.reset()
        log.info("what was said is forgotten")
    return True


def _save(argument: str, talk: Conversation) -> None:
    overwrite = argument.startswith(f"{_OVERWRITE} ")
    path = paths.resolve(argument.removeprefix(_OVERWRITE).strip() if overwrite else argument, "/save")
    if not path:
        raise UserError("/save: name a file: /save FILE")
    check_writable(path, "/save")
    if paths.at(path).is_dir():
        raise UserError(f"/save: {path} is a folder; name a file")
    if is_taken(path) and not overwrite:
        raise UserError(f"/save: {path} exists already; choose another name, or write /save {_OVERWRITE} FILE")
    if not talk.messages:
        raise UserError("/save: nothing was said yet")
    if processes.is_first():
        atomic_write(path, f"{to_json({'checkpoint': talk.source, 'messages': talk.messages})}\n")
    log.info("written: %s", path)
