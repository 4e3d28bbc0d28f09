"""How many layers of a model fit a device, with room for what a benchmark keeps beside them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

_USABLE = 0.8  # of the memory that a device reports
_COPIES = 8  # of a parameter: itself, what a step starts from again, two moments, and a gradient in float32 twice over
_GRAPHS = 8  # forward passes whose results a peer keeps until its backward pass
_CPU_LAYERS = 6  # where a device does not say what it has


def layers_that_fit(dimensions: Mapping[str, int], length: int, param_dtype: str, moments_dtype: str) -> int:
    """How many of the layers fit a training step in this process's first device, at least 1.

    Args:
      dimensions: "d_model", "n_layers", "mlp_hidden_size", "embedding_size".
      length: tokens of a row.
      param_dtype, moments_dtype: of the parameters, and of Adam's moments.
    """
    d, most = dimensions["d_model"], dimensions["n_layers"]
    statistics = jax.local_devices()[0].memory_stats()
    if not statistics:
        return min(_CPU_LAYERS, most)
    stored, moment = jnp.dtype(param_dtype).itemsize, jnp.dtype(moments_dtype).itemsize
    size = _COPIES * stored + 2 * (moment - stored)
    layer = size * d * (4 * d + 3 * dimensions["mlp_hidden_size"]) + _GRAPHS * length * d * 2
    ends = dimensions["embedding_size"] * (size * 2 * d + (_GRAPHS + 2) * length * 4)
    return max(1, min(most, int((_USABLE * statistics["bytes_limit"] - ends) / layer)))
