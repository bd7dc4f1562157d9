"""The log-odds ratio, by a table computed by hand."""

from math import log

import numpy as np

from moesteer.detection.counts import RoutingCounts
from moesteer.detection.log_odds import score
from moesteer.detection.resampling import pooled, scores_of_all


def scores(a: list[int], n_a: int, b: list[int], n_b: int) -> np.ndarray:
    selected = np.array([[[a], [b]]])
    return scores_of_all(pooled, score, RoutingCounts(selected, np.array([[n_a, n_b]])))[0]


def test_by_hand_with_sides_of_one_size():
    # ½ in each cell: (3.5 / 7.5) / (1.5 / 9.5); never on B; never at all; always on A.
    found = scores([3, 4, 0, 10], 10, [1, 0, 0, 5], 10)
    expected = [log(3.5 * 9.5 / (7.5 * 1.5)), log(4.5 * 10.5 / (6.5 * 0.5)), 0, log(10.5 / 0.5)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_by_hand_with_unequal_sides():
    # 30 tokens of A, 10 of B: ¾ and ¼ in the cells.
    found = scores([6], 30, [1], 10)
    np.testing.assert_allclose(found, [log(6.75 / 24.75) - log(1.25 / 9.25)], atol=1e-12)


def test_an_expert_of_one_rate_scores_nothing_however_unequal_the_sides():
    np.testing.assert_allclose(scores([0, 60, 30], 60, [0, 7, 3.5], 7), 0, atol=1e-12)  # pyright: ignore


def test_a_doubling_counts_the_same_for_rare_and_common_experts():
    # Which is what sets it apart from the risk difference.
    rare, common = scores([2000, 200_000], 10**6, [1000, 100_000], 10**6)
    assert abs(rare - log(2)) < 0.01
    assert abs(common - log(2 * 0.9 / 0.8)) < 0.01
