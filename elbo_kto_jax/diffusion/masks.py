"""The one mask sampler: which completion tokens are hidden in each draw, and its weight (docs/method.md 1, 3).

A draw hides a set M of the completion's L tokens and estimates the ELBO by `weight * sum_{i in M} log p(y_i | rest)`.
Every scheme but the last makes each single draw an unbiased estimator, so any average of draws is one:

    uniform        l ~ U{1..L}, M uniform among the sets of l tokens, weight L / l          (the paper's, "fixed l")
    bernoulli      t ~ U(0, 1], each token hidden with probability t, weight 1 / t
    stratified     uniform, with l_k = 1 + floor(L * frac(u + k / K)): one random shift u spreads the K values of l
    complementary  draws come in pairs: M with l as in stratified over the pairs, then its complement with L - l (which
                   is uniform too); where l = L the complement would be empty, so the second draw hides everything too
    balanced       pairs with l and L + 1 - l, l as in complementary: what l adds in proportion cancels in a pair. In
                   the order of l, each draw hides the tokens that weigh least in the draws before it
    importance     balanced, with l ~ q(l) ~ 1 / sqrt(l) at q's quantiles u and 1 - u, and weight 1 / (l q(l)): in a
                   long completion the few hidden tokens of a small l estimate worst, so small l are drawn more often

    likelihood     uniform, with l_k = ((round(j + k L / K) - 1) mod L) + 1 for one random j in 1..L, the sum rounded
                   half to even: the schedule of the published likelihoods (docs/method.md 7). An l_k whose k L / K is
                   half a token off a whole number falls on even numbers, a small bias that the published numbers have;
                   this scheme is for evaluation and not for training

An odd number of draws leaves the last pair without its second draw. docs/estimators.md has the derivations, and which
scheme is best when; the command `diagnose` measures it.

Masks are a pure function of (seed, example id, epoch, draw), by a counter-based generator (Philox): neither the batch,
the order, the number of hosts, a restart, packing nor the platform changes them. They are drawn on the host, beside
the packing that needs them, and reach the device as positions.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt32

from elbo_kto_jax.runtime.errors import UserError

_SHARED = 2**32  # counter word of the numbers that all draws of an example share; draws are below it


class Scheme(NamedTuple):
    """A mask scheme and its properties.

    Attributes:
      draw: (uniforms, draws, length) -> Draws.
      unbiased: each draw alone is an unbiased estimator, so that the scheme may be trained with.
      finite_variance: a draw's weight is bounded, so that many draws can stand for the value itself.
      fixes_count: l is drawn first, and then a set of l tokens.
    """

    draw: Callable[..., "Draws"]
    unbiased: bool = True
    finite_variance: bool = True
    fixes_count: bool = True


class Draws(NamedTuple):
    """K masks of one completion of L tokens, True = hidden and scored, and the weight of each draw's sum."""

    mask: Bool[np.ndarray, "k l"]
    weight: Float32[np.ndarray, " k"]


