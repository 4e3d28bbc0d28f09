"""From repeated draws to variances, biases and costs with intervals, and to a recommendation (docs/estimators.md).

Every figure is a mean over records, or a ratio of two, with a 95% bootstrap interval over the units of the objective
(a record, or a pair of them): their masks are independent of each other, so a unit stands for itself and for its masks.
A figure is {"value", "low", "high"}.

Figures of a batch are those of `batch_size` records, hence of so many units. Its gradient is the mean over units of
gamma = v'(h) beta grad (contrast . B_hat), so its variance is the mean over units of Var(gamma), over their number. The
one thing that couples units, the noise of a reference point, is left out there (it is of the order of 1 / batch size);
the loss has it to first order.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from elbo_kto_jax.diagnosis.measure import Gradients, Setting, Values
from elbo_kto_jax.diffusion.masks import SCHEMES
from elbo_kto_jax.objectives.protocol import ValueFunction

_RESAMPLES = 2000
_COUNT_BINS = 6  # of l / L
_LENGTH_BINS = 3

Figure = dict[str, float]


class Bootstrap:
    """Percentile intervals for means and ratios of means over n units; the same resamples for all of them."""

    def __init__(self, n: int):
        self.units = n
        self._times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).astype(np.float64)

    def mean(self, x: Float64[np.ndarray, " n"], where: Bool[np.ndarray, " n"] | None = None) -> Figure:
        """The mean of x, over the records `where` it is asked for."""
        weight = np.ones(len(x)) if where is None else where.astype(np.float64)
        return self.ratio(np.where(weight > 0, x, 0.0), weight)

    def ratio(self, x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"]) -> Figure:
        """The mean of x over the mean of y; NaN where that is 0 / 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.sum(x) / np.sum(y)
            found = (self._times @ x) / (self._times @ y)
        found = found[np.isfinite(found)]
        low, high = np.percentile(found, (2.5, 97.5)) if len(found) else (np.nan, np.nan)
        return {"value": float(value), "low": float(low), "high": float(high)}


