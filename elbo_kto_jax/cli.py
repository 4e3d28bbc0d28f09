"""What every command shares: flags, the config file, exit statuses, and the summary on the last line of stdout.

--config=FILE.py[:argument] --config.some.key=value    a file with get_config([argument]) -> ml_collections.ConfigDict
"""

import argparse
import ast
import contextlib
import functools
import importlib.util
import logging
import math
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

from elbo_kto_jax import objectives
from elbo_kto_jax.diffusion import masks
from elbo_kto_jax.runtime import paths, processes, terminal
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import Interrupted, UserError
from elbo_kto_jax.runtime.files import check_writable, to_json, trouble
from elbo_kto_jax.sharding import rules

log = logging.getLogger("elbo_kto_jax")
_LARGEST = 2**31 - 1  # of counts and seeds on the command line


class Flags(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with status 2, and which knows `--config` if asked to.

    A flag that is added without a type names a file or folder, so that no command can forget `paths.resolve`; one that
    holds other text has `type=str`. Those of type int are counts and seeds, from 0; those of type float are finite.
    """

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"python -m {command}", description=description, allow_abbrev=False)
        self._has_config = False
        self._kind = Config

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

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
        several.add_argument("--coordinator", type=str, metavar="HOST:PORT", help="where process 0 listens")
        several.add_argument("--num-processes", type=int, metavar="N", help="of this job")
        several.add_argument("--process-id", type=int, metavar="I", help="of this process, 0 to N-1")

    def parse_args(self, args: list[str]) -> argparse.Namespace:
        """The flags, checked and with their paths resolved.

        Raises:
          UserError: an unknown flag, or a value that does not fit.
        """
        _check_text(args)
        flags = super().parse_args(args)
        for action in self._actions:
            if action.option_strings and action.nargs != 0 and action.choices is None:
                given = getattr(flags, action.dest)
                checked = functools.partial(_checked, kind=action.type, flag=action.option_strings[0])
                setattr(flags, action.dest, list(map(checked, given)) if isinstance(given, list) else checked(given))
        return flags

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, Config | None]:
        """The flags and, where `add_config` was called, the resolved config; then also joins the job's processes.

        Raises:
          UserError: an unknown flag or config key, or a value that does not fit.
        """
        _check_text(argv)
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


def _check_text(words: list[str]) -> None:
    """Raises UserError where a word of the command line has bytes that are not text in the locale's encoding."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            flag, _, value = word.partition("=")
            raise UserError(f"{flag} is not UTF-8 text: {value}; convert it (iconv -t UTF-8)") from None


def _checked(value: Any, kind: Any, flag: str) -> Any:
    """The value of a flag of type `kind`, see `Flags`."""
    if kind is None and isinstance(value, str):
        return paths.resolve(value, flag)
    if kind is int and value is not None and not 0 <= value <= _LARGEST:
        raise UserError(f"{flag}: expected a number from 0 to {_LARGEST}, got {value}")
    if kind is float and value is not None and not math.isfinite(value):
        raise UserError(f"{flag}: expected a finite number, got {value}")
    return value


def load_config_file(spec: str, flag: str = "--config") -> ml_collections.ConfigDict:
    """What get_config of the file returns; `spec` is FILE.py or FILE.py:ARGUMENT, as in ml_collections.config_flags.

    Raises:
      UserError: the file is missing, is not Python, fails, or has no get_config.
    """
    name, _, argument = (spec, "", "") if os.path.isfile(spec) else spec.partition(":")
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{flag}={spec}: there is no file {name}")
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
    if not jax.config.jax_compilation_cache_dir:
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
    base, home = os.environ.get("XDG_CACHE_HOME", ""), paths.home_folder()
    if not os.path.isabs(base):
        base = home and os.path.join(home, ".cache")
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


def refuse_existing(path: str | os.PathLike, overwrite: bool, flag: str = "--out") -> None:
    """Checks that the file `path` can be written.

    Raises:
      UserError: it exists and --overwrite was not given, it is a folder, or nothing can be written there.
    """
    check_writable(path, flag)
    if Path(path).is_dir():
        raise UserError(f"{flag}={path}: a folder; name a file")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{flag}={path} exists already; choose another name or pass --overwrite")
