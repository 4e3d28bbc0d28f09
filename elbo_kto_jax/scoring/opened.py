"""A model without its weights, its tokenizer and the devices: where scoring and training begin."""

import dataclasses
import datetime
import logging
from collections.abc import Mapping

import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from elbo_kto_jax.checkpoints.load import load_config, load_model
from elbo_kto_jax.checkpoints.tokenizer import build_tokenizer
from elbo_kto_jax.data.chat import make_repeatable
from elbo_kto_jax.data.special import with_special_tokens
from elbo_kto_jax.models import axes
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.models.network import MaskPredictor, Params, abstract_params
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.sharding import rules

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model without weights.

    Attributes:
      model: the network.
      assets: config.json and the tokenizer's files, by name.
      tokenizer: of the model.
      mesh: the devices.
    """

    model: MaskPredictor
    assets: Mapping[str, bytes]
    tokenizer: PreTrainedTokenizerBase
    mesh: Mesh

    def load_params(self, path: str, flag: str) -> Params:
        """The parameters of the model at `path`, sharded over the mesh in the model's `param_dtype`.

        Raises:
          UserError: they are missing, damaged, or of another model; `flag` named them.
        """
        shardings = axes.param_shardings(abstract_params(self.model), self.mesh, self.model.config)
        log.info("loading %s", path)
        return load_model(path, param_dtype=self.model.param_dtype, shardings=shardings, flag=flag).params


def open_model(config: Config, flag: str = "--config.model.path", moment: datetime.datetime | None = None) -> Opened:
    """The model at config.model.path, which the flag or key `flag` named, on the devices of config.mesh.

    With a `moment` the chat template gives the same text at every start, and takes that for the present.

    Raises:
      UserError: config.json or the tokenizer is not usable, or the model cannot be split as the mesh asks.
    """
    model_config, assets = load_config(config.model.path, flag)
    tokenizer = build_tokenizer(assets, config.model.path)
    where = f"{flag}={config.model.path}"
    model_config = with_special_tokens(model_config, tokenizer, config.model.mask_token_id, where)
    if moment is not None:
        make_repeatable(tokenizer, moment, where)
    mesh = rules.make_mesh(config.mesh)
    axes.check_heads(model_config, mesh)
    if config.data.max_length > model_config.max_sequence_length:
        log.warning(
            "config.data.max_length %d is more than the %d positions that the model was trained with",
            config.data.max_length,
            model_config.max_sequence_length,
        )
    return Opened(build_model(config, model_config), assets, tokenizer, mesh)


def build_model(config: Config, model_config: ModelConfig) -> MaskPredictor:
    """The mask predictor of a run, without weights."""
    dtype, param_dtype = jnp.dtype(config.model.dtype), jnp.dtype(config.model.param_dtype)
    return MaskPredictor(model_config, dtype, param_dtype, config.model.remat)
