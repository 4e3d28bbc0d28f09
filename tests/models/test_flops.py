"""models/flops.py: one sequence, written out."""

import numpy as np

from elbo_kto_jax.models.flops import forward_flops
from tests import tiny


def test_forward_flops():
    model, length = tiny.MODEL, 21
    d, f, v, n = model.d_model, model.mlp_hidden_size, model.embedding_size, model.n_layers
    kv = model.n_kv_heads * model.head_dim
    projections = 2 * length * d * (d + kv + kv + d)
    expected = n * (projections + 2 * length * d * 3 * f + 2 * 2 * length * length * d) + 2 * 5 * d * v
    assert forward_flops(model, np.array([length]), np.array([5.0])) == expected
