"""The tables of a diagnosis: variances, biases and costs with intervals, as rows of figures."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from elbo_kto_jax.diagnosis.analyse import Analysis, variance
from elbo_kto_jax.diagnosis.bootstrap import Figure
from elbo_kto_jax.diagnosis.measure import Setting
from elbo_kto_jax.diffusion.masks import SCHEMES

_COUNT_BINS = 6  # of l / L
_LENGTH_BINS = 3


def by_setting(analysis: Analysis) -> list[dict]:
    """One row per setting."""
    return [_row(analysis, setting) for setting in analysis.settings]


def _row(analysis: Analysis, setting: Setting) -> dict:
    """The figures of one setting."""
    ratio, size = analysis.bootstrap.ratio, analysis.batch_units
    policy, reference, reward = (
        analysis.values.policy[setting],
        analysis.values.reference[setting],
        analysis.reward[setting],
    )
    shared, independent = variance(reward), variance(policy) + variance(reference)
    reward_bias = reward.mean(axis=1) - analysis.many(analysis.reward, setting.scheme)
    gradient, flops = analysis.gradient_variance[setting], analysis.by_unit(analysis.flops[setting])
    total, seconds = gradient.sum(axis=1), analysis.gradients.seconds[setting]
    coupled = float(analysis.objective.coupled)

    def mean(x: np.ndarray) -> Figure:
        return analysis.bootstrap.mean(x if len(x) == analysis.bootstrap.units else analysis.by_unit(x))

    row = {
        "scheme": setting.scheme,
        "draws": setting.draws,
        "finite_variance": SCHEMES[setting.scheme].finite_variance,
        "elbo_variance": mean(variance(policy)),
        "elbo_bias": mean(policy.mean(axis=1) - analysis.many(analysis.values.policy, setting.scheme)),
        "reward_variance_shared": mean(shared),
        "reward_variance_independent": mean(independent),
        "independent_over_shared": ratio(analysis.by_unit(independent), analysis.by_unit(shared)),
        **{name: mean(x) for name, x in _of_the_loss(analysis, reward).items()},
        "reference_point_variance": mean(coupled * shared / size),
        "reference_point_bias": mean(coupled * reward_bias),
        "gradient_variance": mean(total / size),
        "gradient_variance_by_group": {
            group: mean(gradient[:, g] / size) for g, group in enumerate(analysis.gradients.groups)
        },
        "gradient_signal": mean(analysis.gradient_moments(setting)[1].sum(axis=1) / size),
        "flops": mean(flops),
        "seconds": mean(seconds),
        "gradient_variance_times_flops": mean(total / size * np.mean(flops)),
        "gradient_variance_times_seconds": mean(total / size * np.mean(seconds)),
    }
    for name, draws in (("over_uniform", setting.draws), ("over_uniform_twice", 2 * setting.draws)):
        other = analysis.gradient_variance.get(Setting("uniform", draws))
        row[name] = None if other is None else ratio(total, other.sum(axis=1))
    return row


def _of_the_loss(analysis: Analysis, reward: Float64[np.ndarray, "n r"]) -> dict[str, Float64[np.ndarray, " u"]]:
    """The variance of the loss of a batch, to first order in the noise of its reference point, and its bias."""
    margin, many = analysis.margin(reward), analysis.many_margin[:, None]
    # What h adds linearly has mean zero, and would only add noise.
    curved = analysis.value(margin, 0) - analysis.value(many, 0) - analysis.value(many, 1) * (margin - many)
    held = analysis.margin(reward, z0=float(analysis.many_reward.mean()))
    of_loss = analysis.value(held, 0)
    if analysis.objective.coupled:
        of_loss = of_loss - np.mean(analysis.value(many, 1)) * analysis.objective.options.beta * reward
    return {
        "loss_variance": variance(of_loss) / analysis.batch_units,
        "loss_bias": curved.mean(axis=1),
        "loss_bias_predicted": 0.5 * analysis.value(many, 2)[:, 0] * variance(margin),
    }


def breakdown(analysis: Analysis) -> list[dict]:
    """Variances by label and by length of the completion, for every setting."""
    edges = np.unique(np.quantile(analysis.length, np.linspace(0, 1, _LENGTH_BINS + 1)).astype(int))
    bins = [
        ("label", name, analysis.is_desirable == label) for name, label in (("desirable", True), ("undesirable", False))
    ]
    lows = [int(edges[0]), *(int(edge) + 1 for edge in edges[1:-1])]
    for low, high in zip(lows, edges[1:] if len(edges) > 1 else edges, strict=True):
        name = f"{low} tokens" if low == high else f"{low} to {high} tokens"
        bins.append(("length", name, (analysis.length >= low) & (analysis.length <= high)))
    return [
        {
            "scheme": s.scheme,
            "draws": s.draws,
            "by": by,
            "bin": name,
            "records": int(where.sum()),
            "elbo_variance": analysis.over(variance(analysis.values.policy[s]), where),
            "reward_variance_shared": analysis.over(variance(analysis.reward[s]), where),
            "gradient_variance": analysis.over(
                np.repeat(analysis.gradient_variance[s].sum(axis=1) / analysis.batch_units, analysis.size), where
            ),
        }
        for s in analysis.settings
        for by, name, where in bins
        if where.any()
    ]


def by_count(analysis: Analysis) -> list[dict]:
    """Single draws (L / l) * sum of log p by the hidden share l / L: their mean and variance, that of the reward,
    and the squared length of their gradient. Means over the records that have at least two such draws."""
    values, found = analysis.values, analysis.gradients
    n = len(analysis.length)

    def bin_of(record, count):
        return np.ceil(count / analysis.length[record] * _COUNT_BINS - 1e-9).astype(int) - 1

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
                    "elbo_mean": analysis.over(average, times > 1),
                    "elbo_variance": analysis.over(spread, times > 1),
                    "reward_variance": analysis.over(of_reward, times > 1),
                    "gradient_square": analysis.bootstrap.ratio(
                        analysis.by_unit(square), analysis.by_unit(singles.astype(np.float64))
                    ),
                }
            )
    return rows


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
