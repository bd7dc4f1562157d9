"""Intervals: against a slow bootstrap written out, and against how often they hold the truth."""

import numpy as np
import pytest

from moesteer.detection.counts import RoutingCounts
from moesteer.detection.risk_difference import risk_difference
from moesteer.detection.significance import bootstrap_interval


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
        assert (low <= risk_difference(counts)).all()
        assert (risk_difference(counts) <= high).all()
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
