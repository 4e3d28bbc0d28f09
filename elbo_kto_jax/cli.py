"""What every command shares: flags, the config file, exit statuses, and the summary on the last line of stdout.

--config=FILE.py[:argument] --config.some.key=value    a file with get_config([argument]) -> ml_collections.ConfigDict
"""

import argparse
import ast
import importlib.util
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import ml_collections

from elbo_kto_jax import objectives, processes
from elbo_kto_jax.config import Config
from elbo_kto_jax.diffusion import masks
from elbo_kto_jax.errors import Interrupted, UserError
from elbo_kto_jax.files import check_writable, to_json, trouble
from elbo_kto_jax.sharding import rules

log = logging.getLogger("elbo_kto_jax")


class Flags(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with status 2, and which knows `--config` if asked to."""

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"python -m {command}", description=description, allow_abbrev=False)
        self._has_config = False
        self._kind = Config

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{_printable(message)}; see {self.prog} --help")

    def add_config(self, workdir: bool = False, default: str = "", kind: type[Config] = Config) -> None:
        """Adds --config, whose file states a `kind`, and --workdir for commands that keep one.

        With a `default`, --config may be left out.
        """
        self._has_config, self._kind = True, kind
        self.add_argument(
            "--config",
            required=not default,
            default=default,
            metavar="FILE.py[:ARG]",
            help="config file; --config.KEY=VALUE overrides a key" + (f" (default: {default})" if default else ""),
        )
        if workdir:
            self.add_argument("--workdir", default="", help="working folder (default: runs/NAME_OF_CONFIG)")
        several = self.add_argument_group("several processes", "found by themselves on TPU slices, GKE and SLURM")
        several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
        several.add_argument("--num-processes", type=int, metavar="N", help="of this job")
        several.add_argument("--process-id", type=int, metavar="I", help="of this process, 0 to N-1")

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, Config | None]:
        """The flags and, where `add_config` was called, the resolved config; then also joins the job's processes.

        Raises:
          UserError: an unknown flag or config key, or a value that does not fit.
        """
        overrides, rest = {}, []
        words = iter(argv)
        for word in words:
            if re.fullmatch(r"--[\w-]+=--", word):  # of which argparse makes an empty list
                self.error(f"{word}: expected a value")
            match = re.fullmatch(r"--config\.([\w.-]+)(?:=(.*))?", word, flags=re.DOTALL) if self._has_config else None
            if match:
                value = match[2] if match[2] is not None else next(words, None)
                if value is None:
                    raise UserError(f"{word}: a value is missing; write {word}=VALUE")
                overrides[match[1]] = value
            else:
                rest.append(word)
        flags = self.parse_args(rest)
        if not self._has_config:
            return flags, None
        config = load_config_file(flags.config)
        for key, text in overrides.items():
            _override(config, key, text)
        if hasattr(flags, "workdir") and not flags.workdir:
            flags.workdir = os.path.join("runs", Path(flags.config.partition(":")[0]).stem)
        resolved = self._kind.from_mapping(config.to_dict())
        objectives.build(resolved.objective)  # names that are not known are refused before anything is loaded
        masks.check_scheme(resolved.estimator.scheme)
        processes.start(flags.coordinator, flags.num_processes, flags.process_id)
        rules.split_cpu(resolved.mesh)
        if not processes.is_first():
            log.setLevel(logging.WARNING)
        return flags, resolved


def _printable(message: str) -> str:
    """The message without line breaks and control characters, and not longer than a few lines of a terminal."""
    message = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
    return message if len(message) <= 500 else f"{message[:500]}..."


def load_config_file(spec: str, flag: str = "--config") -> ml_collections.ConfigDict:
    """What get_config of the file returns; `spec` is FILE.py or FILE.py:ARGUMENT, as in ml_collections.config_flags.

    Raises:
      UserError: the file is missing, is not Python, fails, or has no get_config.
    """
    name, _, argument = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        raise UserError(_printable(f"{flag}={spec}: there is no file {name}"))
    loader = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if loader is None:
        raise UserError(f"{flag}={spec}: expected a Python file (*.py)")
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
        if not isinstance(config, ml_collections.ConfigDict):
            raise UserError(f"{flag}={spec}: get_config must return an ml_collections.ConfigDict")
        return config.copy_and_resolve_references().unlock()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the file is the user's: whatever it raises is their error, not ours
        raise UserError(
            f"{flag}={spec}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from None


def _override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    """Sets one dotted key from a flag's text, read as a Python literal unless the key holds a string."""
    group: Any = config
    *path, last = key.split(".")
    for name in path:
        if not isinstance(group, ml_collections.ConfigDict) or name not in group:
            group = None
            break
        group = group[name]
    if not isinstance(group, ml_collections.ConfigDict) or isinstance(group.get(last), ml_collections.ConfigDict):
        raise UserError(f"unknown config key `config.{key}`")
    value: Any = text
    if not isinstance(group.get(last), str):
        try:
            value = (
                {"true": True, "false": False}[text.lower()]
                if text.lower() in ("true", "false")
                else ast.literal_eval(text)
            )
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval documents
            value = text
    if last in group:
        del group[last]  # or ml_collections would convert the new value to the type of the old one
    group[last] = value


def run(main: Callable[[list[str]], dict[str, Any]]) -> NoReturn:
    """Runs main(argv), prints the summary that it returns as the last line of stdout, and exits.

    Exit status 0; 2 for a UserError (its message alone on stderr), and for a full disk and the like; 75 for
    Interrupted, SIGTERM or Ctrl-C: what was finished is kept, no file is half written, and the same command goes on.
    With several processes the first one prints the summary.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does, outside of `stop_on_signal`
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    log.setLevel(logging.INFO)
    # Orbax logs what it raises, with tracebacks, and leaves coroutines and failed tasks behind when a disk is full.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: log.debug("ignored: %s", unraisable.exc_value)
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "elbo_kto_jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache))  # a program is compiled once per machine
    try:
        summary = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(2)
    except OSError as error:
        if not trouble(error):
            raise
        print(f"error: {trouble(error)}; mend that and run the same command again", file=sys.stderr)
        _leave(2)
    except Interrupted as stop:
        if stop.args and isinstance(stop.args[-1], dict) and processes.is_first():
            print(to_json(stop.args[-1]))
        print(f"interrupted: {stop.args[0] if stop.args else ''}", file=sys.stderr)
        sys.exit(75)
    except KeyboardInterrupt:
        print("interrupted: the same command starts again", file=sys.stderr)
        _leave(75)
    except Exception:
        if not processes.several():
            raise
        traceback.print_exc()
        _leave(1)
    if processes.is_first():
        print(to_json(summary), flush=True)
    sys.exit(0)


def _leave(status: int) -> NoReturn:
    """Exits; of several processes at once, for the others may wait for this one and must notice that it is gone."""
    if processes.several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def refuse_existing(path: str | os.PathLike, overwrite: bool, flag: str = "--out") -> None:
    """Raises UserError where `path` exists and --overwrite was not given, or where nothing can be written."""
    check_writable(path, flag)
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{flag}={path} exists already; choose another name or pass --overwrite")
