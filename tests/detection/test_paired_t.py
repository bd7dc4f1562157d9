"""The paired t, by hand, against scipy's, and where every pair is alike."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from moesteer.detection.counts import RoutingCounts
from moesteer.detection.paired_t import parts, score
from moesteer.detection.resampling import scores_of_all


def paired_t(selected: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return scores_of_all(parts, score, RoutingCounts(selected, tokens))


def test_by_hand():
    # Differences 0.5, 0.1 and 0.3: mean 0.3, variance (0.04 + 0.04 + 0) / 2 = 0.04.
    selected = np.array([[[[6]], [[1]]], [[[3]], [[2]]], [[[5]], [[2]]]])
    found = paired_t(selected, np.full((3, 2), 10))
    np.testing.assert_allclose(found, 0.3 / np.sqrt(0.04 / 3))


def test_against_scipy_with_unequal_lengths():
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 60, size=(30, 2))
    selected = generator.binomial(tokens[:, :, None, None], 0.4, size=(30, 2, 3, 4))
    rates = selected / tokens[:, :, None, None]
    expected = ttest_rel(rates[:, 0], rates[:, 1]).statistic
    np.testing.assert_allclose(paired_t(selected, tokens), expected)


def test_where_all_pairs_are_alike_rounding_sets_the_error():
    # 20 of 20 tokens on A and none of 10 on B, 16 times: variance (1/400 + 1/100) / 12.
    selected = np.array([[[[20]], [[0]]]] * 16)
    found = paired_t(selected, np.array([[20, 10]] * 16))
    np.testing.assert_allclose(found, 1 / np.sqrt((1 / 400 + 1 / 100) / 12 / 16))


@pytest.mark.parametrize("pairs", [1, 2, 50])
def test_finite_from_however_few_pairs(pairs: int):
    selected = np.array([[[[7, 0, 3]], [[0, 0, 3]]]] * pairs)
    found = paired_t(selected, np.array([[7, 7]] * pairs))
    assert np.isfinite(found).all()
    assert found[0, 0] > 0
    assert found[0, 1] == found[0, 2] == 0


def test_a_regular_small_shift_outranks_an_irregular_large_one():
    regular = np.array([52, 53, 52, 51, 52, 53])
    irregular = np.array([50, 50, 100, 50, 50, 100])
    a = np.stack([regular, irregular], axis=-1)
    selected = np.stack([a, np.full_like(a, 50)], axis=1)[:, :, None]
    small, large = paired_t(selected, np.full((6, 2), 100))[0]
    assert small > large > 0
