"""The library for a notebook: load a model, score records, generate, train, read metrics. Example: docs/python.md.

Everything here is one call to what the commands call. A config is a recipe's nested dict, which may be changed.
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elbo_kto_jax.data.records import Message, Record
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.runtime.files import to_json
from elbo_kto_jax.runtime.flags import load_config_file
from elbo_kto_jax.runtime.workdir import read_metrics
from elbo_kto_jax.sampling.respond import Checkpoint, open_checkpoint, respond
from elbo_kto_jax.sampling.settings import settings_of
from elbo_kto_jax.scoring.records import Request, score_records
from elbo_kto_jax.training import loop


def recipe(name: str = "kto_mix") -> dict[str, Any]:
    """The settings of a recipe: its name, NAME:ARGUMENT, or a config file.

    Raises:
      UserError: there is none.
    """
    return load_config_file(name).to_dict()


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that scores and answers. Its weights are read when they are first needed.

    Attributes:
      path: Hugging Face folder, hub id, converted checkpoint, or working folder of a run.
      config: its `model`, `data`, `estimator`, `sampler`, `mesh` and `seed` are used.
    """

    path: str
    config: Config

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The opened checkpoint: network, tokenizer, devices and, as `params`, the weights."""
        return open_checkpoint(self.path, self.config, flag="path")

    def score(self, records: Sequence[Mapping[str, Any]] | str | os.PathLike, *, exact: bool = False) -> list[dict]:
        """The ELBO of each record: id, elbo and stderr (nats), tokens.

        Args:
          records: a list of records, or where they are (docs/data.md); labels are not needed.
          exact: enumerate every mask of completions of up to 12 tokens, instead of config.estimator.draws of them.

        Raises:
          UserError: the weights or a record are not usable.
        """
        if isinstance(records, (str, os.PathLike)):
            return self._score(str(records), exact)
        with tempfile.TemporaryDirectory(prefix="elbo_kto_jax_") as folder:
            file = Path(folder) / "records.jsonl"
            file.write_text("".join(f"{to_json(record)}\n" for record in records), encoding="utf-8")
            return self._score(str(file), exact)

    def _score(self, data: str, exact: bool) -> list[dict]:
        model = dataclasses.replace(self.config.model, param_dtype=self.config.model.dtype)  # as they are in memory
        config = dataclasses.replace(self.config, model=model)
        return list(score_records(Request(self.path, data, exact=exact), config, self.checkpoint.params))

    def generate(self, prompts: Sequence[str | list[Message]]) -> list[str]:
        """The answer to each prompt, a text or a list of messages, with the options config.sampler.

        Where the tokenizer has a chat template, a text is the message of a user.

        Raises:
          UserError: the weights are not usable, or a prompt is too long.
        """
        is_chat = self.checkpoint.tokenizer.chat_template is not None
        records = [
            Record(
                f"prompt {i}",
                [{"role": "user", "content": prompt}] if is_chat and isinstance(prompt, str) else prompt,
                None,
                None,
                f"prompt {i}",
            )
            for i, prompt in enumerate(prompts)
        ]
        return respond(self.checkpoint, records, self.config).texts


def load(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> Model:
    """The model at `path`: Hugging Face folder, hub id, converted checkpoint, or working folder of a run.

    Args:
      path: where the model is.
      config: as of `recipe`; None: that of the run to which the model belongs, or what suits the model.

    Raises:
      UserError: there is no model, or a key of the config is unknown or has a value that does not fit.
    """
    return Model(str(path), Config.from_mapping(settings_of(str(path), "path") if config is None else config))


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run that is done.

    Attributes:
      workdir: its working folder.
      config: what it was trained with.
      summary: as the command `train` prints it.
    """

    workdir: Path
    config: Config
    summary: Mapping[str, Any]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: one dict per logged step."""
        return read_metrics(self.workdir)

    def model(self) -> Model:
        """The trained model, for `Model.score` and `Model.generate`."""
        return Model(str(self.summary["checkpoint"]), self.config)


def train(config: Mapping[str, Any], workdir: str | os.PathLike, *, overwrite: bool = False) -> Run:
    """Trains by a config in a working folder, or goes on there; returns when the run is done.

    Args:
      config: as of `recipe`, with model.path and data.train.
      workdir: the working folder.
      overwrite: whether what another run left there is deleted.

    Raises:
      UserError: something about the config, the model, the data or the folder has to be mended.
      Interrupted: Ctrl-C; the state is saved, and the same call goes on.
    """
    resolved, folder = Config.from_mapping(config), paths.at(workdir)
    return Run(folder, resolved, loop.train(resolved, folder, overwrite=overwrite, skip_bad=False))
