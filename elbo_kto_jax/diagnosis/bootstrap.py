"""Means over records, and ratios of two, with 95% bootstrap intervals over the units of an objective."""

import numpy as np
from jaxtyping import Bool, Float64

_RESAMPLES = 2000

Figure = dict[str, float]  # value, low, high


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
