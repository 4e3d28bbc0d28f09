"""What an objective is: from the scores of a global batch to a loss, one cotangent per completion, and metrics.

An objective sees the estimates of every draw, and nothing of models, rows or devices. The gradient of the loss goes
through one number per completion, c_b = d loss / d B_theta(b) (docs/method.md 2), so this is all that training needs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Float64, Int32

from elbo_kto_jax.runtime import config
from elbo_kto_jax.runtime.arrays import AnyArray


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an objective wants of the data and of a step."""

    labels: bool  # records without a label are refused
    pairs: bool  # completions 2p and 2p + 1 of a batch are the chosen and the rejected one of a pair
    reference: bool  # the estimates of a reference, on the same masks
    scores: bool  # the cotangents depend on the scores, so a pass without a gradient comes first


class Feedback(NamedTuple):
    """What the data says of the b completions of a global batch; b is static, `is_example` is False on the padding."""

    is_desirable: Bool[AnyArray, " b"]
    is_example: Bool[AnyArray, " b"]
    completion_length: Int32[AnyArray, " b"]  # tokens


class Outcome(NamedTuple):
    """The loss of a batch, and what training does with it.

    Attributes:
      loss: a mean over the batch.
      elbo_cotangent: d loss / d B_theta(b), 1/nats; 0 on the padding.
      metrics: scalars by the name that they have in metrics.jsonl.
      values: the name of what is told of each completion, in nats, where numbers go wrong, and its value.
    """

    loss: Float32[Array, ""]
    elbo_cotangent: Float32[Array, " b"]
    metrics: dict[str, Float32[Array, ""]]
    values: tuple[str, Float32[Array, " b"]]


@runtime_checkable
class Objective(Protocol):
    """One file of this folder; `register` makes it known under `name`."""

    name: ClassVar[str]  # config.objective.name
    needs: ClassVar[Needs]
    options: config.Objective

    def __call__(
        self,
        elbo_policy: Float32[Array, "b k"],
        elbo_ref: Float32[Array, "b k"],
        feedback: Feedback,
    ) -> Outcome:
        """The outcome for a batch; `elbo_ref` is 0 where no reference is needed. To be traced."""

    def held_out(self, values: Float32[np.ndarray, " n"], is_desirable: Bool[np.ndarray, " n"]) -> dict[str, float]:
        """Metrics of all the held-out completions together, given `Outcome.values` of each."""


@runtime_checkable
class ValueFunction(Protocol):
    """An objective whose loss is a mean over units of v(h), with h linear in the rewards: what `diagnose` can take.

    A unit is as many neighbouring completions as there are numbers in `contrast`:

        h = beta * (contrast . their rewards - z0)

    z0 is the mean reward of the batch where the objective is `coupled`, and else 0.
    """

    contrast: ClassVar[tuple[float, ...]]
    options: config.Objective

    @property
    def coupled(self) -> bool:
        """Whether h has a reference point, which couples the completions of a batch."""

    def value(
        self, margin: Float64[np.ndarray, "u r"], is_desirable: Bool[np.ndarray, " n"], order: int
    ) -> Float64[np.ndarray, "u r"]:
        """v(h), or its derivative of order 1 or 2."""


_KNOWN: dict[str, Callable[[config.Objective], Objective]] = {}


def register(objective: type) -> type:
    """Makes a class known as an objective; it is built with config.objective."""
    made: Any = objective  # a class like `Objective`, which its instances are tested for
    _KNOWN[made.name] = made
    return objective


def known() -> dict[str, Callable[[config.Objective], Objective]]:
    """The objectives by name."""
    return dict(sorted(_KNOWN.items()))


def masked_mean(x: Float32[Array, " b"], where: Bool[AnyArray, " b"]) -> Float32[Array, ""]:
    """Mean of x over `where`, NaN where it is empty."""
    return jnp.sum(jnp.where(where, x, 0.0)) / jnp.sum(where)
