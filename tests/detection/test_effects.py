"""Scores from effects per pair, against scipy's tests and numbers by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moesteer.detection.effects import effect_scores

RATES = np.zeros((2, 2, 3))
EXISTS = np.array([[True, True, True], [True, True, False]])


def effects(pairs: int = 40, seed: int = 0) -> np.ndarray:
    """Expert (0, 0) has an effect, the others none; (1, 2) does not exist."""
    made = np.random.default_rng(seed).normal(size=(pairs, 2, 3))
    made[:, 0, 0] += 2
    made[:, 1, 2] = 0
    return made


def test_mean_interval_and_test() -> None:
    made = effects()
    found = effect_scores(made, RATES, EXISTS)
    np.testing.assert_allclose(found.value, made.mean(0))
    for cell in zip(*np.nonzero(EXISTS), strict=True):
        values = (made[(slice(None), *cell)],)
        exact = stats.bootstrap(values, np.mean, method="percentile", rng=1).confidence_interval
        assert found.low[cell] == pytest.approx(exact.low, abs=0.05)
        assert found.high[cell] == pytest.approx(exact.high, abs=0.05)
        t = stats.ttest_1samp(values[0], 0)
        if cell != (0, 0):
            assert found.p[cell] == pytest.approx(t.pvalue, abs=0.06)  # pyright: ignore
    assert found.p[0, 0] < 0.001
    np.testing.assert_allclose(found.q[EXISTS], stats.false_discovery_control(found.p[EXISTS]))
    assert found.q[1, 2] == found.p[1, 2] == 1


def test_unmeasured_experts_score_nothing() -> None:
    made = effects()
    made[:, 1] = np.nan
    found = effect_scores(made, RATES, EXISTS)
    for table in (found.value, found.low, found.high):
        assert not table[1].any()
        assert np.isfinite(table).all()
    assert (found.p[1] == 1).all()
    assert (found.q[1] == 1).all()
    np.testing.assert_allclose(
        found.q[0], stats.false_discovery_control(found.p[0])
    )  # among three experts, not five


def test_one_pair_has_no_interval_and_no_test() -> None:
    found = effect_scores(effects(1), RATES, EXISTS)
    np.testing.assert_array_equal(found.low, found.value)
    np.testing.assert_array_equal(found.high, found.value)
    assert (found.p == 1).all()


@given(st.integers(2, 12), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_swapping_the_sides_negates(pairs: int, seed: int) -> None:
    made = effects(pairs, seed)
    found, other = effect_scores(made, RATES, EXISTS), effect_scores(-made, RATES, EXISTS)
    np.testing.assert_allclose(other.value, -found.value)
    np.testing.assert_allclose(other.low, -found.high, atol=1e-9)
    np.testing.assert_allclose(other.p, found.p)
    assert (found.low <= found.high).all()
    assert (found.p <= found.q + 1e-12).all()
