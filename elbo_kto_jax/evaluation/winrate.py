"""The adjusted win rate and its interval (docs/method.md 8)."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

Verdict = Literal["A", "B", "tie", "unparsable"]


class Opinion(NamedTuple):
    """A verdict with the judge's reason, in its own words; "": it gives none."""

    verdict: Verdict
    reason: str = ""


RESAMPLES = 10_000
_SEED = 0  # of the resamples: the same verdicts always have the same interval
_SCORE = {"A": 1.0, "tie": 0.5, "B": 0.0}


@dataclasses.dataclass(frozen=True)
class WinRate:
    """How A fared against B; rates are fractions of 1.

    Attributes:
      adjusted_win_rate: (wins + ties / 2) / comparisons.
      ci95: 95% interval of it; see `win_rate`.
      wins: comparisons that A won.
      ties: comparisons without a winner.
      losses: comparisons that B won.
      comparisons: all that count.
      unparsable: comparisons without a verdict that can be read.
      left_out: prompts with such a comparison; none of their comparisons counts, since one order alone favours a place.
    """

    adjusted_win_rate: float
    ci95: tuple[float, float]
    wins: int
    ties: int
    losses: int
    comparisons: int
    unparsable: int
    left_out: int


def win_rate(verdicts: Sequence[tuple[Verdict, ...]]) -> WinRate:
    """The win rate over prompts, each with its verdicts (the same number for all: one, or one per order).

    The interval is the percentile bootstrap over prompts, so that two orders of one prompt do not count as independent:
    the 2.5th and 97.5th percentile of `RESAMPLES` resampled means, with a fixed seed. Where all prompts have the same
    score it has no width, which says nothing about prompts that were not asked.

    Raises:
      ValueError: no prompts, prompts with differing numbers of verdicts, or none whose verdicts can all be read.
    """
    if not verdicts or len({len(given) for given in verdicts}) != 1 or not verdicts[0]:
        raise ValueError(f"verdicts: expected the same number, at least 1, for at least 1 prompt, got {verdicts[:5]}")
    counted = [given for given in verdicts if "unparsable" not in given]
    if not counted:
        raise ValueError(f"verdicts: expected a prompt whose verdicts can all be read, got {verdicts[:5]}")
    score = np.array([np.mean([_SCORE[verdict] for verdict in given]) for given in counted])
    means = _bootstrap_means(score)
    every = [verdict for given in counted for verdict in given]
    return WinRate(
        adjusted_win_rate=float(score.mean()),
        ci95=(float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))),
        wins=every.count("A"),
        ties=every.count("tie"),
        losses=every.count("B"),
        comparisons=len(every),
        unparsable=sum(given.count("unparsable") for given in verdicts),
        left_out=len(verdicts) - len(counted),
    )


def _bootstrap_means(score: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " resamples"]:
    """Means of resamples of `score`; how often each distinct value is drawn is multinomial, whatever n."""
    values, counts = np.unique(score, return_counts=True)
    drawn = np.random.default_rng(_SEED).multinomial(len(score), counts / len(score), size=RESAMPLES)
    return drawn @ values / len(score)
