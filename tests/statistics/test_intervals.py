"""Intervals against the published formula, a plain bootstrap, and what they must cover."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.statistics.intervals import mean_interval, wilson_interval


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_published_formula(counted: tuple[int, int]):
    count, n = counted
    p, z = count / n, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = wilson_interval(count, n)
    assert low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert high == pytest.approx(min(1, centre + half), abs=1e-9)


def test_wilson_of_nothing():
    assert wilson_interval(0, 0) == (0, 1)


def test_the_bootstrap_is_that_of_items():
    """Drawing how often each value occurs is drawing items: against a plain bootstrap."""
    generator = np.random.default_rng(1)
    by_item = generator.choice([-1, -1 / 3, 0, 2 / 3, 1], size=50)
    plain = generator.choice(by_item, size=(40_000, 50)).mean(1)
    expected = np.quantile(plain, [0.025, 0.975])
    found = mean_interval(by_item)
    assert found == pytest.approx(expected, abs=0.01)
    assert found == mean_interval(by_item)
    assert found != mean_interval(by_item, seed=1)


def test_where_every_item_did_the_same_there_is_no_width():
    assert mean_interval(np.ones(7)) == (1, 1)


def test_the_interval_covers_the_true_difference():
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        by_item = generator.choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=80)
        low, high = mean_interval(by_item, resamples=2000)
        covered += low <= 0.2 <= high
    assert covered >= 0.9 * 300
