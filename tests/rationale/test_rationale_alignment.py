"""Alignment against a table computed by hand and against scikit-learn, token by token."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, jaccard_score, precision_recall_fscore_support

from moesteer.rationale.alignment import auprc, f1, iou, precision, recall

TOKENS = (1, 2, 3, 1)

# chosen, human → both, chosen, human in tokens of TOKENS → precision, recall, F1, IoU
BY_HAND = [
    ((0, 1), (1, 2), 2 / 3, 2 / 5, 4 / 8, 2 / 6),
    ((2,), (2,), 1, 1, 1, 1),
    ((0, 3), (1, 2), 0, 0, 0, 0),
    ((0, 1, 2, 3), (3,), 1 / 7, 1, 2 / 8, 1 / 7),
    ((1,), (0, 1, 3), 1, 2 / 4, 4 / 6, 2 / 4),
    ((), (1,), 0, 0, 0, 0),
    ((1,), (), 0, 0, 0, 0),
    ((), (), 0, 0, 0, 0),
]


@pytest.mark.parametrize(("chosen", "human", "p", "r", "f", "overlap"), BY_HAND)
def test_a_table_by_hand(
    chosen: tuple[int, ...], human: tuple[int, ...], p: float, r: float, f: float, overlap: float
):
    assert precision(chosen, human, TOKENS) == pytest.approx(p)
    assert recall(chosen, human, TOKENS) == pytest.approx(r)
    assert f1(chosen, human, TOKENS) == pytest.approx(f)
    assert iou(chosen, human, TOKENS) == pytest.approx(overlap)


@st.composite
def rationales(draw: st.DrawFn) -> tuple[list[float], list[int], list[int], list[int]]:
    """Scores (often equal), chosen and marked units, and tokens of each unit."""
    units = draw(st.integers(1, 12))
    numbers = st.lists(st.integers(0, units - 1), unique=True)
    values = st.sampled_from([-1.5, 0.0, 0.25, 1.0, 7.0])
    scores = draw(st.lists(values, min_size=units, max_size=units))
    tokens = draw(st.lists(st.integers(1, 4), min_size=units, max_size=units))
    return scores, draw(numbers), draw(numbers), tokens


def by_token(units: list[int], tokens: list[int]) -> np.ndarray:
    """1 for every token of the units, 0 for every other."""
    return np.repeat([unit in units for unit in range(len(tokens))], tokens).astype(int)


@given(rationales())
def test_scikit_learn_agrees(made: tuple[list[float], list[int], list[int], list[int]]):
    scores, chosen, human, tokens = made
    said, true = by_token(chosen, tokens), by_token(human, tokens)
    none: Any = 0  # its annotation says text
    p, r, f, _ = precision_recall_fscore_support(true, said, average="binary", zero_division=none)
    assert precision(chosen, human, tokens) == pytest.approx(p)
    assert recall(chosen, human, tokens) == pytest.approx(r)
    assert f1(chosen, human, tokens) == pytest.approx(f)
    assert iou(chosen, human, tokens) == pytest.approx(
        jaccard_score(true, said, zero_division=none)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where nothing is marked, and says 0 too
        expected = average_precision_score(true, np.repeat(scores, tokens))
    assert auprc(scores, human, tokens) == pytest.approx(expected)


@given(rationales())
def test_what_is_like_what_people_marked_is_best(
    made: tuple[list[float], list[int], list[int], list[int]],
):
    scores, chosen, human, tokens = made
    if human:
        assert f1(human, human, tokens) == 1
        assert f1(chosen, human, tokens) == pytest.approx(f1(human, chosen, tokens))
        assert auprc([float(unit in human) for unit in range(len(tokens))], human, tokens) == 1
        share = sum(tokens[unit] for unit in human) / sum(tokens)
        assert auprc([0.0] * len(tokens), human, tokens) == pytest.approx(share)
        assert auprc(scores, human, tokens) == pytest.approx(
            auprc([3 * score - 1 for score in scores], human, tokens)
        )
