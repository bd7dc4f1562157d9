"""Drift and linked share beside brute force, scipy's entropy and tables made by hand."""

from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import entropy

from moesteer.model_facts import LayerShape
from moesteer.monitoring.drift import linked_share, reference_shares, routing_drift

LAYERS = (LayerShape(1, 4, 2), LayerShape(4, 3, 1))
TABLE = arrays.arrays(np.int64, (2, 4), elements=st.integers(0, 50)).filter(
    lambda table: bool(table[:, :3].sum(-1).all())
)


def lacking(table: np.ndarray) -> np.ndarray:
    """Without selections of the expert that layer 4 does not have."""
    table = table.copy()
    table[1, 3] = 0
    return table


def test_by_hand() -> None:
    reference = reference_shares(np.array([[3, 0, 0, 0], [0, 0, 1, 0]]), LAYERS)
    half, shares = 0.5, [[3.5 / 5, 0.5 / 5, 0.5 / 5, 0.5 / 5], [0.5 / 2.5, 0.5 / 2.5, 1.5 / 2.5, 0]]
    np.testing.assert_allclose(reference, shares)
    text = np.array([[2, 2, 0, 0], [0, 0, 3, 0]])
    first = half * log(half / 0.7) + half * log(half / 0.1)
    assert routing_drift(text, reference) == pytest.approx((first + log(1 / 0.6)) / 2)


@given(TABLE.map(lacking), TABLE.map(lacking))
def test_as_scipy_has_it_and_never_negative(text: np.ndarray, fitted: np.ndarray) -> None:
    reference = reference_shares(fitted, LAYERS)
    assert (reference[1, :3] > 0).all()
    assert reference[1, 3] == 0
    np.testing.assert_allclose(reference.sum(-1), 1)
    rows = [(text[0], reference[0]), (text[1, :3], reference[1, :3])]
    expected = sum(float(entropy(p, q)) for p, q in rows) / 2
    drift = routing_drift(text, reference)
    assert drift == pytest.approx(expected, abs=1e-12)
    assert drift >= -1e-12
    assert routing_drift(text * 7, reference) == pytest.approx(drift)


def test_no_drift_of_what_is_routed_as_the_reference() -> None:
    reference = reference_shares(np.array([[10**9, 3 * 10**9, 0, 0], [10**9, 0, 0, 0]]), LAYERS)
    assert routing_drift(np.array([[1, 3, 0, 0], [5, 0, 0, 0]]), reference) < 1e-8


def test_short_texts_drift_by_chance() -> None:
    """Why lengths are compared with their own: the bias that Miller (1955) expects."""
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.full(16, 5.0))
    for selections in (100, 1000):
        texts = random.multinomial(selections, shares, size=4000)
        mean = np.mean([routing_drift(text[None], shares[None]) for text in texts])
        assert mean == pytest.approx(15 / (2 * selections), rel=0.1)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=20))
def test_linked_share_token_by_token(selects: list[list[bool]]) -> None:
    """Tokens that each select some of three linked experts."""
    linked = ((1, 0), (1, 3), (4, 2))
    table = np.zeros((2, 4), dtype=np.int64)
    for token in selects:
        for (layer, expert), selected in zip(linked, token, strict=True):
            table[[1, 4].index(layer), expert] += selected
    expected = np.mean([selected for token in selects for selected in token])
    assert linked_share(table, len(selects), linked, LAYERS) == pytest.approx(expected)
