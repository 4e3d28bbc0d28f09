"""The settings with which a model answers and scores where the user names no config: its run's, or what suits it."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elbo_kto_jax.checkpoints.folders import means_best
from elbo_kto_jax.checkpoints.load import load_config
from elbo_kto_jax.models.registry import architecture
from elbo_kto_jax.runtime import paths, recipes
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.older_configs import as_written_now

log = logging.getLogger(__name__)
_RUN_CONFIG = "config.json"  # in a working folder (runtime/workdir.py); a published folder's has no key `config`


def settings_of(source: str, flag: str, recipe: str = "") -> dict[str, Any]:
    """The config to use a model with, as a nested dict.

    That of its run, where the model is a working folder or lies inside one; the devices are not the run's, though, but
    this machine's. Otherwise that of a recipe, its lengths cut down to what the model takes.

    Args:
      source: the model, see `load_model`.
      flag: the flag that named it, for messages.
      recipe: of other models, and of the mesh; "": the one that suits the architecture.

    Raises:
      UserError: there is no model at `source`, or the config of its run is not usable.
    """
    if found := _config_of_run(source):
        file, tree = found
        try:
            config = Config.from_mapping(as_written_now(tree)).to_dict()
        except UserError as error:
            raise UserError(f"{file}: {error}; pass a --config") from None
        log.info("settings: those of the run in %s", file.parent)
        return {**config, "mesh": recipes.load(recipe or "kto_mix").mesh.to_dict()}
    model = load_config(source, flag)[0]
    name = recipe or architecture(model).recipe
    config = recipes.load(name).to_dict()
    log.info("settings: those of the recipe %s, as %s is not of a run", name, source)
    longest = model.max_sequence_length
    data = {**config["data"], "max_length": min(config["data"]["max_length"], longest)}
    return {**config, "data": data, "sampler": _fitted(config["sampler"], longest)}


def _config_of_run(source: str) -> tuple[Path, Mapping[str, Any]] | None:
    """The config.json of the training run to whose working folder `source` belongs, and the config in it."""
    if not paths.at(source).exists() and not means_best(source):  # a name on the hub
        return None
    places = [paths.at(paths.place(source))]
    if not paths.is_remote(source):
        places.insert(0, Path(os.path.abspath(source)))
    for folder in dict.fromkeys(folder for place in places for folder in (place, *place.parents)):
        file = folder / _RUN_CONFIG
        try:
            config = json.loads(file.read_text(encoding="utf-8")).get("config")
        except (OSError, ValueError, AttributeError, RecursionError):  # there is none, or it is something else
            continue
        if isinstance(config, Mapping) and "sweep" not in config:
            return file, config
    return None


def _fitted(sampler: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """A recipe's sampler whose answers take at most half of the `longest` tokens that the model does."""
    half = max(1, longest // 2)
    if sampler["gen_length"] <= half:
        return dict(sampler)
    block = min(sampler["block_length"], half)
    length = half // block * block
    return {**sampler, "gen_length": length, "steps": length, "block_length": block}
