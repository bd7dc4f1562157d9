"""Intervals and tests against brute force over all resamples and signs, and other tests."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test

from moesteer.rationale.resampling import bootstrap_intervals, counts_and_means, sign_flip_p
from moesteer.statistics.intervals import mean_interval
from moesteer.statistics.paired import mcnemar_p

NAN = np.nan


def test_counts_and_means_leave_out_what_is_missing():
    n, means = counts_and_means(np.array([[1.0, NAN, 2.0], [0.0, NAN, NAN], [5.0, NAN, 4.0]]))
    assert n.tolist() == [3, 0, 2]
    assert means[[0, 2]].tolist() == [2, 3]
    assert np.isnan(means[1])


# -- intervals -----------------------------------------------------------------------------------


def test_intervals_of_all_resamples_of_a_few_instances():
    column = np.array([0.0, 1.0, NAN, 10.0])
    drawn = [column[list(rows)] for rows in product(range(4), repeat=4)]
    means = [np.nanmean(values) for values in drawn if not np.isnan(values).all()]
    cumulative = np.sort(means)
    low, high = bootstrap_intervals(column[:, None], seed=3)[:, 0]
    # Means are few: within 1 % of the drawn shares, the exact percentiles are those.
    for end, share in ((low, 0.025), (high, 0.975)):
        near = np.quantile(cumulative, [share - 0.01, share + 0.01])
        assert near[0] <= end <= near[1]


def test_the_bootstrap_of_comparisons_agrees():
    rng = np.random.default_rng(1)
    table = rng.normal(size=(60, 4)).round(1)
    found = bootstrap_intervals(table, seed=0)
    for column, ends in zip(table.T, found.T, strict=True):
        expected = mean_interval(column, seed=1)
        assert ends == pytest.approx(expected, abs=0.02)


def test_some_instances_only_are_as_if_there_were_no_others():
    rng = np.random.default_rng(2)
    column = rng.normal(size=400)
    column[200:] = NAN
    some, alone = (
        bootstrap_intervals(column[:, None], 0),
        bootstrap_intervals(column[:200, None], 0),
    )
    assert some == pytest.approx(alone, abs=0.02)


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(4)
    table = rng.exponential(size=(80, 400))
    low, high = bootstrap_intervals(table, seed=0)
    assert 0.90 <= ((low <= 1) & (high >= 1)).mean() <= 0.97


def test_no_instances_no_interval():
    assert np.isnan(bootstrap_intervals(np.array([[NAN], [NAN]]), seed=0)).all()


# -- p -------------------------------------------------------------------------------------------

few = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.1, 1.0, 2.5]), min_size=1, max_size=9)


@given(few)
@settings(max_examples=40)
def test_p_of_a_few_differences_is_scipys(differences: list[float]):
    column = np.array([*differences, NAN])
    (p,) = sign_flip_p(column[:, None], seed=0)
    if len(differences) == 1:
        assert p == 1
        return
    expected = permutation_test(
        (column[:-1],), np.sum, permutation_type="samples", n_resamples=2**9
    )
    assert p == pytest.approx(min(1, expected.pvalue))


def test_p_of_nothing_is_1():
    assert sign_flip_p(np.array([[NAN, 0.0], [NAN, 0.0]]), seed=0).tolist() == [1, 1]


def test_p_of_many_differences_is_near_mcnemars():
    rng = np.random.default_rng(5)
    ours, theirs = rng.random((200, 6)) < 0.6, rng.random((200, 6)) < 0.5
    found = sign_flip_p(ours.astype(float) - theirs, seed=0)
    for column, p in enumerate(found):
        expected = mcnemar_p(ours[:, column].tolist(), theirs[:, column].tolist())
        assert p == pytest.approx(expected, abs=4 * np.sqrt(expected / 10_000) + 2e-4)


def test_columns_do_not_matter_to_each_other():
    rng = np.random.default_rng(6)
    table = rng.normal(size=(50, 5))
    table[20:, 1] = NAN
    table[10:, 2] = 0
    together = sign_flip_p(table, seed=0)
    alone = [sign_flip_p(column[:, None], seed=0)[0] for column in table.T]
    assert together == pytest.approx(alone)


def test_p_is_never_0_and_uniform_where_nothing_differs():
    assert sign_flip_p(np.full((40, 1), 3.0), seed=0)[0] == pytest.approx(1 / 10_001)
    p = sign_flip_p(np.random.default_rng(7).normal(size=(30, 1000)), seed=0)
    for level in (0.05, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=4 * np.sqrt(level / 1000))