def draw_masks(
    scheme: str, *, seed: int, id_words: UInt32[np.ndarray, "2"], epoch: int, draws: int, length: int
) -> Draws:
    """The `draws` masks of the example `id_words` (64 bits of its id's hash) with `length` >= 1 completion tokens.

    Raises:
      ValueError: an unknown scheme, or no token to hide.
    """
    if length < 1:
        raise ValueError(f"length: expected at least 1 completion token, got {length}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    key = np.frombuffer(hashlib.blake2b(f"masks:{seed}".encode(), digest_size=16).digest(), np.uint64)
    example = int(id_words[0]) << 32 | int(id_words[1])

    def uniforms(draw: int, count: int) -> np.ndarray:
        """`count` float64 in [0, 1) of the stream (seed, example, epoch, draw)."""
        bits = np.random.Philox(key=key, counter=[0, draw, epoch, example]).random_raw(count)
        return (bits >> np.uint64(11)) * 2.0**-53

    return SCHEMES[scheme].draw(uniforms, draws, length)


def _hide_lowest(noise: np.ndarray, count: int) -> np.ndarray:
    """The mask of the `count` positions with the lowest noise: a uniform set of that size."""
    mask = np.zeros(noise.shape, bool)
    mask[np.argsort(noise, kind="stable")[:count]] = True
    return mask


def _fixed_l(noise: list[np.ndarray], counts: np.ndarray) -> Draws:
    length = len(noise[0])
    mask = np.stack([_hide_lowest(row, int(count)) for row, count in zip(noise, counts, strict=True)])
    return Draws(mask, (length / counts).astype(np.float32))


def _uniform(uniforms, draws: int, length: int) -> Draws:
    numbers = [uniforms(k, 1 + length) for k in range(draws)]
    counts = np.array([1 + int(row[0] * length) for row in numbers])
    return _fixed_l([row[1:] for row in numbers], counts)


def _bernoulli(uniforms, draws: int, length: int) -> Draws:
    numbers = [uniforms(k, 1 + length) for k in range(draws)]
    rate = np.array([1.0 - row[0] for row in numbers])  # in (0, 1]
    mask = np.stack([row[1:] < t for row, t in zip(numbers, rate, strict=True)])
    return Draws(mask, (1.0 / rate).astype(np.float32))


def _stratified_counts(uniforms, strata: int, length: int) -> np.ndarray:
    shift = uniforms(_SHARED, 1)[0]
    return 1 + np.floor((shift + np.arange(strata) / strata) % 1.0 * length).astype(int)


def _stratified(uniforms, draws: int, length: int) -> Draws:
    return _fixed_l([uniforms(k, length) for k in range(draws)], _stratified_counts(uniforms, draws, length))


def _complementary(uniforms, draws: int, length: int) -> Draws:
    pairs = -(-draws // 2)
    counts = _stratified_counts(uniforms, pairs, length)
    first = _fixed_l([uniforms(2 * j, length) for j in range(pairs)], counts)
    everything = (counts == length)[:, None]
    second = ~first.mask | everything
    mask = np.stack([first.mask, second], axis=1).reshape(2 * pairs, length)[:draws]
    return Draws(mask, (length / mask.sum(axis=1)).astype(np.float32))


def _balanced(uniforms, draws: int, length: int) -> Draws:
    return _balanced_pairs(uniforms, draws, np.ones(length))


def _importance(uniforms, draws: int, length: int) -> Draws:
    return _balanced_pairs(uniforms, draws, 1 / np.sqrt(np.arange(1, length + 1)))


def _balanced_pairs(uniforms, draws: int, chance: np.ndarray) -> Draws:
    """Pairs of draws at the quantiles u and 1 - u of l, which has probabilities in proportion to `chance`.

    Which tokens are hidden follows from the l's and from noise alone, so no token is preferred: given its l, the mask
    of each draw is a uniform set.
    """
    length, pairs = len(chance), -(-draws // 2)
    total = np.cumsum(chance)
    bounds = total[:-1] / total[-1]
    quantile = (uniforms(_SHARED, 1)[0] + np.arange(pairs) / pairs) % 1.0
    pair = [np.searchsorted(bounds, quantile, "right"), np.searchsorted(bounds, 1.0 - quantile, "left")]
    counts = 1 + np.stack(pair, axis=1).ravel()[:draws]
    weight = total[-1] / (counts * chance[counts - 1])
    mask, covered = np.zeros((draws, length), bool), np.zeros(length)
    for k in np.argsort(counts, kind="stable").tolist():
        mask[k, np.lexsort((uniforms(k, length), covered))[: counts[k]]] = True
        covered += weight[k] * mask[k]
    return Draws(mask, weight.astype(np.float32))


def _likelihood(uniforms, draws: int, length: int) -> Draws:
    first = 1 + int(uniforms(_SHARED, 1)[0] * length)
    return _fixed_l([uniforms(k, length) for k in range(draws)], spread_counts(first, draws, length))


def spread_counts(first: int, draws: int, length: int) -> Int64[np.ndarray, " draws"]:
    """How many of `length` tokens each of `draws` masks hides, spread evenly over 1..length from `first` on.

    ((round(first + k * length / draws) - 1) mod length) + 1; the sum is rounded, half to even.

    Raises:
      ValueError: an argument is out of range.
    """
    if draws < 1 or not 1 <= first <= length:
        raise ValueError(
            f"first, length, draws: expected 1 <= first <= length and draws >= 1, got {first}, {length}, {draws}"
        )
    sums = np.round(first + np.arange(draws) * length / draws)  # np.round rounds half to even
    return (sums.astype(np.int64) - 1) % length + 1


SCHEMES = {
    "uniform": Scheme(_uniform),
    "bernoulli": Scheme(_bernoulli, finite_variance=False, fixes_count=False),
    "stratified": Scheme(_stratified),
    "complementary": Scheme(_complementary),
    "balanced": Scheme(_balanced),
    "importance": Scheme(_importance),
    "likelihood": Scheme(_likelihood, unbiased=False),
}


def check_scheme(name: str) -> None:
    """Raises UserError where config.estimator.scheme names no scheme that can be trained with."""
    names = [known for known, scheme in SCHEMES.items() if scheme.unbiased]
    if name not in names:
        raise UserError(f"config.estimator.scheme: expected one of {', '.join(map(repr, names))}, got {name[:100]!r}")
