"""The risk difference, by hand and by what must hold for any counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.detection.counts import RoutingCounts
from moesteer.detection.detectors import DETECTORS
from moesteer.detection.resampling import scores_of_all
from moesteer.detection.risk_difference import selection_rates


def risk_difference(counts: RoutingCounts) -> np.ndarray:
    detector = DETECTORS["risk-difference"]
    return scores_of_all(detector.parts, detector.score, counts)


def test_by_hand():
    # Two pairs, one layer of three experts, one expert a token. Side A: 4 and 6 target tokens,
    # side B: 1 and 3. Pooled over tokens, so that the longer text weighs more.
    counts = RoutingCounts(
        selected=np.array([[[[4, 0, 0]], [[0, 1, 0]]], [[[1, 5, 0]], [[0, 0, 3]]]]),
        tokens=np.array([[4, 1], [6, 3]]),
    )
    np.testing.assert_allclose(selection_rates(counts), [[[0.5, 0.5, 0]], [[0, 0.25, 0.75]]])
    np.testing.assert_allclose(risk_difference(counts), [[0.5, 0.25, -0.75]])


def test_of_probabilities_by_hand():
    # Summed probabilities instead of selections; the sums of a token are 1.
    counts = RoutingCounts(
        selected=np.array([[[[1.5, 0.5]], [[0.25, 0.75]]]], dtype=np.float32),
        tokens=np.array([[2, 1]]),
    )
    np.testing.assert_allclose(selection_rates(counts), [[[0.75, 0.25]], [[0.25, 0.75]]])
    np.testing.assert_allclose(risk_difference(counts), [[0.5, -0.5]])


@st.composite
def routings(draw: st.DrawFn) -> tuple[RoutingCounts, int]:
    """Counts of tokens that select k of the experts each, and k."""
    pairs, layers, experts = (draw(st.integers(1, most)) for most in (4, 3, 6))
    k = draw(st.integers(1, experts))
    tokens = np.array(
        [[draw(st.integers(1, 9)) for _ in range(2)] for _ in range(pairs)], dtype=np.int64
    )
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    selected = np.zeros((pairs, 2, layers, experts), dtype=np.int64)
    for i in range(pairs):
        for side in range(2):
            for layer in range(layers):
                for _ in range(tokens[i, side]):
                    chosen = generator.choice(experts, k, replace=False)
                    selected[i, side, layer, chosen] += 1
    return RoutingCounts(selected, tokens), k


@given(routings())
def test_what_must_hold(routing: tuple[RoutingCounts, int]):
    counts, k = routing
    score = risk_difference(counts)
    assert (np.abs(score) <= 1).all()
    np.testing.assert_allclose(selection_rates(counts).sum(-1), k)
    np.testing.assert_allclose(score.sum(-1), 0, atol=1e-12)  # k − k
    doubled = RoutingCounts(np.tile(counts.selected, (2, 1, 1, 1)), np.tile(counts.tokens, (2, 1)))
    np.testing.assert_allclose(risk_difference(doubled), score, atol=1e-12)


@pytest.mark.parametrize("expert", [0, 3])
def test_the_extremes(expert: int):
    selected = np.zeros((3, 2, 1, 4), dtype=np.int64)
    selected[:, 0, 0, expert] = 5
    selected[:, 1, 0, 1] = 2
    score = risk_difference(RoutingCounts(selected, np.array([[5, 2]] * 3)))
    assert score[0, expert] == 1
    assert score[0, 1] == -1
