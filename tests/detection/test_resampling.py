"""Resamples as matrix products, against repeating the pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.detection.counts import RoutingCounts
from moesteer.detection.detectors import DETECTORS
from moesteer.detection.resampling import corrected, halves, layer_scores, scores_of_all


@pytest.mark.parametrize("name", DETECTORS)
def test_a_weight_is_how_often_a_pair_is_there(name: str):
    detector = DETECTORS[name]
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 40, size=(7, 2))
    selected = generator.binomial(tokens[:, :, None, None], 0.3, size=(7, 2, 3, 5))
    weights = generator.multinomial(7, np.full(7, 1 / 7), size=20)
    by_layer = layer_scores(
        detector.parts, detector.score, RoutingCounts(selected, tokens), weights.astype(float)
    )
    found = np.stack(list(by_layer), axis=1)
    for drawn, score in zip(weights, found, strict=True):
        repeated = RoutingCounts(
            np.repeat(selected, drawn, axis=0), np.repeat(tokens, drawn, axis=0)
        )
        expected = scores_of_all(detector.parts, detector.score, repeated)
        np.testing.assert_allclose(score, expected, atol=1e-12)


@given(st.integers(2, 15), st.integers(1, 6), st.integers(0, 99))
def test_halves(pairs: int, splits: int, seed: int):
    drawn = halves(pairs, splits, seed)
    assert drawn.shape == (splits, pairs)
    assert set(np.unique(drawn)) == {0, 1}
    assert (drawn.sum(1) == pairs // 2).all()


def test_each_pair_is_in_half_of_the_halves():
    share = halves(6, 4000, seed=0).mean(0)
    np.testing.assert_allclose(share, 0.5, atol=0.04)


@given(*[st.integers(1, 1000)] * 2, st.floats(0, 1))
def test_the_correction_is_a_token_more_each_and_keeps_equal_rates(n1: int, n2: int, rate: float):
    a1, a2, m1, m2 = corrected(*(np.array([x], float) for x in (rate * n1, rate * n2, n1, n2)))
    np.testing.assert_allclose(a1 + a2, rate * (n1 + n2) + 1)
    np.testing.assert_allclose(m1 + m2, n1 + n2 + 2)
    np.testing.assert_allclose(a1 / m1, a2 / m2)
