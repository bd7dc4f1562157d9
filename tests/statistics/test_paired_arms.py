"""Tests of arms on the same items, by hand, by every relabelling, and by how often they reject."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from moesteer.statistics.paired import holm, matched_p, mcnemar_p


def test_mcnemar_by_hand():
    # 5 discordant pairs, all one way: 2 · 2⁻⁵
    assert mcnemar_p([True] * 7, [True] * 2 + [False] * 5) == pytest.approx(2 / 32)
    assert mcnemar_p([True, False], [True, False]) == 1
    assert mcnemar_p([], []) == 1


bools = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40)


@given(bools)
def test_one_matched_arm_is_mcnemar(pairs: list[tuple[bool, bool]]):
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    expected = mcnemar_p(ours, theirs)
    assert matched_p(ours, [[b] for b in theirs]) == pytest.approx(expected)
    ahead, behind = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
    if ahead + behind:
        assert expected == pytest.approx(float(binomtest(ahead, ahead + behind, 0.5).pvalue))


items = st.lists(st.lists(st.booleans(), min_size=2, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(items)
def test_matched_p_is_every_relabelling(replies: list[list[bool]]):
    """Brute force: any reply of an item might have been the single arm's."""
    seen = sum(r[0] for r in replies)
    hits = [sum(r[i] for r, i in zip(replies, chosen, strict=True))
            for chosen in product(*(range(len(r)) for r in replies))]  # fmt: skip
    chance = {h: hits.count(h) / len(hits) for h in hits}
    # The items' ways are equally likely for each item, so all choices are, together.
    expected = sum(p for p in chance.values() if p <= chance[seen] * (1 + 1e-9))
    assert matched_p([r[0] for r in replies], [r[1:] for r in replies]) == pytest.approx(expected)


def test_p_is_uniform_or_above_where_arms_are_exchangeable():
    """An exact test rejects at 5 % in at most 5 % of cases without an effect."""
    generator = np.random.default_rng(0)
    rejected = 0
    for _ in range(600):
        replies = generator.random((30, 4)) < generator.random((30, 1))
        rejected += matched_p(replies[:, 0].tolist(), replies[:, 1:].tolist()) <= 0.05
    assert 5 <= rejected <= 42  # 30 expected at most; below 5 it would have no power left


def test_holm_by_hand():
    # Sorted: 0.01·4, 0.02·3, 0.03·2, 0.04·1, each at least the one before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_as_the_procedure_says(p: list[float]):
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.2):
        left, rejected = sorted(range(len(p)), key=lambda i: p[i]), set()
        while left and p[left[0]] * len(left) <= level:
            rejected.add(left.pop(0))
        assert {i for i, a in enumerate(adjusted) if a <= level} == rejected


# -- the difference's interval -------------------------------------------------------------------
