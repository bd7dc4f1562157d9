"""Shares and differences against formulas written out by hand, brute force, and other tests."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from moesteer.errors import MoesteerError
from moesteer.evaluation.comparison import (
    ArmFacts,
    Comparison,
    Drift,
    TaskFacts,
    compare,
    pool_of,
)
from moesteer.statistics.intervals import wilson_interval
from moesteer.statistics.paired import matched_p


def task(name: str = "t", outcome: str = "yes") -> TaskFacts:
    return TaskFacts(name, name, outcome, ("yes", "no"), "target", True, 4, "never checked")


def records(table: Mapping[str, Sequence[str | None]], name: str = "t") -> list[dict[str, Any]]:
    return [
        {"task": name, "arm": arm, "item": item, "outcome": outcome}
        for arm, outcomes in table.items()
        for item, outcome in enumerate(outcomes)
    ]


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
