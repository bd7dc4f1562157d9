"""Shares and differences against formulas written out by hand, brute force, and other tests."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from moesteer.errors import MoesteerError
from moesteer.evaluation.comparison import (
    ArmFacts,
    Comparison,
    Drift,
    TaskFacts,
    compare,
    holm,
    matched_p,
    mcnemar_p,
    paired_bootstrap_difference,
    pool_of,
    wilson_interval,
)


def task(name: str = "t", outcome: str = "yes") -> TaskFacts:
    return TaskFacts(name, name, outcome, ("yes", "no"), "target", True, 4, "never checked")


def records(table: Mapping[str, Sequence[str | None]], name: str = "t") -> list[dict[str, Any]]:
    return [
        {"task": name, "arm": arm, "item": item, "outcome": outcome}
        for arm, outcomes in table.items()
        for item, outcome in enumerate(outcomes)
    ]


# -- the share's interval ------------------------------------------------------------------------


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_published_formula(counted: tuple[int, int]):
    count, n = counted
    p, z = count / n, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = wilson_interval(count, n)
    assert low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert high == pytest.approx(min(1, centre + half), abs=1e-9)


def test_wilson_of_nothing():
    assert wilson_interval(0, 0) == (0, 1)


# -- p -------------------------------------------------------------------------------------------


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


def test_the_bootstrap_is_that_of_items():
    """Drawing how often each value occurs is drawing items: against a plain bootstrap."""
    generator = np.random.default_rng(1)
    by_item = generator.choice([-1, -1 / 3, 0, 2 / 3, 1], size=50)
    plain = generator.choice(by_item, size=(40_000, 50)).mean(1)
    expected = np.quantile(plain, [0.025, 0.975])
    found = paired_bootstrap_difference(by_item)
    assert found == pytest.approx(expected, abs=0.01)
    assert found == paired_bootstrap_difference(by_item)
    assert found != paired_bootstrap_difference(by_item, seed=1)


def test_where_every_item_did_the_same_there_is_no_width():
    assert paired_bootstrap_difference(np.ones(7)) == (1, 1)


def test_the_interval_covers_the_true_difference():
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        by_item = generator.choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=80)
        low, high = paired_bootstrap_difference(by_item, resamples=2000)
        covered += low <= 0.2 <= high
    assert covered >= 0.9 * 300


# -- together ------------------------------------------------------------------------------------


def test_a_table_by_hand():
    arms = ["unsteered", "steered", "random 0", "random 1"]
    shares, differences = compare(
        [task()],
        arms,
        records(
            {
                "unsteered": ["no", "no", "no", "yes"],
                "steered": ["yes", "yes", None, "yes"],
                "random 0": ["no", "yes", "no", "yes"],
                "random 1": ["no", None, "no", "no"],
            }
        ),
        seed=0,
    )
    by_arm = {share.arm: share for share in shares}
    assert [s.arm for s in shares] == arms
    steered = by_arm["steered"]
    assert (steered.n, steered.count, steered.share, steered.unjudged) == (3, 3, 1.0, 1)
    assert steered.outcomes == {"yes": 3, "no": 0}
    assert (steered.low, steered.high) == wilson_interval(3, 3)
    assert by_arm["random 1"].share == 0

    found = {(d.arm, d.against): d for d in differences}
    assert list(found) == [
        ("steered", "unsteered"),
        ("random", "unsteered"),
        ("steered", "random"),
    ]
    # Items 0, 1 and 3 were judged in both.
    effect = found["steered", "unsteered"]
    assert (effect.n, effect.difference, effect.p) == (3, pytest.approx(2 / 3), 0.5)
    # Random is 0, 1 (one seed), 0, ½ on items 0 to 3.
    over = found["steered", "random"]
    assert (over.n, over.difference) == (3, pytest.approx((1 + 0 + 0.5) / 3))
    assert over.p == matched_p([True] * 3, [[False, False], [True], [True, False]])
    drift = found["random", "unsteered"]
    assert (drift.n, drift.difference) == (4, pytest.approx((0 + 1 + 0 - 0.5) / 4))


def test_holm_runs_over_the_tasks_of_one_comparison():
    table = {"unsteered": ["no"] * 8, "steered": ["yes"] * 8, "reversed": ["no"] * 8}
    weak = {"unsteered": ["no"] * 8, "steered": ["yes"] * 6 + ["no"] * 2, "reversed": ["no"] * 8}
    both = records(table, "s") + records(weak, "w")
    _, differences = compare([task("s"), task("w")], list(table), both, seed=0)
    found = {(d.task, d.arm, d.against): d for d in differences}
    for against in ("unsteered", "reversed"):
        strong, weaker = found["s", "steered", against], found["w", "steered", against]
        assert (strong.p, weaker.p) == (pytest.approx(2 / 256), pytest.approx(2 / 64))
        assert (strong.holm, weaker.holm) == (pytest.approx(4 / 256), pytest.approx(2 / 64))
    assert found["s", "reversed", "unsteered"].p == 1


def test_nothing_judged_is_said():
    shares, differences = compare(
        [task()], ["unsteered", "steered"], records({"unsteered": ["no"], "steered": [None]}), 0
    )
    assert (shares[1].n, shares[1].share, shares[1].unjudged) == (0, None, 1)
    assert (differences[0].n, differences[0].difference, differences[0].holm) == (0, None, None)


def test_pools():
    assert [pool_of(a) for a in ("unsteered", "random 0", "random 12", "bottom", "my arm x")] == [
        "unsteered", "random", "random", "bottom", "my arm x",
    ]  # fmt: skip


# -- as a file -----------------------------------------------------------------------------------


def comparison() -> Comparison:
    table: dict[str, list[str | None]] = {"unsteered": ["no", "yes"], "steered": ["yes", None]}
    shares, differences = compare([task()], list(table), records(table), 0)
    return Comparison(
        "testbed",
        "p",
        "test",
        0,
        (task(),),
        (ArmFacts("unsteered"), ArmFacts("steered", ((1, 2),), (), 40)),
        tuple(shares),
        tuple(differences),
        (Drift("t", "steered", None, 0.5),),
        ("a note",),
    )


def test_a_comparison_survives_its_file():
    original = comparison()
    assert Comparison.from_json(original.to_json()) == original
    assert original.share("t", "steered").count == 1
    assert original.difference("t", "steered", "unsteered").n == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "x.json is a comparison of format 99; this version of moesteer reads"),
        ({"schema": None}, "format None"),
        ({"seed": "0"}, "x.json: seed: Input should be a valid integer"),
        ({"tasks": [{"name": "t"}]}, r"x.json: tasks.0.title: Field required"),
        ({"tasks": []}, "x.json does not hold every task, arm and difference"),
        ({"arms": []}, "x.json does not hold every"),
        ({"shares": []}, "x.json does not hold every"),
        ({"differences": []}, "x.json does not hold every"),
    ],
)
def test_another_file_is_refused(change: dict[str, Any], message: str):
    raw = json.loads(comparison().to_json()) | change
    with pytest.raises(MoesteerError, match=message):
        Comparison.from_json(json.dumps(raw), "x.json")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_what_is_no_comparison_is_refused(text: str):
    with pytest.raises(MoesteerError, match=r"x.json is"):
        Comparison.from_json(text, "x.json")
