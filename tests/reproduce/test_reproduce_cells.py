"""Cells beside numbers computed by hand and by scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, spearmanr

from moesteer.report import reproduce_cells as cells
from moesteer.report.reproduce_cells import NOTHING
from moesteer.reproduce import comparing
from moesteer.reproduce.comparing import Estimate


def by_item(text: str) -> dict[int, bool]:
    """Hits by item: "x.x" is a hit, a miss, a hit."""
    return {number: sign == "x" for number, sign in enumerate(text)}


def test_a_paired_difference_counts_the_prompts_that_both_answered() -> None:
    ours, theirs = by_item("xxxxxxxxx."), by_item("xx........")
    ours.pop(9)
    found = cells.paired(comparing.paired(ours, theirs))
    assert found.value == pytest.approx(7 / 9)
    assert f"p = {binomtest(7, 7).pvalue:.2g}" in found.text
    assert found.text.startswith("+78 (")
    assert comparing.paired({}, theirs) is None


def test_a_share_of_an_effect_is_the_ratio_of_the_changes() -> None:
    residual = by_item("xxxxxxxxxx"), by_item("..........")
    experts = by_item("xxxxxx...."), by_item("x.........")
    found = comparing.ratio(experts, residual)
    assert found is not None
    assert found.value == pytest.approx(0.5)
    # The other effect is 1 on each prompt: the interval is that of a mean of 10.
    draws = np.random.default_rng(1).choice([0] * 5 + [1] * 5, (20_000, 10)).mean(1)
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.11)
    assert cells.ratio(comparing.ratio(residual, residual)).text == "100% (100 … 100)"


def test_there_is_no_share_of_an_effect_that_may_be_nothing() -> None:
    nothing = by_item("x........."), by_item(".x........")
    assert comparing.ratio((by_item("xxxxxxxxxx"), by_item("..........")), nothing) is None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=5, max_size=12))
def test_rank_correlation_is_spearman_s(points: list[tuple[int, int]]) -> None:
    x, y = ([float(point[side]) for point in points] for side in (0, 1))
    found = comparing.rank_correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
        return
    assert found is not None
    assert found.value == pytest.approx(float(np.asarray(spearmanr(x, y))[0]))
    assert -1 - 1e-9 <= found.low <= found.high <= 1 + 1e-9


def test_few_points_have_no_rank_correlation() -> None:
    assert comparing.rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) is None


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0.5, 0.25, 0.75, 0.0004), "+50 (+25 … +75) p < 0.001"),
        ((-0.41, -0.5, -0.001, 0.02), "−41 (−50 … +0) p = 0.02"),
        ((0.0, 0.0, 0.0, 1.0), "0"),
    ],
)
def test_points(numbers: tuple[float, float, float, float], words: str) -> None:
    assert cells.in_points(*numbers).text == words


def test_estimates_in_words() -> None:
    found = Estimate(-0.5, -0.75, 0.25, 0.5)
    assert cells.paired(found).text == "−50 (−75 … +25) p = 0.5"
    assert cells.ratio(found).text == "−50% (−75 … 25)"
    assert cells.change_of(found).text == "−0.50 (−0.75 … +0.25)"
    assert cells.rating(Estimate(0.5, 0.25, 0.75)).text == "0.50 (0.25 … 0.75)"
    for words in (cells.paired, cells.ratio, cells.change_of, cells.rating):
        assert words(None) == NOTHING
    assert (cells.ratio(found).low, cells.ratio(found).high) == (-0.75, 0.25)
