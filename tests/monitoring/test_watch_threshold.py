"""Thresholds beside the ranks that the theorem speaks of, and beside fresh draws."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.monitoring.threshold import MOST_BINS, bins_of, borders_of, least_texts, threshold

RATES = (0.01, 0.02, 0.025, 0.05, 0.1, 0.5)


def test_by_hand() -> None:
    scores = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0])  # of 9, rank ⌈10 · 0.9⌉ = 9
    assert threshold(scores, 0.1) == 9
    assert threshold(scores, 0.2) == 8
    assert threshold(scores, 0.29) == 8
    assert threshold(scores, 0.3) == 7


@pytest.mark.parametrize("rate", RATES)
def test_the_fewest_texts(rate: float) -> None:
    least = least_texts(rate)
    assert least == round(1 / rate) - 1
    assert threshold(np.arange(least, dtype=float), rate) == least - 1
    with pytest.raises(ValueError, match=f"{least - 1} texts give no threshold"):
        threshold(np.arange(least - 1, dtype=float), rate)


@given(st.integers(1, 300), st.integers(1, 50))
def test_a_further_text_exceeds_it_at_most_so_often(n: int, percent: int) -> None:
    """Of n + 1 exchangeable scores, each is as likely to be the further one: counted exactly."""
    if n < least_texts(percent / 100):
        return
    everyone = np.arange(n + 1.0)
    above = [i for i in range(n + 1) if i > threshold(np.delete(everyone, i), percent / 100)]
    assert len(above) == (n + 1) * percent // 100


@given(st.integers(20, 60), st.integers(1, 3))
def test_ties_raise_fewer_alarms(n: int, kinds: int) -> None:
    scores = np.arange(n + 1.0) % kinds
    above = sum(scores[i] > threshold(np.delete(scores, i), 0.1) for i in range(n + 1))
    assert above <= 0.1 * (n + 1)


def test_false_alarms_of_fresh_draws() -> None:
    """The rate of alarms over many draws of held-out and further scores, skewed ones at that."""
    random = np.random.default_rng(1)
    for rate, n in ((0.05, 19), (0.05, 50), (0.01, 120)):
        draws = random.lognormal(sigma=2, size=(20_000, n + 1))
        alarms = np.mean([one[0] > threshold(one[1:], rate) for one in draws])
        exact = int((n + 1) * rate + 1e-9) / (n + 1)
        assert exact <= rate + 1e-12
        assert alarms == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=200),
    st.lists(st.integers(1, 30), min_size=1, max_size=200),
    st.integers(1, 60),
)
def test_each_bin_holds_enough(fitted: list[int], held_out: list[int], least: int) -> None:
    borders = borders_of(np.array(fitted), np.array(held_out), least)
    assert len(borders) < MOST_BINS
    assert list(borders) == sorted(set(borders))
    assert set(borders) <= set(fitted)
    spans = list(pairwise([0, *borders, 10**9]))
    if borders:
        assert all(sum(low < n <= high for n in held_out) >= least for low, high in spans)
    for length, number in zip(held_out, bins_of(held_out, borders), strict=True):
        low, high = spans[number]
        assert low < length <= high


def test_as_many_bins_as_leave_enough_texts() -> None:
    lengths = np.arange(1, 101)
    assert borders_of(lengths, lengths, 25) == (25, 50, 75)
    assert borders_of(lengths, lengths, 26) == (34, 67)
    assert borders_of(lengths, lengths, 40) == (50,)
    assert borders_of(lengths, lengths, 60) == ()
