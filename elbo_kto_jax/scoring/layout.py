"""The shapes in which rows are scored, from a config, a model and its devices."""

from jax.sharding import Mesh

from elbo_kto_jax.data.fitting import shorter_lengths
from elbo_kto_jax.data.packing import Layout
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.sharding import rules


def layout_of(config: Config, model_config: ModelConfig, mesh: Mesh) -> Layout:
    """The shapes of a run's micro-batches."""
    layout = layout_for(config, rules.row_shards(mesh))
    return layout._replace(mask_token=model_config.mask_id, pad_token=model_config.pad_id)


def layout_for(config: Config, shards: int) -> Layout:
    """The same for devices that split rows into `shards`, without a model's tokens."""
    length = config.data.max_length
    return Layout(
        rows=max(1, config.train.microbatch_tokens // length) * shards,
        length=length,
        mask_token=0,
        pad_token=0,
        packed=config.data.packing,
        shorter=shorter_lengths(length) if config.data.packing else (),
    )
