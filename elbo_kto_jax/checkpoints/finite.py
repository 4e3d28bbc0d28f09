"""Weights that are numbers: a NaN or an infinity among them makes every result one, or an answer that means nothing."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from elbo_kto_jax.runtime.errors import UserError


def check_finite(weights: Float[Array, "n ..."], where: Sequence[str]) -> None:
    """Checks one leaf, where it lies and without a copy of it.

    Args:
      where: what to call it in the message: one name, or one for each index along its first axis.

    Raises:
      UserError: a value is NaN or infinite.
    """
    first = int(_first_not_finite(weights))
    if first >= 0:
        raise UserError(
            f"{where[first] if len(where) > 1 else where[0]}: NaN or infinite values in {weights.dtype}, with which "
            "nothing can be computed; copy or convert the checkpoint again, or go back to an earlier one"
        )


@jax.jit
def _first_not_finite(weights: Float[Array, "n ..."]) -> Int32[Array, ""]:
    """The first index along the first axis at which there is such a value; -1 if there is none."""
    # Not by the maximum, in half the time: over the devices of a mesh that of a NaN and a number may be the number.
    bad = ~jnp.isfinite(weights).all(axis=tuple(range(1, weights.ndim)))
    return jnp.where(bad.any(), jnp.argmax(bad), -1)
