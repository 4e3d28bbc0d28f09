"""diffusion/masks.py: a pure function of its arguments, with the distribution that docs/method.md 1 and 3 state.

Seeds are fixed, so nothing here is random. Each chi-square test refuses a correct sampler with probability 1e-6 over
the choice of its seed, each test of a mean with probability 6e-5 (4 standard errors).
"""

import functools
import importlib.util
import itertools

import numpy as np
import pytest
from scipy import special, stats

from elbo_kto_jax.diffusion import masks as masks_module
from elbo_kto_jax.diffusion.exact import all_masks, exact_weights

# The same file without the run-time checks of annotations, which take 100 times as long as a draw.
_spec = importlib.util.spec_from_file_location("masks_without_checks", masks_module.__file__)
_unchecked = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_unchecked)

SCHEMES = [name for name, scheme in masks_module.SCHEMES.items() if scheme.unbiased]  # may be trained with
FIXED_L = [name for name in SCHEMES if masks_module.SCHEMES[name].fixes_count]
UNIFORM_L = [name for name in FIXED_L if name != "importance"]  # each draw's l is uniform on 1..L
FALSE_ALARM = 1e-6
PINNED = {  # masks (# = hidden) and weights
    "uniform": (["######", "##.#..", ".....#"], [1.0, 2.0, 6.0]),
    "stratified": (["..###.", "###.##", "#....."], [2.0, 1.2, 6.0]),
    "complementary": (["..###.", "##...#", "######"], [2.0, 2.0, 1.0]),
    "balanced": (["..###.", "###..#", "######"], [2.0, 1.5, 1.0]),
    "importance": (["..#.#.", "##...#", "######"], [2.57381, 2.10151, 1.48599]),
    "bernoulli": ([".###..", "##....", "#.#.##"], [6.34201, 1.68124, 1.15077]),
}


def draw(scheme, *, draws, length, words=(3, 5), seed=0, epoch=0):
    """The draws of the example whose id hashes to `words`."""
    id_words = np.array(words, np.uint32)
    return _unchecked.draw_masks(scheme, seed=seed, id_words=id_words, epoch=epoch, draws=draws, length=length)


