"""Stability selection, by hand and against a slow one written out with sorted lists."""

import numpy as np
import pytest
from scipy.stats import binomtest

from moesteer.detection.counts import RoutingCounts
from moesteer.detection.resampling import halves, pooled
from moesteer.detection.risk_difference import score
from moesteer.detection.stability import HALF_SAMPLES, selected_stably


def counts_of(rates_a: list, rates_b: list, tokens: int = 10) -> RoutingCounts:
    """Rates [pair][expert] of one layer, each side of each pair of the same length."""
    both = np.stack([np.array(rates_a), np.array(rates_b)], axis=1)[:, :, None]
    return RoutingCounts(
        (both * tokens).round().astype(np.int64), np.full((len(rates_a), 2), tokens)
    )


def test_by_hand():
    # Expert 0 goes with A in every pair, 1 with B in one of four pairs, 2 with neither. m = 1: a
    # half (two pairs) holds that pair half of the time, and 1 then has |Δ| 0.5 against 0.2 of 0.
    counts = counts_of([[0.2, 0, 0.5]] * 4, [[0, 1, 0.5], *[[0, 0, 0.5]] * 3])
    found = selected_stably(pooled, score, counts, strongest=1, half_samples=2000)
    np.testing.assert_allclose(found.value, [[0.5, -0.5, 0]], atol=0.03)
    assert found.value[0, 0] - found.value[0, 1] == pytest.approx(1)  # one of them always


def test_against_one_written_out():
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, 30, size=(9, 2))
    selected = generator.binomial(tokens[:, :, None, None], 0.3, size=(9, 2, 2, 5))
    found = selected_stably(pooled, score, RoutingCounts(selected, tokens), strongest=3, seed=4)
    times = np.zeros((2, 5))
    for drawn in halves(9, HALF_SAMPLES, seed=4):
        chosen = [i for i in range(9) if drawn[i]]
        assert len(chosen) == 4
        n_a, n_b = (sum(tokens[i, side] for i in chosen) for side in (0, 1))
        size = {
            (layer, expert): abs(
                sum(selected[i, 0, layer, expert] for i in chosen) / n_a
                - sum(selected[i, 1, layer, expert] for i in chosen) / n_b
            )
            for layer in range(2)
            for expert in range(5)
        }
        third = sorted(size.values())[-3]
        for place in size:
            times[place] += size[place] >= third
    n_a, n_b = tokens.sum(0)
    sign = np.sign(selected[:, 0].sum(0) / n_a - selected[:, 1].sum(0) / n_b)
    np.testing.assert_allclose(found.value, sign * times / HALF_SAMPLES)
    for place in np.ndindex(2, 5):
        wilson = binomtest(int(times[place]), HALF_SAMPLES).proportion_ci(0.95, "wilson")
        ends = sorted(sign[place] * np.array([wilson.low, wilson.high]))
        np.testing.assert_allclose([found.low[place], found.high[place]], ends)


def test_those_that_tie_all_count_and_those_without_a_difference_never():
    counts = counts_of([[0.5, 0.5, 0, 0.3]] * 6, [[0, 0, 0.5, 0.3]] * 6)
    for m in (1, 2, 3, 4, 99):
        found = selected_stably(pooled, score, counts, strongest=m)
        np.testing.assert_array_equal(found.value, [[1, 1, -1, 0]])
        assert (found.low <= found.value).all()
        assert (found.value <= found.high).all()
        assert -0.05 < found.low[0, 3] < 0 < found.high[0, 3] < 0.05


def test_two_percent_are_strongest_unless_said_otherwise():
    generator = np.random.default_rng(1)
    selected = generator.integers(0, 9, size=(20, 2, 4, 50))
    found = selected_stably(pooled, score, RoutingCounts(selected, np.full((20, 2), 9)))
    assert np.abs(found.value).sum() >= 4 - 1e-9  # of 200, in each half-sample
    assert "4 strongest" in found.interval
    few = RoutingCounts(selected[:, :, :1, :8], np.full((20, 2), 9))
    assert "1 strongest" in selected_stably(pooled, score, few).interval


def test_one_pair_has_no_halves():
    found = selected_stably(pooled, score, counts_of([[0.9, 0.1, 0]], [[0, 0.5, 0]]), strongest=2)
    np.testing.assert_array_equal(found.value, [[1, -1, 0]])
    np.testing.assert_array_equal(found.low, found.high)
    assert found.interval.startswith("none")
