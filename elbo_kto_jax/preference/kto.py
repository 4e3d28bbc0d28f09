"""The KTO loss on ELBO rewards, and its gradient through one number per example (METHOD 2, arXiv 2402.01306).

    r_b  = B_theta(b) - B_ref(b)
    z0   = stop_gradient(mean of r over the global batch), or 0
    s_b  = beta * (r_b - z0)
    loss = mean_b lambda_b * (1 - sigmoid(+s_b if desirable else -s_b))

Everything here is float32 over [b] arrays; b is padded to a static size and `is_example` is False on the padding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32


class Loss(NamedTuple):
    """The loss, its derivative c_b = d loss / d B_theta(b) with z0 held constant, and s_b."""

    loss: Float32[Array, ""]
    elbo_cotangent: Float32[Array, " b"]  # 1/nats
    kto_logit: Float32[Array, " b"]


def reference_point(reward: Float32[Array, " b"], is_example: Bool[Array, " b"], mode: str) -> Float32[Array, ""]:
    """z0 in nats: the mean reward of the global batch ("global_mean"), or 0 ("zero"). It may be negative."""
    if mode == "zero":
        return jnp.zeros((), jnp.float32)
    return masked_mean(reward, is_example)


def loss_and_cotangent(
    reward: Float32[Array, " b"],
    z0: Float32[Array, ""],
    is_desirable: Bool[Array, " b"],
    is_example: Bool[Array, " b"],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Loss:
    """The KTO loss of METHOD 2 and c_b = -+lambda_b beta sigmoid'(s_b) / b, minus where desirable."""
    sign = jnp.where(is_desirable, 1.0, -1.0)
    weight = jnp.where(is_desirable, desirable_weight, undesirable_weight) * is_example
    logit = beta * (reward - z0)
    count = jnp.sum(is_example)
    loss = jnp.sum(weight * jax.nn.sigmoid(-sign * logit)) / count
    slope = jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)  # sigmoid'(s) = sigmoid'(-s), exact where s is large
    return Loss(loss, -sign * weight * beta * slope / count, logit)


def masked_mean(x: Float32[Array, " b"], where: Bool[Array, " b"]) -> Float32[Array, ""]:
    """Mean of x over `where`, NaN where it is empty."""
    return jnp.sum(jnp.where(where, x, 0.0)) / jnp.sum(where)