@functools.cache
def many(scheme, ids, *, draws, length):
    """Masks [ids, draws, length] and weights [ids, draws] of as many examples."""
    found = [draw(scheme, draws=draws, length=length, words=(i, i // 2)) for i in range(ids)]
    return np.stack([d.mask for d in found]), np.stack([d.weight for d in found])


def number(mask):
    """The mask [..., length] as a binary number, token i its bit i: row n - 1 of `all_masks`."""
    return mask @ (1 << np.arange(mask.shape[-1]))


def count_probabilities(scheme, length):
    """q(l) for l = 1..length of a scheme that fixes l."""
    chance = np.arange(1, length + 1) ** (-0.5 if scheme == "importance" else 0.0)
    return chance / chance.sum()


def mask_probabilities(scheme, length):
    """The probability of every mask by its number, 0 being the empty one."""
    sizes = np.concatenate([[0], all_masks(length).sum(axis=1)])
    if scheme == "bernoulli":  # integral over t of t^l (1 - t)^(L - l)
        return 1 / ((length + 1) * special.binom(length, sizes))
    return np.concatenate([[0.0], count_probabilities(scheme, length)])[sizes] / special.binom(length, sizes)


def assert_distributed(values, probabilities):
    """Chi-square: `values` are draws of 0..n-1 with the given `probabilities`."""
    counts, possible = np.bincount(values, minlength=len(probabilities)), probabilities > 0
    assert not counts[~possible].any()
    expected = len(values) * probabilities[possible]
    assert expected.min() > 20
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    assert statistic < stats.chi2.isf(FALSE_ALARM, possible.sum() - 1)


# ---- a pure function ----


def test_pinned_values():
    """These masks are part of every cached reference and of every run that is resumed: they may never change."""
    assert PINNED.keys() == set(SCHEMES)
    for scheme, (masks, weights) in PINNED.items():
        found = draw(scheme, draws=3, length=6, words=(0x01234567, 0x89ABCDEF), seed=7, epoch=2)
        assert ["".join(".#"[int(hidden)] for hidden in mask) for mask in found.mask] == masks
        np.testing.assert_allclose(found.weight, weights, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_but_the_arguments_counts(scheme):
    first = draw(scheme, draws=5, length=40)
    assert first.mask.shape == (5, 40)
    assert first.mask.dtype == bool
    assert first.weight.dtype == np.float32
    np.random.seed(1)
    draw(scheme, draws=2, length=7, seed=3)
    for a, b in zip(first, draw(scheme, draws=5, length=40), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({row.tobytes() for row in first.mask}) == 5


@pytest.mark.parametrize("scheme", ["uniform", "bernoulli"])
def test_a_draw_does_not_depend_on_the_number_of_draws(scheme):
    few, more = draw(scheme, draws=2, length=30), draw(scheme, draws=9, length=30)
    np.testing.assert_array_equal(few.mask, more.mask[:2])
    np.testing.assert_array_equal(few.weight, more.weight[:2])


# ---- distribution ----


@pytest.mark.parametrize(("draws", "length"), [(1, 3), (3, 4)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_distribution_of_the_masks_of_each_draw(scheme, draws, length):
    """The joint distribution of l and of the mask given l: every mask has a number."""
    masks, _ = many(scheme, 1500, draws=draws, length=length)
    for k in range(draws):
        assert_distributed(number(masks[:, k]), mask_probabilities(scheme, length))


@pytest.mark.parametrize("scheme", FIXED_L)
def test_distribution_of_the_number_hidden(scheme):
    masks, _ = many(scheme, 600, draws=3, length=16)
    for sizes in masks.sum(axis=2).T:
        assert_distributed(sizes - 1, count_probabilities(scheme, 16))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("changed", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "epoch", "example"])
def test_seeds_epochs_and_examples_are_independent(scheme, changed):
    """The joint distribution of a mask and of the one after a change is the product of theirs."""
    pairs = []
    for i in range(1000):
        before, after = (
            number(draw(scheme, draws=1, length=2, seed=seed, epoch=epoch, words=(i, word)).mask[0])
            for seed, epoch, word in ((0, 0, 0), changed)
        )
        pairs.append(4 * before + after)
    probabilities = mask_probabilities(scheme, 2)
    assert_distributed(np.array(pairs), np.outer(probabilities, probabilities).ravel())


@pytest.mark.parametrize("scheme", ["uniform", "bernoulli"])
def test_draws_of_an_example_are_independent(scheme):
    masks, _ = many(scheme, 800, draws=3, length=2)
    probabilities = mask_probabilities(scheme, 2)
    for a, b in itertools.combinations(range(3), 2):
        pairs = 4 * number(masks[:, a]) + number(masks[:, b])
        assert_distributed(pairs, np.outer(probabilities, probabilities).ravel())


def test_rate_of_bernoulli_is_uniform():
    masks, weights = many("bernoulli", 300, draws=2, length=400)
    for rate, hidden in zip(1 / weights.T, masks.mean(axis=2).T, strict=True):
        assert stats.kstest(rate, "uniform").pvalue > FALSE_ALARM
        deviation = (hidden - rate) / np.sqrt(rate * (1 - rate) / 400 + 1e-6)
        assert np.abs(deviation).max() < 6


@pytest.mark.parametrize("scheme", UNIFORM_L)
def test_weight_is_length_over_number_hidden(scheme):
    masks, weights = many(scheme, 100, draws=4, length=7)
    np.testing.assert_array_equal(weights, (7 / masks.sum(axis=2)).astype(np.float32))


def test_weight_of_importance():
    """1 / (l q(l)), which L / l is where q(l) = 1 / L."""
    masks, weights = many("importance", 100, draws=4, length=7)
    counts = masks.sum(axis=2)
    expected = 1 / (counts * count_probabilities("importance", 7)[counts - 1])
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


# ---- unbiased ----


def assert_mean(samples, expected):
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - expected), 4 * error + 1e-6 * abs(expected))


@pytest.mark.parametrize("length", [2, 6])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_draw_and_their_mean_are_unbiased(scheme, length):
    """Against the exact ELBO of a table of sums of log-probabilities, one for every mask.

    1/t has infinite variance: of bernoulli the part with t > 0.05 is compared, whose integral is known too.
    """
    sums = -np.random.default_rng(length).exponential(10.0, 2**length - 1)
    exact = exact_weights(all_masks(length))
    masks, weights = many(scheme, 2000, draws=5, length=length)
    estimates = weights * np.concatenate([[0.0], sums])[number(masks)]
    if scheme == "bernoulli":
        estimates = np.where(weights < 20, estimates, 0.0)
        sizes = all_masks(length).sum(axis=1)
        exact = exact * special.betaincc(sizes, length - sizes + 1, 0.05)
    assert_mean(estimates, exact @ sums)
    assert_mean(estimates.mean(axis=1), exact @ sums)


# ---- what stratified and complementary add ----


@pytest.mark.parametrize(("draws", "length"), [(4, 12), (5, 35), (8, 8), (1, 6)])
def test_stratified_hides_one_number_of_each_stratum(draws, length):
    masks, _ = many("stratified", 50, draws=draws, length=length)
    strata = (masks.sum(axis=2) - 1) // (length // draws)
    np.testing.assert_array_equal(np.sort(strata, axis=1), np.broadcast_to(np.arange(draws), strata.shape))


@pytest.mark.parametrize(("draws", "length"), [(2, 5), (6, 9), (5, 4), (1, 3)])
def test_complementary_pairs_cover_every_token_once(draws, length):
    """Unless everything is hidden, in both. An odd number of draws leaves the last one alone; l is stratified."""
    masks, _ = many("complementary", 100, draws=draws, length=length)
    first, second = masks[:, 0 : 2 * (draws // 2) : 2], masks[:, 1::2]
    covered = first.astype(int) + second
    everything = first.all(axis=2, keepdims=True)
    np.testing.assert_array_equal(covered, np.broadcast_to(np.where(everything, 2, 1), covered.shape))
    if draws > 1:
        assert everything.any()
        assert not everything.all()
    if draws == 6:
        strata = (masks[:, ::2].sum(axis=2) - 1) // (length // 3)
        np.testing.assert_array_equal(np.sort(strata, axis=1), np.broadcast_to(np.arange(3), strata.shape))


@pytest.mark.parametrize("scheme", ["balanced", "importance"])
@pytest.mark.parametrize(("draws", "length"), [(2, 5), (4, 30), (7, 9), (1, 3)])
def test_balanced_draws_hide_what_weighs_least(scheme, draws, length):
    """In the order of l, each draw hides the tokens with the least weight so far: none of them more than any other."""
    masks, weights = many(scheme, 50, draws=draws, length=length)
    for mask, weight in zip(masks, weights, strict=True):
        covered = np.zeros(length)
        for k in np.argsort(mask.sum(axis=1), kind="stable"):
            others = covered[~mask[k]]
            assert not others.size or covered[mask[k]].max() <= others.min() * (1 + 1e-6)
            covered += weight[k] * mask[k]


@pytest.mark.parametrize(("draws", "length"), [(2, 5), (6, 9), (5, 4)])
def test_balanced_pairs_have_mirrored_counts(draws, length):
    """l and L + 1 - l, l stratified over the pairs; an odd number of draws leaves the last one alone."""
    counts = many("balanced", 100, draws=draws, length=length)[0].sum(axis=2)
    pairs = counts[:, 0 : 2 * (draws // 2) : 2] + counts[:, 1::2]
    np.testing.assert_array_equal(pairs, np.full(pairs.shape, length + 1))
    if draws == 6:
        strata = (counts[:, ::2] - 1) // (length // 3)
        np.testing.assert_array_equal(np.sort(strata, axis=1), np.broadcast_to(np.arange(3), strata.shape))


@pytest.mark.parametrize("draws", [2, 4, 8])
def test_what_l_adds_in_proportion_cancels_in_balanced_pairs(draws):
    """With log p = a + b l at every hidden token, whatever is hidden: schemes without such pairs vary then."""
    spread = {}
    for scheme in ("uniform", "stratified", "complementary", "balanced"):
        masks, weights = many(scheme, 40, draws=draws, length=11)
        counts = masks.sum(axis=2)
        spread[scheme] = np.std(np.mean(weights * counts * (-3.0 + 0.2 * counts), axis=1))
    assert spread["balanced"] < 1e-5
    assert min(value for scheme, value in spread.items() if scheme != "balanced") > 0.1


def test_importance_halves_the_noise_of_independent_tokens():
    """The case that q(l) ~ 1 / sqrt(l) is made for: log p of independent noise at every hidden token of every mask.

    Its variance for one draw is sum_l 1 / (l^2 q(l)) times l: 200 H(200) with l uniform, and about 4 * 200 with this q.
    """
    rng = np.random.default_rng(0)
    found = {}
    for scheme in ("uniform", "importance"):
        masks, weights = many(scheme, 4000, draws=1, length=200)
        found[scheme] = np.mean((weights * np.sqrt(masks.sum(axis=2)) * rng.standard_normal(weights.shape)) ** 2)
    assert found["importance"] < 0.8 * found["uniform"]
    chance = count_probabilities("importance", 200)
    expected = np.sum(1 / (np.arange(1, 201) * chance))
    assert found["importance"] == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("scheme", FIXED_L)
@pytest.mark.parametrize("draws", [1, 2, 3])
def test_a_single_token_is_always_hidden(scheme, draws):
    masks, weights = draw(scheme, draws=draws, length=1)
    np.testing.assert_array_equal(masks, np.ones((draws, 1), bool))
    np.testing.assert_array_equal(weights, np.ones(draws))


def test_annotations_hold():
    for scheme in SCHEMES:
        id_words = np.array([1, 2], np.uint32)
        found = masks_module.draw_masks(scheme, seed=0, id_words=id_words, epoch=0, draws=3, length=4)
        np.testing.assert_array_equal(found.mask, draw(scheme, draws=3, length=4, words=(1, 2)).mask)


# ---- errors ----


@pytest.mark.parametrize(
    ("scheme", "length", "message"), [("uniform", 0, "length: .* got 0"), ("fixed_l", 3, "scheme: .* got 'fixed_l'")]
)
def test_refuses(scheme, length, message):
    with pytest.raises(ValueError, match=message):
        draw(scheme, draws=1, length=length)
