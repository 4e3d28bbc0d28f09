"""From repeated draws to rewards, margins and the variance of gradients (docs/estimators.md); tables.py shows them.

Every figure is a mean over records, or a ratio of two, with a 95% bootstrap interval over the units of the objective
(a record, or a pair of them): their masks are independent of each other, so a unit stands for itself and for its masks.
A figure is {"value", "low", "high"}.

Figures of a batch are those of `batch_size` records, hence of so many units. Its gradient is the mean over units of
gamma = v'(h) beta grad (contrast . B_hat), so its variance is the mean over units of Var(gamma), over their number. The
one thing that couples units, the noise of a reference point, is left out there (it is of the order of 1 / batch size);
the loss has it to first order.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float64, Int64

from elbo_kto_jax.diagnosis.bootstrap import Bootstrap, Figure
from elbo_kto_jax.diagnosis.measure import Gradients, Setting, Values
from elbo_kto_jax.diffusion.masks import SCHEMES
from elbo_kto_jax.objectives.protocol import ValueFunction


class Analysis:
    """What the tables of a diagnosis are made of: rewards, margins and gradients, and their means over records."""

    def __init__(
        self,
        values: Values,
        gradients: Gradients,
        *,
        objective: ValueFunction,
        length: Int64[np.ndarray, " n"],
        is_desirable: Bool[np.ndarray, " n"],
        flops: Mapping[Setting, Float64[np.ndarray, " n"]],
        batch_size: int,
    ):
        """`length` are the records' completion tokens, `flops` those of a training step's two passes over their draws,
        forward and backward."""
        self.values, self.gradients, self.objective = values, gradients, objective
        self.length, self.is_desirable, self.flops = length, is_desirable, flops
        self.size = len(objective.contrast)  # records of a unit
        self.batch_units = batch_size / self.size
        self.bootstrap = Bootstrap(len(length) // self.size)
        self.settings = list(values.policy)
        self.reward = {s: values.policy[s] - values.reference[s] for s in self.settings}
        self.many_reward = self.many(self.reward)
        self.many_margin = self.margin(self.many_reward[:, None])[:, 0]
        self.gradient_variance = {s: self.gradient_moments(s)[0] for s in self.settings}

    def many(self, found: Mapping[Setting, np.ndarray], without: str = "") -> Float64[np.ndarray, " n"]:
        """The mean over all draws of the schemes but `without`: the value that few draws estimate.

        Draws of infinite variance are left out; NaN where that leaves none.
        """
        used = [s for s in self.settings if SCHEMES[s.scheme].finite_variance and s.scheme != without]
        if not used:
            return np.full(len(self.length), np.nan)
        return np.average([found[s].mean(axis=1) for s in used], axis=0, weights=[s.draws for s in used])

    def margin(self, reward: Float64[np.ndarray, "n r"], z0: float | None = None) -> Float64[np.ndarray, "u r"]:
        """h of each unit; the records are the batch, from which the reference point is taken unless it is given."""
        contrasted = np.einsum("ucr,c->ur", reward.reshape(-1, self.size, reward.shape[1]), self.objective.contrast)
        if self.objective.coupled:
            contrasted = contrasted - (reward.mean(axis=0) if z0 is None else z0)
        return self.objective.options.beta * contrasted

    def value(self, margin: Float64[np.ndarray, "u r"], order: int) -> Float64[np.ndarray, "u r"]:
        """The loss of each unit as a function of h, or its derivative of the given order (0, 1, 2)."""
        return self.objective.value(margin, self.is_desirable, order)

    def by_unit(self, x: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " u"]:
        """The mean over the records of each unit."""
        return x.reshape(-1, self.size).mean(axis=1)

    def over(self, x: Float64[np.ndarray, " n"], where: Bool[np.ndarray, " n"]) -> Figure:
        """The mean of x over the records `where`."""
        return self.bootstrap.ratio(self.by_unit(np.where(where, x, 0.0)), self.by_unit(where.astype(np.float64)))

    def gradient_moments(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """Var(gamma) and |E gamma|^2 by unit and group of parameters, both unbiased."""
        found = self.gradients
        slope = self.objective.options.beta * self.value(self.margin(self.reward[setting]), 1)
        a, b = slope[:, :1], slope[:, 1:2]
        signal = a * b * found.product[setting]
        return 0.5 * (a**2 * found.first[setting] + b**2 * found.second[setting]) - signal, signal


def variance(x: Float64[np.ndarray, "u r"]) -> Float64[np.ndarray, " u"]:
    """The unbiased variance over the repetitions."""
    return np.var(x, axis=1, ddof=1)
