"""Flags of a command, and its config file with --config.KEY=VALUE on top of it.

--config=FILE.py[:ARGUMENT]    a file with get_config([argument]) -> ml_collections.ConfigDict
--config=NAME[:ARGUMENT]       a recipe of this project (recipes.py)
"""

import argparse
import ast
import functools
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import ml_collections

from elbo_kto_jax.runtime import paths, recipes, settings
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.files import check_writable, is_taken
from elbo_kto_jax.runtime.older_configs import with_later_keys

_LARGEST = 2**31 - 1  # of counts and seeds on the command line
_CONSOLE_SCRIPT = "elbo-kto"


class _Help(argparse.HelpFormatter):
    """Help whose texts keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(super(_Help, self)._fill_text(line, width, indent) for line in text.splitlines())


def command_line(module: str) -> str:
    """What to type for the command in `module`, the way in which this one was started."""
    return _program(module, _python())


def _program(module: str, python: str) -> str:
    """The command as it is called: by the console script, or as a module of `python`."""
    if Path(sys.argv[0]).stem == _CONSOLE_SCRIPT:
        return f"{_CONSOLE_SCRIPT} {module.rpartition('.')[2]}"
    return f"{python} -m {module}"


def _python() -> str:
    """What to type for the Python that runs this: without an active environment, `python` may lack the project."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = Path(sys.executable)
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


class Flags(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with status 2, and which knows `--config` if asked to.

    A flag that is added without a type names a file or folder, so that no command can forget `paths.resolve`; one that
    holds other text has `type=str`. Those of type int are counts and seeds, from 0; those of type float are finite.
    """

    def __init__(self, command: str, description: str):
        prog = _program(command, "python")
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_Help)
        self._kind: type[Config] = Config
        self._short: dict[str, str] = {}  # attribute of the flags -> config key

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def add_config(self, workdir: bool = False, default: str = "", kind: type[Config] = Config) -> None:
        """Adds --config, whose file states a `kind`, and --workdir for commands that keep one.

        With a `default`, which the help shows, --config may be left out; `default_settings` then says what is meant.
        """
        self._kind = kind
        self.add_argument(
            "--config",
            required=not default,
            default="",
            metavar="RECIPE[:ARG]",
            help="recipe, by name, or config file; --config.KEY=VALUE overrides a key"
            + (f" (default: {default})" if default else ""),
        )
        self.add_argument_group("config keys", settings.in_short(kind))
        if workdir:
            self.add_argument("--workdir", default="", help="working folder (default: runs/NAME_OF_CONFIG)")
        several = self.add_argument_group("several processes", "found by themselves on TPU slices, GKE and SLURM")
        several.add_argument("--coordinator", type=str, metavar="HOST:PORT", help="where process 0 listens")
        several.add_argument("--num-processes", type=int, metavar="N", help="of this job")
        several.add_argument("--process-id", type=int, metavar="I", help="of this process, 0 to N-1")

    def default_settings(self, flags: argparse.Namespace) -> dict[str, Any]:
        """The settings of a command that is given no --config.

        Raises:
          UserError: it needs one.
        """
        self.error("--config: missing; name a recipe or a config file")

    def add_short_form(self, flag: str, key: str, help: str) -> None:
        """Adds a flag that is short for --config.KEY: its value is read and checked as that of the key."""
        name = key.rpartition(".")[2].upper()
        action = self.add_argument(flag, type=_text_of_key, metavar=name, help=f"{help} (config.{key})")
        self._short[action.dest] = key

    def parse_args(self, args: list[str]) -> argparse.Namespace:  # type: ignore[override]  # no other namespace here
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

    def parse_flags(self, argv: list[str]) -> argparse.Namespace:
        """The flags of a command without a config.

        Raises:
          UserError: an unknown flag, or a value that does not fit.
        """
        _check_text(argv)
        for word in argv:
            self._refuse_dashes(word)
        return self.parse_args(argv)

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, Config]:
        """The flags and the resolved config of a command that called `add_config`: a config of its `kind`.

        Raises:
          UserError: an unknown flag or config key, or a value that does not fit.
        """
        _check_text(argv)
        overrides: dict[str, str] = {}
        rest: list[str] = []
        words = iter(argv)
        for word in words:
            self._refuse_dashes(word)
            match = re.fullmatch(r"--config\.([\w.-]+)(?:=(.*))?", word, flags=re.DOTALL)
            if match:
                value = match[2] if match[2] is not None else next(words, None)
                if value is None:
                    raise UserError(f"{word}: a value is missing; write {word}=VALUE")
                overrides[match[1]] = value
            else:
                rest.append(word)
        flags = self.parse_args(rest)
        short = {key: getattr(flags, name) for name, key in self._short.items()}
        overrides = {key: text for key, text in short.items() if text is not None} | overrides
        settings = load_config_file(flags.config).to_dict() if flags.config else self.default_settings(flags)
        config = ml_collections.ConfigDict(with_later_keys(settings))
        for key, text in overrides.items():
            _override(config, key, text)
        if hasattr(flags, "workdir") and not flags.workdir:
            flags.workdir = os.path.join("runs", Path(flags.config.rpartition("://")[2].partition(":")[0]).stem)
        try:
            return flags, self._kind.from_mapping(config.to_dict())
        except UserError as error:
            given = {f"config.{key}": f"--{name.replace('_', '-')}" for name, key in self._short.items() if short[key]}
            named = re.match(r"config[\w.]*", str(error))
            if named and named[0] in given:
                raise UserError(str(error).replace(named[0], given[named[0]], 1)) from None
            raise

    def _refuse_dashes(self, word: str) -> None:
        """Raises UserError where a flag's value is --, of which argparse makes an empty list."""
        if re.fullmatch(r"--[\w-]+=--", word):
            self.error(f"{word}: expected a value")


def _text_of_key(text: str) -> str:
    """The type of a flag that is short for a config key."""
    return text


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
    """What get_config of a config file returns.

    Args:
      spec: FILE.py or FILE.py:ARGUMENT, as in ml_collections.config_flags; for FILE.py also the name of a recipe.
      flag: the flag that gave it, for messages.

    Raises:
      UserError: the file is missing, is not Python, fails, or has no get_config.
    """
    scheme, mark, rest = spec.rpartition("://")  # whose colon begins no argument
    name, _, argument = (rest, "", "") if os.path.isfile(spec) else rest.partition(":")
    name = f"{scheme}{mark}{name}"
    path = paths.at(name) if paths.at(name).is_file() else recipes.find(name)
    if path is None:
        raise UserError(f"{flag}={spec}: there is no file {name}, nor a recipe; recipes: {', '.join(recipes.names())}")
    try:
        config = recipes.get_config_of(path)(*([argument] if argument else []))
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


def refuse_existing(path: str | os.PathLike, overwrite: bool, flag: str = "--out") -> None:
    """Checks that the file `path` can be written.

    Raises:
      UserError: it exists and --overwrite was not given, it is a folder, or nothing can be written there.
    """
    check_writable(path, flag)
    if paths.at(path).is_dir():
        raise UserError(f"{flag}={path}: a folder; name a file")
    if is_taken(path) and not overwrite:
        raise UserError(f"{flag}={path} exists already; choose another name or pass --overwrite")
