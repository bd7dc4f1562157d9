"""The threshold and the area under the curve, against brute force, other code, and tables."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from moesteer.errors import MoesteerError
from moesteer.gating.separation import area_under_curve, auc_with_interval
from moesteer.gating.threshold import check_enough, choose_threshold, opened_of

scores = st.lists(st.integers(-6, 6).map(float), min_size=4, max_size=12).map(np.array)


def youden(opens: np.ndarray, shut: np.ndarray, threshold: float) -> float:
    return float((opens > threshold).mean() - (shut > threshold).mean())


@given(scores, scores, st.sampled_from([0.25, 0.3, 0.5, 0.9]))
def test_no_threshold_within_the_limit_is_better(opens, shut, false_alarms):
    chosen = choose_threshold(opens, shut, false_alarms)
    assert (shut > chosen).sum() <= false_alarms * len(shut) + 1e-9
    tried = np.arange(-7, 8, 0.25)
    allowed = [t for t in tried if (shut > t).mean() <= false_alarms + 1e-9]
    best = max(youden(opens, shut, t) for t in allowed)
    assert youden(opens, shut, chosen) == pytest.approx(best)


@pytest.mark.parametrize(
    ("opens", "shut", "false_alarms", "expected"),
    [
        ([5, 6, 7, 8], [0, 1, 2, 3], 0.25, 4.0),  # apart: the middle of the gap, nothing let in
        ([5, 6, 7, 8], [0, 1, 2, 5.5], 0.25, 3.5),  # one false alarm buys one more
        ([5, 6, 7, 8], [0, 1, 5.5, 5.5], 0.25, 5.75),  # two it may not buy
        ([1, 2, 3, 9], [4, 4, 4, 4], 0.25, 6.5),
        ([1, 2, 3, 4], [9, 9, 9, 9], 0.5, 9.0),  # none opens it
        ([3, 3, 3, 3], [3, 3, 3, 3], 0.5, 3.0),  # nothing to choose by
        ([4, 5, 9, 9], [0, 0, 0, 0], 0.25, 2.0),
        ([1, 8, 9, 9], [0, 2, 2, 2], 0.75, 5.0),  # 1 − 3/4 and 3/4 − 0: the better, not the lower
    ],
)
def test_by_hand(opens, shut, false_alarms, expected):
    chosen = choose_threshold(np.array(opens, float), np.array(shut, float), false_alarms)
    assert chosen == expected


def test_of_equally_good_ones_that_with_the_widest_gap():
    # 3 of 4 without a false alarm above 2, 4 of 4 with one above 0: both 0.75.
    opens, shut = np.array([1.0, 8.0, 9.0, 9.0]), np.array([0.0, 0.0, 0.0, 2.0])
    assert choose_threshold(opens, shut, 0.25) == 5.0
    assert (
        choose_threshold(np.array([1.9, 2.1, 9.0, 9.0]), np.array([-9.0, 0, 0, 2.0]), 0.25) == 0.95
    )


@pytest.mark.parametrize(
    ("prompts", "false_alarms", "least"),
    [(19, 0.05, 20), (9, 0.1, 10), (2, 0.3, 4), (0, 0.5, 2), (99, 0.01, 100)],
)
def test_too_few_to_count_the_share(prompts: int, false_alarms: float, least: int):
    with pytest.raises(MoesteerError, match=f"At least {least} are needed"):
        check_enough(prompts, false_alarms)
    check_enough(least, false_alarms)
    check_enough(100, 0.29)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_a_share_is_between_0_and_1(share: float):
    with pytest.raises(MoesteerError, match="above 0 and below 1"):
        check_enough(1000, share)


@given(scores, scores)
def test_the_area_is_that_of_mann_and_whitney(a, b):
    expected = mannwhitneyu(a, b).statistic / (len(a) * len(b))
    assert area_under_curve(a, b) == pytest.approx(expected)


def test_the_interval_of_the_area_is_that_of_drawing_prompts():
    generator = np.random.default_rng(3)
    a, b = generator.normal(0.8, 1, 40), generator.normal(0, 1, 30)
    found = auc_with_interval(a, b, seed=0)
    drawn = [
        area_under_curve(generator.choice(a, len(a)), generator.choice(b, len(b)))
        for _ in range(2000)
    ]
    assert found.value == area_under_curve(a, b)
    np.testing.assert_allclose(
        [found.low, found.high], np.quantile(drawn, [0.025, 0.975]), atol=0.02
    )


def test_shares_have_wilsons_interval():
    found = opened_of([True] * 3 + [False] * 17)
    assert (found.opened, found.prompts) == (3, 20)
    z, p, n = 1.959963984540054, 0.15, 20
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.low == pytest.approx((middle - half) / (1 + z * z / n))
    assert found.high == pytest.approx((middle + half) / (1 + z * z / n))
