"""Supervised fine-tuning of a masked diffusion model (arXiv 2502.09992): the mean of -B_theta / L over the batch."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from elbo_kto_jax.objectives.protocol import Feedback, Needs, Outcome, register
from elbo_kto_jax.runtime import config


@register
@dataclasses.dataclass(frozen=True)
class Sft:
    """Every completion is one to imitate; the loss is in nats per completion token."""

    name = "sft"
    needs = Needs(labels=False, pairs=False, reference=False, scores=False)
    options: config.Objective

    def __call__(self, elbo_policy: Array, elbo_ref: Array, feedback: Feedback) -> Outcome:
        del elbo_ref
        length = jnp.maximum(feedback.completion_length, 1)
        scale = jnp.divide(feedback.is_example, length * jnp.sum(feedback.is_example))
        elbo = jnp.mean(elbo_policy, axis=1)
        return Outcome(-jnp.sum(scale * elbo), -scale, {}, ("elbo", elbo))

    def held_out(self, values: Float32[np.ndarray, " n"], is_desirable: Bool[np.ndarray, " n"]) -> dict[str, float]:
        return {}
