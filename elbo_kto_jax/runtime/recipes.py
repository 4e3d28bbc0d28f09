"""The recipes of this project: configs/*.py of a checkout, elbo_kto_jax/recipes/ of an installed package."""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from elbo_kto_jax.runtime import paths

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "recipes"
_FOLDER = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """The recipes, by the name that --config takes."""
    return sorted(file.stem for file in _FOLDER.glob("*.py") if not file.stem.startswith("_"))


def find(name: str) -> Path | None:
    """The file of a recipe; None: there is none of this name."""
    file = _FOLDER / f"{name}.py"
    return file if name.isidentifier() and file.is_file() else None


def load(name: str, *arguments: str) -> ConfigDict:
    """What a recipe's get_config returns; recipes that build on another one begin with it.

    Raises:
      ValueError: there is no recipe of this name.
    """
    file = find(name)
    if file is None:
        raise ValueError(f"there is no recipe {name}; known: {', '.join(names())}")
    return get_config_of(file)(*arguments)


def get_config_of(file: str | os.PathLike) -> Callable[..., ConfigDict]:
    """The function get_config of a config file.

    Raises:
      ImportError: the file's name does not end in .py.
      AttributeError: it has no get_config.
      Exception: whatever the file raises.
    """
    with tempfile.TemporaryDirectory(prefix="elbo_kto_jax_config_") as folder:
        if paths.is_remote(file):
            content, file = paths.at(file).read_bytes(), Path(folder, Path(file).name)
            file.write_bytes(content)
        spec = importlib.util.spec_from_file_location(f"config_{Path(file).stem}", file)
        if spec is None or spec.loader is None:
            raise ImportError("expected a Python file (*.py)")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config
