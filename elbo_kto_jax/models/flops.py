"""Floating-point operations that no implementation of the mask predictor can do without."""

import numpy as np
from jaxtyping import Float, Int

from elbo_kto_jax.models import registry
from elbo_kto_jax.models.config import ModelConfig


def layer_matrices(model: ModelConfig) -> int:
    """Weights in the matrices of one layer: every token is multiplied with each of them once."""
    return sum(row.size for row in registry.parameters(model).values() if row.is_matrix) // model.n_layers


def forward_flops(
    model: ModelConfig, length: Int[np.ndarray, " n"], hidden: Int[np.ndarray, " n"] | Float[np.ndarray, " n"]
) -> float:
    """FLOPs of one forward pass over n sequences of `length` tokens, of which `hidden` are masked and scored.

    Two per multiplication: the layers' matrices at every token, attention of every token to its own sequence, and the
    output head at the hidden tokens. A training step needs three times this (forward, and twice as much backward).
    """
    length = np.asarray(length, np.float64)
    attention = 4 * model.n_heads * model.head_dim * length**2
    layers = model.n_layers * (2 * layer_matrices(model) * length + attention)
    return float(np.sum(layers + 2 * model.d_model * model.embedding_size * hidden))
