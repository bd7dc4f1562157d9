"""Intervals, tests and stability: against slow ones written out, and in simulations."""

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr

from moesteer.detection.counts import RoutingCounts, count_routing
from moesteer.detection.detectors import DETECTORS
from moesteer.detection.resampling import halves
from moesteer.detection.significance import (
    SPLITS,
    bootstrapped,
    false_discovery_rate,
    permutation_test,
    sign_flip_test,
    split_half_stability,
)

RISK_DIFFERENCE = DETECTORS["risk-difference"].parts, DETECTORS["risk-difference"].score

# --- intervals ------------------------------------------------------------------------------------


def bootstrap_interval(counts: RoutingCounts, **options) -> tuple[np.ndarray, np.ndarray]:
    found = bootstrapped(*RISK_DIFFERENCE, counts, **options)
    return found.low, found.high


def simulated(
    generator: np.random.Generator, *, pairs: int = 60, tokens: int = 40
) -> RoutingCounts:
    """One layer; each text has a rate of its own around 0.5 (A) and 0.3 (B) for expert 0.

    The tokens of a text so go together, as they do in a model.
    """
    lengths = generator.integers(tokens // 2, tokens * 2, size=(pairs, 2))
    rates = np.stack([generator.beta(2, 2, pairs), generator.beta(1.5, 3.5, pairs)], axis=-1)
    chosen = generator.binomial(lengths, rates)
    selected = np.stack([chosen, lengths - chosen], axis=-1)[:, :, None, :]
    return RoutingCounts(selected, lengths)


TRUTH = 0.5 - 0.3


def test_against_a_bootstrap_written_out():
    counts = simulated(np.random.default_rng(0), pairs=12)
    generator = np.random.default_rng(1)
    scores = []
    for _ in range(4000):
        drawn = generator.integers(0, 12, size=12)
        a = sum(counts.selected[i, 0, 0, 0] for i in drawn) / sum(
            counts.tokens[i, 0] for i in drawn
        )
        b = sum(counts.selected[i, 1, 0, 0] for i in drawn) / sum(
            counts.tokens[i, 1] for i in drawn
        )
        scores.append(a - b)
    low, high = bootstrap_interval(counts, resamples=4000)
    expected = np.quantile(scores, [0.025, 0.975])
    np.testing.assert_allclose([low[0, 0], high[0, 0]], expected, atol=0.015)
    # The other expert takes all the remaining tokens: its interval is the mirror image.
    np.testing.assert_allclose([low[0, 1], high[0, 1]], [-high[0, 0], -low[0, 0]], atol=1e-6)


def token_interval(counts: RoutingCounts) -> tuple[float, float]:
    """The textbook interval that takes tokens for independent."""
    n_a, n_b = counts.tokens.sum(0)
    a, b = counts.selected[:, 0, 0, 0].sum() / n_a, counts.selected[:, 1, 0, 0].sum() / n_b
    half = 1.96 * np.sqrt(a * (1 - a) / n_a + b * (1 - b) / n_b)
    return a - b - half, a - b + half


def test_a_95_percent_interval_holds_the_truth_95_percent_of_the_time():
    ours = theirs = 0
    for seed in range(200):
        counts = simulated(np.random.default_rng(seed))
        low, high = bootstrap_interval(counts, resamples=400, seed=seed)
        ours += low[0, 0] <= TRUTH <= high[0, 0]
        by_token = token_interval(counts)
        theirs += by_token[0] <= TRUTH <= by_token[1]
    assert 180 <= ours <= 198
    assert theirs < 120  # why pairs are drawn, not tokens


def test_a_level_is_a_width():
    counts = simulated(np.random.default_rng(2))
    widths = []
    for level in (0.5, 0.9, 0.99):
        low, high = bootstrap_interval(counts, level=level)
        value = bootstrapped(*RISK_DIFFERENCE, counts, level=level).value
        assert (low <= value).all()
        assert (value <= high).all()
        widths.append(float((high - low)[0, 0]))
    assert widths[0] < widths[1] < widths[2]


def test_a_pair_is_drawn_with_both_its_sides():
    # Text by text A has 0.3 more than B, whatever the text: the difference is as good as certain,
    # though either side alone is not.
    rates = np.linspace(0.3, 0.9, 10)
    chosen = np.stack([rates * 100, (rates - 0.3) * 100], axis=-1).round().astype(np.int64)
    counts = RoutingCounts(chosen[:, :, None, None], np.full((10, 2), 100))
    low, high = bootstrap_interval(counts)
    assert low[0, 0] == pytest.approx(0.3, abs=1e-6)
    assert high[0, 0] == pytest.approx(0.3, abs=1e-6)


def test_the_seed_decides():
    counts = simulated(np.random.default_rng(3))
    one, same, other = (bootstrap_interval(counts, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_one_pair_has_no_interval():
    found = bootstrapped(*RISK_DIFFERENCE, simulated(np.random.default_rng(0), pairs=1))
    np.testing.assert_array_equal(found.low, found.value)
    np.testing.assert_array_equal(found.high, found.value)
    assert found.interval == "none: one pair can't be resampled"


# --- p ------------------------------------------------------------------------------------------


def exact_p(differences: np.ndarray) -> float:
    """Of all the ways to swap sides, the share that gets as far from 0 as what was seen."""
    flipped = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    return float(np.mean(np.array(flipped) >= abs(sum(differences)) - 1e-12))


def test_p_against_all_swaps():
    differences = np.random.default_rng(0).normal(0.3, 1, size=(9, 2, 5))
    found = sign_flip_test(differences, permutations=20_000)
    expected = [[exact_p(differences[:, layer, e]) for e in range(5)] for layer in range(2)]
    np.testing.assert_allclose(found, expected, atol=0.015)
    assert found.min() < 0.1  # not all of one kind
    assert found.max() > 0.5


def test_a_sum_that_is_only_rounded_otherwise_counts_as_reached():
    # Eleven steps up and nine down: swaps get as far unless ten are up and ten down, whatever the
    # steps (0.1, …) add up to in floats.
    steps = np.tile([0.1, -0.1], 10)
    steps[1] = 0.1
    differences = np.linspace(1, 9, 50) * steps[:, None, None]
    expected = 1 - comb(20, 10) / 2**20
    np.testing.assert_allclose(sign_flip_test(differences), expected, atol=0.05)


def test_the_bound_is_used_only_where_no_permutation_got_there():
    differences = np.random.default_rng(0).normal(0.45, 1, size=(40, 1, 400))
    p = sign_flip_test(differences, permutations=50)
    bound = sign_flip_test(differences, permutations=0)
    reached = p > 1 / 51
    np.testing.assert_allclose(51 * p[reached], (51 * p[reached]).round())
    np.testing.assert_allclose(p[~reached], np.minimum(bound, 1 / 51)[~reached])
    assert (reached & (bound < p)).any()  # there it would have been tempting


numbers = st.one_of(st.just(0.0), st.floats(0.01, 1), st.floats(-1, -0.01))


@given(arrays(np.float64, st.integers(1, 9), elements=numbers))
def test_the_bound_is_never_below_the_exact_p(differences: np.ndarray):
    bound = sign_flip_test(differences[:, None, None], permutations=0)
    assert bound.item() >= exact_p(differences) - 1e-12


@given(arrays(np.float64, (6, 2, 3), elements=numbers))
def test_p_does_not_depend_on_which_side_is_a_or_on_the_scale(differences: np.ndarray):
    p = sign_flip_test(differences, permutations=50)
    np.testing.assert_array_equal(sign_flip_test(-differences, permutations=50), p)
    np.testing.assert_array_equal(sign_flip_test(8 * differences, permutations=50), p)
    assert (p > 0).all()
    assert (p <= 1).all()


def test_counts_are_tested_by_the_difference_of_rates_of_each_pair():
    counts = overdispersed(np.random.default_rng(0))
    differences = np.array(
        [
            [[a[e] / n_a - b[e] / n_b for e in range(EXPERTS)] for a, b in zip(*sides, strict=True)]
            for sides, (n_a, n_b) in zip(counts.selected, counts.tokens, strict=True)
        ]
    )
    np.testing.assert_allclose(permutation_test(counts), sign_flip_test(differences))


def test_degenerate_differences():
    one_pair = np.array([[[0.7, -0.2, 0.0]]])
    np.testing.assert_array_equal(sign_flip_test(one_pair), 1)
    np.testing.assert_array_equal(sign_flip_test(np.zeros((50, 2, 3))), 1)
    assert 0.4 < sign_flip_test(np.array([[[0.5]], [[0.5]]])).item() < 0.6  # 2 of 4 swaps
    # All alike: the true p is 2 / 2⁴⁰, the bound 2 exp(−40 / 2), whatever the size.
    alike = np.tile([[[0.4, -1e-4]]], (40, 1, 1))
    np.testing.assert_allclose(sign_flip_test(alike), 2 * np.exp(-20))
    assert sign_flip_test(np.ones((3000, 1, 1)), permutations=9).item() > 0  # exp(−1500) is 0


# --- q ------------------------------------------------------------------------------------------


def test_q_by_hand():
    # Sorted: 0.01, 0.02, 0.03, 0.5; times 4 over the rank 0.04, 0.04, 0.04, 0.5.
    p = np.array([[0.02, 0.5, 1e-9], [0.01, 0.03, 1e-9]])
    exists = np.array([[True, True, False]] * 2)
    expected = [[0.04, 0.5, 1], [0.04, 0.04, 1]]
    np.testing.assert_allclose(false_discovery_rate(p, exists), expected)


@given(arrays(np.float64, st.integers(1, 12), elements=st.floats(1e-6, 1)))
def test_q_by_its_definition(p: np.ndarray):
    found = false_discovery_rate(p[None], np.ones((1, len(p)), dtype=bool))[0]
    for value, q in zip(p, found, strict=True):
        cuts = [cut for cut in p if cut >= value]
        assert q == pytest.approx(min(len(p) * cut / sum(p <= cut) for cut in cuts))


# --- simulations --------------------------------------------------------------------------------

EXPERTS = 24


def overdispersed(generator: np.random.Generator, pairs: int = 40) -> RoutingCounts:
    """A is a few tokens, B many; each text has rates of its own, rare experts first."""
    tokens = np.stack(
        [generator.integers(3, 12, pairs), generator.integers(20, 90, pairs)], axis=-1
    )
    mean = np.linspace(0.02, 0.6, EXPERTS)
    rates = generator.beta(3 * mean, 3 * (1 - mean), size=(pairs, 2, EXPERTS))
    selected = generator.binomial(tokens[:, :, None], rates)
    return RoutingCounts(selected[:, :, None], tokens)


def shuffled(counts: RoutingCounts, generator: np.random.Generator) -> RoutingCounts:
    """The same pairs, with A and B swapped in a random half of them: there is nothing to find."""
    order = generator.permuted(np.tile([0, 1], (len(counts.tokens), 1)), axis=1)
    rows = np.arange(len(order))[:, None]
    return RoutingCounts(counts.selected[rows, order], counts.tokens[rows, order])


def q_of(counts: RoutingCounts, seed: int = 0) -> np.ndarray:
    p = permutation_test(counts, seed=seed)
    return false_discovery_rate(p, np.ones(p.shape, dtype=bool))


def token_p(counts: RoutingCounts) -> np.ndarray:
    """The textbook test of two shares, which takes tokens for independent."""
    from scipy.stats import norm

    n = counts.tokens.sum(0)
    a, b = counts.selected[:, :, 0].sum(0)
    share = (a + b) / n.sum()
    error = np.sqrt(share * (1 - share) * (1 / n[0] + 1 / n[1]))
    return 2 * norm.sf(np.abs(a / n[0] - b / n[1]) / error)


# 300 runs at 5 %: 15 are expected, more than 27 have a chance of 1 in 1000.
RUNS, MOST = 300, 27


def test_where_there_is_nothing_it_is_found_no_more_often_than_the_level_says():
    found = by_token = small = 0
    for seed in range(RUNS):
        generator = np.random.default_rng(seed)
        counts = shuffled(overdispersed(generator), generator)
        found += bool((q_of(counts, seed) < 0.05).any())
        small += int((permutation_test(counts, seed=seed) < 0.05).sum())
        by_token += bool((token_p(counts) < 0.05 / EXPERTS).any())
    assert found <= MOST
    assert 0.04 < small / (RUNS * EXPERTS) < 0.06  # p is uniform: valid, and not for being slack
    assert by_token > 0.9 * RUNS  # why pairs are swapped, not tokens


def test_a_planted_difference_is_found():
    missed, false = 0, 0.0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        counts = shuffled(overdispersed(generator), generator)
        selected = counts.selected.copy()
        more = generator.binomial(counts.tokens[:, 0] - selected[:, 0, 0, 0], 0.3)
        selected[:, 0, 0, 0] += more
        q = q_of(RoutingCounts(selected, counts.tokens), seed)[0]
        missed += bool(q[0] >= 0.05)
        false += (q[1:] < 0.05).sum() / max((q < 0.05).sum(), 1)
    assert missed == 0
    assert false / 100 < 0.09  # the share of false ones is 5 % at most, in the mean


@pytest.fixture(scope="module")
def testbed_counts() -> RoutingCounts:
    from moesteer.chat import tokenise_pairs
    from moesteer.contrast import read_pairs
    from moesteer.engines.transformers_engine import load_transformers

    engine = load_transformers("testbed")
    return count_routing(engine, tokenise_pairs(read_pairs("testbed:refusal"), engine.tokenizer))


def test_on_the_bundled_models_own_routing(testbed_counts: RoutingCounts):
    from moesteer.testbed import ground_truth

    q = q_of(testbed_counts)
    for layer, expert in ground_truth().behaviours["refusal"].planted:
        assert q[layer, expert] < 1e-6
    found = 0
    for seed in range(RUNS // 3):
        counts = shuffled(testbed_counts, np.random.default_rng(seed))
        found += bool((q_of(counts, seed) < 0.05).any())
    assert found <= 12  # of 100; a chance of 1 in 1000


# --- stability ----------------------------------------------------------------------------------


def test_stability_against_scipys_rank_correlation():
    counts = overdispersed(np.random.default_rng(0), pairs=11)
    exists = np.arange(EXPERTS)[None] < EXPERTS - 3
    expected = []
    for drawn in halves(11, SPLITS, seed=2).astype(bool):
        scores = []
        for half in (drawn, ~drawn):
            n = counts.tokens[half].sum(0)[:, None]
            a, b = counts.selected[half].sum(0)[:, 0] / n
            scores.append((a - b)[exists[0]])
        expected.append(spearmanr(*scores)[0])
    found = split_half_stability(*RISK_DIFFERENCE, counts, exists, seed=2)
    assert found == pytest.approx(np.mean(expected))


def test_stability_is_high_where_experts_differ_and_not_where_they_do_not():
    everywhere = np.ones((1, EXPERTS), dtype=bool)
    generator = np.random.default_rng(1)
    noise = shuffled(overdispersed(generator, pairs=100), generator)
    selected = noise.selected.copy()
    selected[:, 0, 0] = noise.tokens[:, :1] * np.linspace(0, 1, EXPERTS)
    different = RoutingCounts(selected, noise.tokens)
    low, high = (
        split_half_stability(*RISK_DIFFERENCE, counts, everywhere) for counts in (noise, different)
    )
    assert low is not None
    assert high is not None
    assert low < 0.5
    assert high > 0.85


def test_nothing_to_correlate():
    counts = overdispersed(np.random.default_rng(0), pairs=1)
    assert split_half_stability(*RISK_DIFFERENCE, counts, np.ones((1, EXPERTS), bool)) is None
    alike = RoutingCounts(np.ones((4, 2, 1, 3), dtype=int), np.full((4, 2), 2))
    assert split_half_stability(*RISK_DIFFERENCE, alike, np.ones((1, 3), bool)) is None
