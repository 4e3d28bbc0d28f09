"""ELBO-DPO over pairs, or VRPO, the method behind LLaDA 1.5 (arXiv 2505.19223; docs/method.md 9).

    h_p  = beta * (r(chosen) - r(rejected))
    loss = mean_p -(1 - eps) log sigmoid(h_p) - eps log sigmoid(-h_p)      eps: label smoothing
    c    = -+beta * (sigmoid(-h_p) - eps) / P                              minus for the chosen; P pairs in the batch

The chosen and the rejected completion of pair p are the completions 2p and 2p + 1 of the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Float64

from elbo_kto_jax.objectives.protocol import Feedback, Needs, Outcome, masked_mean, register
from elbo_kto_jax.objectives.rewards import SATURATED, by_label, noise, rewards
from elbo_kto_jax.runtime import config


@register
@dataclasses.dataclass(frozen=True)
class Dpo:
    """Paired feedback: of two completions of a prompt, one is preferred."""

    name = "elbo_dpo"
    needs = Needs(labels=False, pairs=True, reference=True, scores=True)
    contrast = (1.0, -1.0)
    coupled = False
    options: config.Objective

    def __call__(self, elbo_policy: Array, elbo_ref: Array, feedback: Feedback) -> Outcome:
        beta, smoothing = self.options.beta, self.options.label_smoothing
        reward = rewards(elbo_policy, elbo_ref)
        is_pair = feedback.is_example[::2]
        pairs = jnp.sum(is_pair)
        margin = beta * (reward[::2] - reward[1::2])
        losses = -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)
        chosen = jnp.where(is_pair, -beta * (jax.nn.sigmoid(-margin) - smoothing) / pairs, 0.0)
        metrics = {
            **by_label(reward, feedback),
            "accuracy": masked_mean(1.0 * (margin > 0), is_pair),
            "saturated_fraction": masked_mean(1.0 * (jnp.abs(margin) > SATURATED), is_pair),
            **noise(elbo_policy, elbo_ref, feedback.is_example),
        }
        return Outcome(
            masked_mean(losses, is_pair), jnp.stack([chosen, -chosen], axis=1).ravel(), metrics, ("reward", reward)
        )

    def held_out(self, values: Float32[np.ndarray, " n"], is_desirable: Bool[np.ndarray, " n"]) -> dict[str, float]:
        margin = values[::2] - values[1::2]
        return {"reward_margin": float(margin.mean()), "accuracy": float((margin > 0).mean())}

    def value(
        self, margin: Float64[np.ndarray, "p r"], is_desirable: Bool[np.ndarray, " n"], order: int
    ) -> Float64[np.ndarray, "p r"]:
        """-(1 - eps) log sigmoid(h) - eps log sigmoid(-h), or a derivative."""
        smoothing = self.options.label_smoothing
        p = 0.5 * (1 + np.tanh(-margin / 2))  # sigmoid(-h)
        if order == 0:
            return (1 - smoothing) * np.logaddexp(0, -margin) + smoothing * np.logaddexp(0, margin)
        return (smoothing - p, p * (1 - p))[order - 1]
