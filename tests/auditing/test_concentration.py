"""Concentration against brute force, numbers by hand, and what must hold for any effects."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moesteer.auditing.concentration import concentration, effective_number, gini, top_share

losses = st.lists(st.floats(0, 100).map(lambda x: round(x, 3)), min_size=1, max_size=40).filter(
    lambda values: sum(values) > 0.1
)


def test_by_hand() -> None:
    # Ordered pairs of 1, 1, 2, 4 differ by 4 · 1 + 4 · 3 + 2 · 2 = 20; 2 n² · mean is 64.
    one = np.array([4.0, 1.0, 2.0, 1.0])
    assert gini(one) == 20 / 64
    # p = ½, ¼, ⅛, ⅛: entropy 1.75 bits
    assert effective_number(one) == pytest.approx(2**1.75)
    assert top_share(one, 1) == 0.5
    assert top_share(one, 3) == 0.875
    assert top_share(one, 10) == 1


@given(losses)
def test_gini_is_the_mean_difference(values: list[float]) -> None:
    n, total = len(values), sum(values)
    brute = sum(abs(a - b) for a in values for b in values) / (2 * n * total)
    assert gini(np.array(values)) == pytest.approx(brute, abs=1e-9)


@given(losses)
@settings(deadline=None)  # the first call imports scipy
def test_the_effective_number_is_the_exponential_of_entropy(values: list[float]) -> None:
    shares = [value / sum(values) for value in values if value > 0]
    entropy = -sum(share * math.log(share) for share in shares)
    assert effective_number(np.array(values)) == pytest.approx(math.exp(entropy))


@given(losses, st.floats(0.01, 1000), st.randoms())
def test_scale_and_order_don_t_matter_and_bounds_hold(values, factor, random) -> None:
    one, n = np.array(values), len(values)
    other = np.array(random.sample(values, n)) * factor
    for measure, low, high in (
        (gini, 0, (n - 1) / n),
        (effective_number, 1, n),
        (lambda x: top_share(x, 3), min(3, n) / n, 1),
    ):
        assert measure(other) == pytest.approx(measure(one), rel=1e-9, abs=1e-9)
        assert low - 1e-9 <= measure(one) <= high + 1e-9


@given(st.integers(1, 50), st.floats(0.1, 10))
def test_all_alike_and_one_alone(n: int, value: float) -> None:
    alike, alone = np.full(n, value), np.eye(n)[0] * value
    assert gini(alike) == pytest.approx(0, abs=1e-9)
    assert effective_number(alike) == pytest.approx(n)
    assert gini(alone) == pytest.approx((n - 1) / n)
    assert effective_number(alone) == pytest.approx(1)
    assert top_share(alone, 1) == 1


@given(losses, st.integers(0, 39), st.floats(0.1, 50))
def test_giving_to_the_richest_concentrates(values: list[float], poorer: int, part: float) -> None:
    assume(len(values) > 1)
    one = np.sort(np.array(values))
    giver = poorer % (len(values) - 1)
    other = one.copy()
    other[-1] += min(part, one[giver])
    other[giver] -= min(part, one[giver])
    assert gini(other) >= gini(one) - 1e-9
    assert effective_number(other) <= effective_number(one) + 1e-9
    assert top_share(other, 1) >= top_share(one, 1) - 1e-9


def test_intervals_of_effects() -> None:
    """Two carriers of 40 experts; what pushes towards A is no loss."""
    generator = np.random.default_rng(0)
    effects = generator.normal(0, 0.001, (60, 40))
    effects[:, 3] += generator.normal(8, 1, 60)
    effects[:, 7] += generator.normal(6, 1, 60)
    effects[:, 11] -= 30
    found = concentration(effects)
    assert found.experts == 40
    assert found == concentration(effects)
    mean = np.maximum(effects.mean(0), 0)
    assert found.total.value == pytest.approx(mean.sum())
    assert found.gini.value == pytest.approx(float(gini(mean)))
    assert 1.9 < (found.effective.value or 0) < 2.1
    assert found.top_3.value == pytest.approx(np.sort(mean)[-3:].sum() / mean.sum())
    for measure in (found.total, found.top_1):
        assert measure.low is not None
        assert measure.value is not None
        assert measure.high is not None
        assert measure.low < measure.value < measure.high
    # The total of two normal carriers: 1.96 standard errors either way
    error = effects[:, [3, 7]].sum(1).std() / math.sqrt(60)
    width = (found.total.high or 0) - (found.total.low or 0)
    assert width == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_no_loss_at_all_has_no_measure() -> None:
    found = concentration(-np.ones((5, 4)))
    assert found.gini.value is found.effective.low is found.top_10.high is None
    assert found.total.value == 0