class Analysis:
    """The tables of a diagnosis."""

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
        self.many_reward = self._many(self.reward)
        self.many_margin = self._margin(self.many_reward[:, None])[:, 0]
        self.gradient_variance = {s: self._gradient_moments(s)[0] for s in self.settings}

    def _many(self, found: Mapping[Setting, np.ndarray], without: str = "") -> Float64[np.ndarray, " n"]:
        """The mean over all draws of the schemes but `without`: the value that few draws estimate.

        Draws of infinite variance are left out; NaN where that leaves none.
        """
        used = [s for s in self.settings if SCHEMES[s.scheme].finite_variance and s.scheme != without]
        if not used:
            return np.full(len(self.length), np.nan)
        return np.average([found[s].mean(axis=1) for s in used], axis=0, weights=[s.draws for s in used])

    def _margin(self, reward: Float64[np.ndarray, "n r"], z0: float | None = None) -> Float64[np.ndarray, "u r"]:
        """h of each unit; the records are the batch, from which the reference point is taken unless it is given."""
        contrasted = np.einsum("ucr,c->ur", reward.reshape(-1, self.size, reward.shape[1]), self.objective.contrast)
        if self.objective.coupled:
            contrasted = contrasted - (reward.mean(axis=0) if z0 is None else z0)
        return self.objective.options.beta * contrasted

    def _value(self, margin: Float64[np.ndarray, "u r"], order: int) -> Float64[np.ndarray, "u r"]:
        """The loss of each unit as a function of h, or its derivative of the given order (0, 1, 2)."""
        return self.objective.value(margin, self.is_desirable, order)

    def _by_unit(self, x: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " u"]:
        """The mean over the records of each unit."""
        return x.reshape(-1, self.size).mean(axis=1)

    def _over(self, x: Float64[np.ndarray, " n"], where: Bool[np.ndarray, " n"]) -> Figure:
        """The mean of x over the records `where`."""
        return self.bootstrap.ratio(self._by_unit(np.where(where, x, 0.0)), self._by_unit(where.astype(np.float64)))

    def _gradient_moments(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """Var(gamma) and |E gamma|^2 by unit and group of parameters, both unbiased."""
        found = self.gradients
        slope = self.objective.options.beta * self._value(self._margin(self.reward[setting]), 1)
        a, b = slope[:, :1], slope[:, 1:2]
        signal = a * b * found.product[setting]
        return 0.5 * (a**2 * found.first[setting] + b**2 * found.second[setting]) - signal, signal

    def rows(self) -> list[dict]:
        """One row per setting."""
        return [self._row(s) for s in self.settings]

    def _row(self, setting: Setting) -> dict:
        ratio, size = self.bootstrap.ratio, self.batch_units
        policy, reference, reward = self.values.policy[setting], self.values.reference[setting], self.reward[setting]
        shared, independent = variance(reward), variance(policy) + variance(reference)
        reward_bias = reward.mean(axis=1) - self._many(self.reward, setting.scheme)
        gradient, flops = self.gradient_variance[setting], self._by_unit(self.flops[setting])
        total, seconds = gradient.sum(axis=1), self.gradients.seconds[setting]
        coupled = float(self.objective.coupled)

        def mean(x: np.ndarray) -> Figure:
            return self.bootstrap.mean(x if len(x) == self.bootstrap.units else self._by_unit(x))

        row = {
            "scheme": setting.scheme,
            "draws": setting.draws,
            "finite_variance": SCHEMES[setting.scheme].finite_variance,
            "elbo_variance": mean(variance(policy)),
            "elbo_bias": mean(policy.mean(axis=1) - self._many(self.values.policy, setting.scheme)),
            "reward_variance_shared": mean(shared),
            "reward_variance_independent": mean(independent),
            "independent_over_shared": ratio(self._by_unit(independent), self._by_unit(shared)),
            **{name: mean(x) for name, x in self._of_the_loss(reward).items()},
            "reference_point_variance": mean(coupled * shared / size),
            "reference_point_bias": mean(coupled * reward_bias),
            "gradient_variance": mean(total / size),
            "gradient_variance_by_group": {
                group: mean(gradient[:, g] / size) for g, group in enumerate(self.gradients.groups)
            },
            "gradient_signal": mean(self._gradient_moments(setting)[1].sum(axis=1) / size),
            "flops": mean(flops),
            "seconds": mean(seconds),
            "gradient_variance_times_flops": mean(total / size * np.mean(flops)),
            "gradient_variance_times_seconds": mean(total / size * np.mean(seconds)),
        }
        for name, draws in (("over_uniform", setting.draws), ("over_uniform_twice", 2 * setting.draws)):
            other = self.gradient_variance.get(Setting("uniform", draws))
            row[name] = None if other is None else ratio(total, other.sum(axis=1))
        return row

    def _of_the_loss(self, reward: Float64[np.ndarray, "n r"]) -> dict[str, Float64[np.ndarray, " u"]]:
        """The variance of the loss of a batch, to first order in the noise of its reference point, and its bias."""
        margin, many = self._margin(reward), self.many_margin[:, None]
        # What h adds linearly has mean zero, and would only add noise.
        curved = self._value(margin, 0) - self._value(many, 0) - self._value(many, 1) * (margin - many)
        held = self._margin(reward, z0=float(self.many_reward.mean()))
        of_loss = self._value(held, 0)
        if self.objective.coupled:
            of_loss = of_loss - np.mean(self._value(many, 1)) * self.objective.options.beta * reward
        return {
            "loss_variance": variance(of_loss) / self.batch_units,
            "loss_bias": curved.mean(axis=1),
            "loss_bias_predicted": 0.5 * self._value(many, 2)[:, 0] * variance(margin),
        }

    def breakdown(self) -> list[dict]:
        """Variances by label and by length of the completion, for every setting."""
        edges = np.unique(np.quantile(self.length, np.linspace(0, 1, _LENGTH_BINS + 1)).astype(int))
        bins = [
            ("label", name, self.is_desirable == label) for name, label in (("desirable", True), ("undesirable", False))
        ]
        lows = [int(edges[0]), *(int(edge) + 1 for edge in edges[1:-1])]
        for low, high in zip(lows, edges[1:] if len(edges) > 1 else edges, strict=True):
            name = f"{low} tokens" if low == high else f"{low} to {high} tokens"
            bins.append(("length", name, (self.length >= low) & (self.length <= high)))
        return [
            {
                "scheme": s.scheme,
                "draws": s.draws,
                "by": by,
                "bin": name,
                "records": int(where.sum()),
                "elbo_variance": self._over(variance(self.values.policy[s]), where),
                "reward_variance_shared": self._over(variance(self.reward[s]), where),
                "gradient_variance": self._over(
                    np.repeat(self.gradient_variance[s].sum(axis=1) / self.batch_units, self.size), where
                ),
            }
            for s in self.settings
            for by, name, where in bins
            if where.any()
        ]

    def by_count(self) -> list[dict]:
        """Single draws (L / l) * sum of log p by the hidden share l / L: their mean and variance, that of the reward,
        and the squared length of their gradient. Means over the records that have at least two such draws."""
        values, found = self.values, self.gradients
        n = len(self.length)

        def bin_of(record, count):
            return np.ceil(count / self.length[record] * _COUNT_BINS - 1e-9).astype(int) - 1

        def sums(record, x):
            return np.bincount(record, x, n).astype(np.float64)  # integers where there is nothing to sum

        def moments(record, x, times):
            """Mean and variance of x by record; `times` are the numbers of draws."""
            safe = np.maximum(times, 1)
            average = sums(record, x) / safe
            return average, sums(record, (x - average[record]) ** 2) / np.maximum(times - 1, 1)

        rows = []
        for b in range(_COUNT_BINS):
            here = bin_of(values.record, values.count) == b
            record = values.record[here]
            times = np.bincount(record, minlength=n)
            average, spread = moments(record, values.policy_draw[here], times)
            _, of_reward = moments(record, (values.policy_draw - values.reference_draw)[here], times)
            of_gradient = bin_of(found.single_record, found.single_count) == b
            single = found.single_record[of_gradient]
            singles = np.bincount(single, minlength=n)
            square = sums(single, found.single_square[of_gradient])
            if (times > 1).any():
                rows.append(
                    {
                        "hidden": f"{b / _COUNT_BINS:.2f} to {(b + 1) / _COUNT_BINS:.2f}",
                        "draws": int(times.sum()),
                        "elbo_mean": self._over(average, times > 1),
                        "elbo_variance": self._over(spread, times > 1),
                        "reward_variance": self._over(of_reward, times > 1),
                        "gradient_square": self.bootstrap.ratio(
                            self._by_unit(square), self._by_unit(singles.astype(np.float64))
                        ),
                    }
                )
        return rows

    def recommendation(self) -> dict:
        """The fewest draws whose mask noise is at most the squared length of an example's own gradient, with the scheme
        that has the least noise there; or the most draws measured."""
        draws = sorted({s.draws for s in self.settings})
        # All settings estimate the same signal; those with the most draws best.
        most = [s for s in self.settings if s.draws == draws[-1] and SCHEMES[s.scheme].finite_variance]
        signal = np.mean([self._gradient_moments(s)[1].sum(axis=1) for s in most], axis=0)
        noise = {s: self.gradient_variance[s].sum(axis=1) for s in self.settings}
        if not np.mean(signal) > 0:
            return {
                "scheme": None,
                "draws": None,
                "text": "No recommendation: the gradient is 0, or lost in the noise of these draws; raise --records.",
            }
        for k in draws:
            best = min((s for s in self.settings if s.draws == k), key=lambda s: np.mean(noise[s]))
            if np.mean(noise[best]) <= np.mean(signal):
                break
        share = self.bootstrap.ratio(noise[best], signal)
        alike = [
            s.scheme
            for s in self.settings
            if s.draws == best.draws and s != best and self.bootstrap.ratio(noise[s], noise[best])["low"] <= 1
        ]
        uniform = [k for k in draws if np.mean(noise[Setting("uniform", k)]) <= np.mean(noise[best])]
        text = [
            f"Use estimator.scheme={best.scheme} with estimator.draws={best.draws}: the masks' share of the gradient's "
            f"noise is then {share['value']:.2g} [{share['low']:.2g}, {share['high']:.2g}] times the squared length of "
            "an example's own gradient",
            "beyond that, more examples help more than more draws"
            if np.mean(noise[best]) <= np.mean(signal)
            else f"even {best.draws} draws leave more noise than signal: raise train.global_batch_size too",
            f"uniform needs {uniform[0]} draws for as little noise"
            if uniform
            else f"uniform has more noise even with {draws[-1]} draws",
        ]
        if alike:
            text.append(f"not told apart from it by these records: {', '.join(alike)}")
        return {
            "scheme": best.scheme,
            "draws": best.draws,
            "noise_over_signal": share,
            "uniform_draws": uniform[0] if uniform else None,
            "alike": alike,
            "text": "; ".join(text) + ".",
        }


def variance(x: Float64[np.ndarray, "u r"]) -> Float64[np.ndarray, " u"]:
    """The unbiased variance over the repetitions."""
    return np.var(x, axis=1, ddof=1)


def flat(row: Mapping) -> dict[str, object]:
    """A row of figures as one level of columns: name, name_low, name_high."""
    columns: dict[str, object] = {}
    for key, value in row.items():
        if isinstance(value, Mapping) and "value" in value:
            columns |= {key: value["value"], f"{key}_low": value["low"], f"{key}_high": value["high"]}
        elif isinstance(value, Mapping):
            columns |= flat({f"{key}.{name}": figure for name, figure in value.items()})
        elif value is not None:
            columns[key] = value
    return columns


def columns(rows: Sequence[Mapping]) -> list[str]:
    """The columns of a table of flat rows, in the order met."""
    return list(dict.fromkeys(key for row in rows for key in row))
