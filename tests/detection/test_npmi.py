"""The difference of nPMI, by a table computed by hand and by what is known of its ends."""

from math import log, log2

import numpy as np
import pytest

from moesteer.detection.npmi import score


def npmi(a1: float, a2: float, n1: float, n2: float) -> float:
    return score(*(np.array([[x]], dtype=float) for x in (a1, a2, n1, n2))).item()


def test_by_hand():
    # With ½ in each cell the rates are 6.5/11 and 2.5/11.
    with_a = log((6.5 / 22) / ((9 / 22) / 2)) / -log(6.5 / 22)
    with_b = log((2.5 / 22) / ((9 / 22) / 2)) / -log(2.5 / 22)
    assert npmi(6, 2, 10, 10) == pytest.approx(with_a - with_b)


def test_with_many_tokens_the_correction_does_not_matter():
    # p(e, A) = 0.3 and p(e, B) = 0.1, p(e) = 0.4: PMI = log 1.5 and log 0.5.
    expected = log2(1.5) / -log2(0.3) - log2(0.5) / -log2(0.1)
    assert npmi(6e8, 1e8, 1e9, 5e8) == pytest.approx(expected, rel=1e-6)


def test_the_longer_side_does_not_set_the_base_rate():
    assert npmi(3e8, 1e7, 1e9, 1e9) == pytest.approx(npmi(3e8, 1e5, 1e9, 1e7), rel=1e-3)


@pytest.mark.parametrize("n", [10, 10**4, 10**8])
def test_the_ends(n: int):
    assert npmi(0, 0, n, 7 * n) == pytest.approx(0, abs=1e-9)
    assert npmi(n, 7 * n, n, 7 * n) == pytest.approx(0, abs=1e-9)
    assert 0 < npmi(n, 0, n, n) < 2  # 2: always on A (nPMI 1), never on B (nPMI −1)


def test_an_expert_met_once_does_not_outrank_a_regular_one():
    assert npmi(1, 0, 1000, 1000) < npmi(300, 100, 1000, 1000)
