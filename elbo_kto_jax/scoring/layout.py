"""The shape in which rows are scored, from a config, a model and its devices."""

from jax.sharding import Mesh

from elbo_kto_jax.data.fitting import shorter_lengths
from elbo_kto_jax.data.packing import Layout
from elbo_kto_jax.models.config import ModelConfig
from elbo_kto_jax.runtime.config import Config
from elbo_kto_jax.sharding import rules


def layout_of(config: Config, model_config: ModelConfig, mesh: Mesh) -> Layout:
    """The shapes of a run's micro-batches."""
    return Layout(
        rows=max(1, config.train.microbatch_tokens // config.data.max_length) * rules.row_shards(mesh),
        length=config.data.max_length,
        mask_token=model_config.mask_id,
        pad_token=model_config.pad_id,
        packed=config.data.packing,
        shorter=shorter_lengths(config.data.max_length) if config.data.packing else (),
    )
