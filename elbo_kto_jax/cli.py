"""What every command shares, and the console script `elbo-kto`, which runs any of them.

A command is a file beside this one with main(argv) -> summary: it reads its flags and its config, and makes one call
to the library. `run` turns what it returns, or raises, into the last line of stdout and an exit status.
"""

import contextlib
import difflib
import importlib
import logging
import os
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from elbo_kto_jax import __version__, objectives, trackers
from elbo_kto_jax.diffusion import masks
from elbo_kto_jax.runtime import flags, paths, processes, terminal
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.runtime.files import to_json, trouble
from elbo_kto_jax.sharding import rules

log = logging.getLogger("elbo_kto_jax")

COMMANDS = {
    "quickstart": "the main job on a tiny model, on a CPU in minutes",
    "train": "align or fine-tune a model: reference pass, training, report",
    "precompute": "the reference pass alone, for train to find",
    "score": "ELBO of records, estimated or enumerated",
    "generate": "responses to prompts",
    "chat": "a conversation in the terminal",
    "evaluate": "win rate against another checkpoint, and benchmarks",
    "sweep": "a grid of evaluations",
    "diagnose": "bias and variance of the estimator on your records",
    "benchmark": "seconds and memory on this machine, beside PyTorch",
    "plan": "does a run fit a TPU slice, and how fast can it be",
    "from_hf": "a Hugging Face folder to a checkpoint",
    "to_hf": "a checkpoint to a Hugging Face folder",
    "verify": "compare both, bit by bit",
}


class Flags(flags.Flags):
    """Flags of a command. With a config, the names in it are checked, and the processes of the job are joined."""

    def add_config_of_model(self, recipe: str = "") -> None:
        """Adds --config, by default that of the run that made --checkpoint; `recipe`: see `settings_of`."""
        self._recipe = recipe
        other = recipe or "what suits the model"
        self.add_config(default=f"that of the run to which the checkpoint belongs, else {other}")

    def default_settings(self, flags: Namespace) -> dict[str, Any]:
        """The settings that `settings_of` finds for --checkpoint.

        Raises:
          UserError: there is no such model, or no --checkpoint either.
        """
        if not flags.checkpoint:
            self.error("--checkpoint: missing; name a model, or a --config whose model.path is one")
        from elbo_kto_jax.sampling.settings import settings_of  # here: other commands need not wait for its imports

        return settings_of(flags.checkpoint, "--checkpoint", self._recipe)

    def parse(self, argv: list[str]) -> tuple[Namespace, Config]:
        """The flags and the resolved config of a command that called `add_config`.

        Raises:
          UserError: an unknown flag or config key, or a value that does not fit.
        """
        options, config = super().parse(argv)
        objectives.build(config.objective)  # names that are not known are refused before anything is loaded
        masks.check_scheme(config.estimator.scheme)
        trackers.check_names(config.trackers)
        processes.start(options.coordinator, options.num_processes, options.process_id)
        rules.split_cpu(config.mesh)
        if not processes.is_first():
            log.setLevel(logging.WARNING)
        return options, config


def main() -> NoReturn:
    """The console script: elbo-kto COMMAND ..."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:<11} {what}" for name, what in COMMANDS.items()]
        lines = ["usage: elbo-kto COMMAND [--help] ...", "", *lines, "", "elbo-kto COMMAND --help lists its flags."]
        terminal.say("\n".join(lines))
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        terminal.say(f"elbo_kto_jax {__version__}")
        sys.exit(0)
    command = words[0].replace("-", "_")
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "elbo-kto --help lists the commands"
        print(terminal.message(f"error: there is no command {words[0]}; {hint}"), file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    run(importlib.import_module(f"elbo_kto_jax.{command}").main)


def run(main: Callable[[list[str]], dict[str, Any]]) -> NoReturn:
    """Runs main(argv), prints the summary that it returns as the last line of stdout, and exits.

    Exit status 0; 2 for a UserError (its message alone on stderr), and for a full disk and the like; 75 for
    Interrupted, SIGTERM or Ctrl-C: what was finished is kept, no file is half written, and the same command goes on.
    With several processes the first one prints the summary.
    """
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        # Under another locale the same words and names would mean something else to Python than to TensorStore.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does, outside of `stop_on_signal`
    terminal.protect_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(terminal.Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    log.setLevel(logging.INFO)
    # Orbax logs what it raises, with tracebacks, and leaves coroutines and failed tasks behind when a disk is full.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_unraisable
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", _cache_folder())  # a program is compiled once per machine
    try:
        summary = main(sys.argv[1:])
    except UserError as error:
        _leave(2, f"error: {error}")
    except OSError as error:
        if not trouble(error):
            raise
        _leave(2, f"error: {trouble(error)}; mend that and run the same command again")
    except Interrupted as stop:
        if stop.args and isinstance(stop.args[-1], dict) and processes.is_first():
            terminal.say_json(to_json(stop.args[-1]))
        print(terminal.message(f"interrupted: {stop.args[0] if stop.args else ''}"), file=sys.stderr)
        sys.exit(75)
    except KeyboardInterrupt:
        _leave(75, "interrupted: the same command starts again")
    except Exception:
        if not processes.several():
            raise
        traceback.print_exc()
        _leave(1, "")
    if processes.is_first():
        terminal.say_json(to_json(summary))
    if terminal.stdout_failure():
        _leave(2, f"error: stdout: {terminal.stdout_failure()}; what was printed is lost, files are written: make room")
    sys.exit(0)


def _ignore_unraisable(unraisable: Any) -> None:
    """What Python would print of an error that nobody can catch (`sys.unraisablehook`) goes into the log."""
    log.debug("ignored: %s", unraisable.exc_value)


def _cache_folder() -> str | None:
    """Where compiled programs are kept: below XDG_CACHE_HOME or ~/.cache; None where there is no such place."""
    stated, home = os.environ.get("XDG_CACHE_HOME", ""), paths.home_folder()
    base = stated if os.path.isabs(stated) else home and os.path.join(home, ".cache")
    folder = base and os.path.join(base, "elbo_kto_jax", "compiled")
    with contextlib.suppress(OSError):
        if folder:
            os.makedirs(folder, exist_ok=True)
            return folder
    return None


def _leave(status: int, message: str) -> NoReturn:
    """Exits with a message on stderr.

    Of several processes one leaves at once, for the others may wait for it and must notice that it is gone.
    """
    if message:
        print(terminal.message(message), file=sys.stderr)
    if processes.several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
