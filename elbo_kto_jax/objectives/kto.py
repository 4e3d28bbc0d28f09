"""ELBO-KTO: the KTO loss on ELBO rewards (arXiv 2510.23658, arXiv 2402.01306; docs/method.md 2).

    r_b  = B_theta(b) - B_ref(b)
    z0   = stop_gradient(mean of r over the global batch), or 0
    s_b  = beta * (r_b - z0)
    loss = mean_b lambda_b * (1 - sigmoid(+s_b if desirable else -s_b))

Everything on the device is float32 over [b] arrays; b is padded to a static size.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Float64

from elbo_kto_jax.objectives.protocol import Feedback, Needs, Outcome, masked_mean, register
from elbo_kto_jax.objectives.rewards import SATURATED, by_label, noise, rewards
from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.arrays import AnyArray


@register
@dataclasses.dataclass(frozen=True)
class Kto:
    """Unpaired feedback: every completion is desirable or undesirable."""

    name = "elbo_kto"
    needs = Needs(labels=True, pairs=False, reference=True, scores=True)
    contrast = (1.0,)
    options: config.Objective

    def __call__(self, elbo_policy: Array, elbo_ref: Array, feedback: Feedback) -> Outcome:
        reward = rewards(elbo_policy, elbo_ref)
        z0 = reference_point(reward, feedback.is_example, self.options.reference_point)
        loss = loss_and_cotangent(
            reward,
            z0,
            feedback.is_desirable,
            feedback.is_example,
            beta=self.options.beta,
            desirable_weight=self.options.desirable_weight,
            undesirable_weight=self.options.undesirable_weight,
        )
        saturated = masked_mean(1.0 * (jnp.abs(loss.kto_logit) > SATURATED), feedback.is_example)
        metrics = {
            **by_label(reward, feedback),
            "reference_point": z0,
            "saturated_fraction": saturated,
            **noise(elbo_policy, elbo_ref, feedback.is_example),
        }
        return Outcome(loss.loss, loss.elbo_cotangent, metrics, ("reward", reward))

    def held_out(self, values: Float32[np.ndarray, " n"], is_desirable: Bool[np.ndarray, " n"]) -> dict[str, float]:
        return {"reward_margin": float(values[is_desirable].mean() - values[~is_desirable].mean())}

    @property
    def coupled(self) -> bool:
        return self.options.reference_point == "global_mean"

    def value(
        self, margin: Float64[np.ndarray, "n r"], is_desirable: Bool[np.ndarray, " n"], order: int
    ) -> Float64[np.ndarray, "n r"]:
        """lambda * sigmoid(-s) where desirable, lambda * sigmoid(s) where not, or a derivative."""
        sign = np.where(is_desirable, 1.0, -1.0)[:, None]
        weight = np.where(is_desirable, self.options.desirable_weight, self.options.undesirable_weight)[:, None]
        p = 0.5 * (1 + np.tanh(-sign * margin / 2))  # sigmoid(-s) where desirable
        return weight * (p, -sign * p * (1 - p), p * (1 - p) * (1 - 2 * p))[order]


class Loss(NamedTuple):
    """The loss, its derivative c_b = d loss / d B_theta(b) with z0 held constant, and s_b."""

    loss: Float32[Array, ""]
    elbo_cotangent: Float32[Array, " b"]  # 1/nats
    kto_logit: Float32[Array, " b"]


def reference_point(reward: Float32[Array, " b"], is_example: Bool[AnyArray, " b"], mode: str) -> Float32[Array, ""]:
    """z0 in nats: the mean reward of the global batch ("global_mean"), or 0 ("zero"). It may be negative."""
    if mode == "zero":
        return jnp.zeros((), jnp.float32)
    return masked_mean(reward, is_example)


def loss_and_cotangent(
    reward: Float32[Array, " b"],
    z0: Float32[Array, ""],
    is_desirable: Bool[AnyArray, " b"],
    is_example: Bool[AnyArray, " b"],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Loss:
    """The KTO loss and c_b = -+lambda_b beta sigmoid'(s_b) / b, minus where desirable."""
    sign = jnp.where(is_desirable, 1.0, -1.0)
    weight = jnp.where(is_desirable, desirable_weight, undesirable_weight) * is_example
    logit = beta * (reward - z0)
    count = jnp.sum(is_example)
    loss = jnp.sum(weight * jax.nn.sigmoid(-sign * logit)) / count
    slope = jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)  # sigmoid'(s) = sigmoid'(-s), exact where s is large
    return Loss(loss, -sign * weight * beta * slope / count, logit)
