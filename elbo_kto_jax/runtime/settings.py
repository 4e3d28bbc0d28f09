"""The keys of a config with type and meaning, as config.py states them: for --help and docs/settings.md."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.config import Config, Range

PAGE = "docs/settings.md"
MOST_USED = (
    *("model.path", "data.train", "data.eval", "data.max_length", "objective.name", "objective.beta"),
    *("estimator.draws", "optimizer.learning_rate", "train.epochs", "train.global_batch_size", "lora.rank"),
)
_FIELD = re.compile(r"    (\w+): .*?(?:  # (.*))?")


class Key(NamedTuple):
    """A key of a config: its dotted name, which values it takes, and the comment that stands beside it."""

    name: str
    kind: str
    meaning: str


def keys(kind: type[Config] = Config) -> Iterator[Key]:
    """All keys, in the order of config.py."""
    for field, hint, comment in _fields(kind):
        if dataclasses.is_dataclass(hint):
            for name, of, meaning in _fields(hint):
                yield Key(f"{field}.{name}", _values(of), meaning)
        else:
            yield Key(field, _values(hint), comment)


def in_short(kind: type[Config]) -> str:
    """The keys by group, a group a line, for --help."""
    alone, lines = [], []
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            lines.append(f"{name}: {', '.join(field.name for field in dataclasses.fields(hint))}")
        else:
            alone.append(name)
    used = " ".join(f"--config.{key}" for key in MOST_USED)
    texts = [f"{PAGE} says what each of them is. The most used:", used, "All, group by group:", ", ".join(alone)]
    return "\n".join([*texts, *lines])


def _fields(kind: Any) -> list[tuple[str, Any, str]]:
    """Name, type and comment of every field of a dataclass, those of its bases first."""
    comments: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            source: Any = base
            found = map(_FIELD.fullmatch, inspect.getsource(source).splitlines())
            comments |= {match[1]: match[2] or "" for match in found if match}
    hints = typing.get_type_hints(kind, include_extras=True)
    return [(field.name, hints[field.name], comments[field.name]) for field in dataclasses.fields(kind)]


def _values(hint: Any) -> str:
    """Which values a type takes, in words."""
    allowed = None
    if typing.get_origin(hint) is Annotated:
        hint, allowed = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " or ".join(f'"{choice}"' for choice in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"list of: {_values(typing.get_args(hint)[0])}"
    if allowed is paths.resolve_sources:
        return "path or id, or a list of these"
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return f"{_values(typing.get_args(hint)[0])}, or None"
    name = {int: "integer", float: "number", bool: "True or False", str: "text", dict: "keys with values"}[hint]
    if isinstance(allowed, Range):
        return f"{name}, {allowed}" if allowed != Range() else name
    return "path or id" if allowed is paths.resolve else "paths or names" if allowed is not None else name
