"""What objectives with a reference share: rewards, and what is told of them.

r_b = B_theta(b) - B_ref(b)     nats; beta is not in it
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from elbo_kto_jax.objectives.protocol import Feedback, masked_mean
from elbo_kto_jax.runtime.arrays import AnyArray

SATURATED = 4.0  # |h| beyond which sigmoid'(h) is below 7.1% of its maximum


def rewards(elbo_policy: Float32[Array, "b k"], elbo_ref: Float32[Array, "b k"]) -> Float32[Array, " b"]:
    """r of every completion, in nats: exactly 0 where the two are equal."""
    return jnp.mean(elbo_policy, axis=1) - jnp.mean(elbo_ref, axis=1)


def by_label(reward: Float32[Array, " b"], feedback: Feedback) -> dict[str, Float32[Array, ""]]:
    """Mean rewards of the desirable and of the undesirable completions, and their difference (nats)."""
    desirable = masked_mean(reward, feedback.is_desirable & feedback.is_example)
    undesirable = masked_mean(reward, ~feedback.is_desirable & feedback.is_example)
    return {
        "reward_desirable": desirable,
        "reward_undesirable": undesirable,
        "reward_margin": desirable - undesirable,
    }


def noise(
    elbo_policy: Float32[Array, "b k"], elbo_ref: Float32[Array, "b k"], is_example: Bool[AnyArray, " b"]
) -> dict[str, Float32[Array, ""]]:
    """Var(r) from the masks, nats^2, and the draws at which it would be a tenth of the variance between completions.

    From the spread of the K draws as if they were independent: too much where a scheme spreads them on purpose. One
    draw has no spread, so that nothing is told.
    """
    draws = elbo_policy.shape[1]
    if draws == 1:
        return {}
    reward = rewards(elbo_policy, elbo_ref)
    variance = masked_mean(jnp.var(elbo_policy - elbo_ref, axis=1, ddof=1) / draws, is_example)
    centred = jnp.square(reward - masked_mean(reward, is_example))
    between = jnp.sum(jnp.where(is_example, centred, 0.0)) / (jnp.sum(is_example) - 1) - variance
    return {
        "reward_variance": variance,
        "draws_needed": jnp.where(between > 0, 10.0 * draws * variance / between, jnp.nan),
    }
