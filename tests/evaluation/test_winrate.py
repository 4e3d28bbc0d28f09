"""The adjusted win rate against values worked by hand, its interval against the distribution it estimates."""

import itertools
import math

import pytest

from elbo_kto_jax.evaluation.winrate import win_rate


def binomial_quantile(n: int, p: float, level: float) -> int:
    """The smallest k with P(Binomial(n, p) <= k) >= level."""
    cumulative = itertools.accumulate(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1))
    return next(k for k, below in enumerate(cumulative) if below >= level)


def test_ties_count_half():
    result = win_rate([("A",), ("A",), ("tie",), ("B",), ("tie",)])
    assert (result.wins, result.ties, result.losses, result.comparisons) == (2, 2, 1, 5)
    assert result.adjusted_win_rate == pytest.approx(3 / 5)  # (2 + 2 / 2) / 5


def test_two_orders_of_a_prompt_are_two_comparisons():
    result = win_rate([("A", "A"), ("A", "B"), ("tie", "B")])
    assert (result.wins, result.ties, result.losses, result.comparisons) == (3, 1, 2, 6)
    assert result.adjusted_win_rate == pytest.approx(3.5 / 6)


@pytest.mark.parametrize(("n", "wins"), [(40, 20), (100, 70), (500, 475)])
def test_interval_is_that_of_the_resampled_mean(n, wins):
    """Without ties a resampled mean is Binomial(n, wins / n) / n; 10,000 resamples find its quantiles to one count."""
    result = win_rate([("A",)] * wins + [("B",)] * (n - wins))
    low, high = (binomial_quantile(n, wins / n, level) for level in (0.025, 0.975))
    assert result.ci95[0] * n == pytest.approx(low, abs=1.001)
    assert result.ci95[1] * n == pytest.approx(high, abs=1.001)


def test_ties_narrow_the_interval():
    """Half of the prompts are ties: the variance of a score is half of that without, and the width 1 / sqrt(2)."""
    width = lambda result: result.ci95[1] - result.ci95[0]  # noqa: E731
    decided = width(win_rate([("A",), ("B",)] * 400))
    with_ties = width(win_rate([("A",), ("B",), ("tie",), ("tie",)] * 200))
    assert with_ties / decided == pytest.approx(math.sqrt(0.5), rel=0.05)


def test_two_orders_do_not_count_as_independent():
    """Judged twice with the same verdict, a prompt says no more than judged once."""
    once = win_rate([("A",), ("B",), ("A",), ("tie",)] * 25)
    twice = win_rate([("A", "A"), ("B", "B"), ("A", "A"), ("tie", "tie")] * 25)
    assert twice.ci95 == once.ci95


def test_order_of_prompts_does_not_matter_and_results_repeat():
    verdicts = [("A",)] * 30 + [("tie",)] * 5 + [("B",)] * 15
    assert win_rate(verdicts) == win_rate(verdicts[::-1]) == win_rate(verdicts)


def test_unanimous_verdicts_have_no_width():
    result = win_rate([("A",)] * 8)
    assert result.adjusted_win_rate == 1.0
    assert result.ci95 == (1.0, 1.0)


@pytest.mark.parametrize("verdicts", [[], [()], [("A",), ("A", "B")]])
def test_refuses_verdicts_without_a_mean(verdicts):
    with pytest.raises(ValueError, match="verdicts: expected the same number"):
        win_rate(verdicts)
