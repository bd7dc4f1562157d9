"""Verdicts against a table of what may and what may not be claimed."""

from dataclasses import replace

import numpy as np
import pytest
from made_runs import ARMS, Numbers, comparison, task

from moesteer.evaluation.comparison import Comparison, compare
from moesteer.report.verdict import (
    is_beyond,
    reach_of_seeds,
    verdicts,
    warnings_of,
    worst_price,
)

TARGET, PRICE = task(), task("sums", "price")

UP: Numbers = (0.5, 0.4, 0.6, 0.001)
DOWN: Numbers = (-0.5, -0.6, -0.4, 0.001)
SAME: Numbers = (0.02, -0.1, 0.1, 0.9)
AT_ZERO: Numbers = (0.1, 0.0, 0.2, 0.001)
UNSURE: Numbers = (0.1, 0.01, 0.2, 0.06)
NONE: Numbers = (None, None, None, None)


def made(unsteered: Numbers, random: Numbers, bottom: Numbers, price: Numbers = SAME) -> Comparison:
    target = {
        ("steered", "unsteered"): unsteered,
        ("steered", "random"): random,
        ("steered", "bottom"): bottom,
        ("steered", "reversed"): SAME,
    }
    return comparison({TARGET: target, PRICE: {("steered", "unsteered"): price}})


@pytest.mark.parametrize(
    ("numbers", "short"),
    [
        ((UP, UP, UP), ()),
        ((DOWN, DOWN, DOWN), ()),
        ((UP, SAME, UP), ("random",)),
        ((UP, UP, SAME), ("bottom",)),
        ((UP, SAME, SAME), ("random", "bottom")),
        ((SAME, UP, UP), ("unsteered",)),
        ((UP, DOWN, UP), ("random",)),  # beyond it the other way: random experts do more
        ((DOWN, UP, DOWN), ("random",)),
        ((UP, AT_ZERO, UP), ("random",)),
        ((UP, UNSURE, UP), ("random",)),
        ((UP, NONE, UP), ("random",)),
        ((NONE, NONE, NONE), ("unsteered", "random", "bottom")),
    ],
)
def test_an_effect_is_claimed_only_beyond_the_unsteered_model_and_every_control(
    numbers: tuple[Numbers, Numbers, Numbers], short: tuple[str, ...]
):
    (found,) = verdicts(made(*numbers))
    assert found.against == ("unsteered", "random", "bottom")
    assert found.short == short
    assert found.claimed is (not short)
    assert ("nothing was found beyond random experts" in found.sentence) is bool(short)


def test_an_effect_that_one_more_seed_may_have_is_not_claimed():
    # Seeds 0.4, 0.5, 0.6: standard deviation 0.1, t(0.975; 2) = 4.3027, so 43 · √(4/3) = 50 points.
    arms = (*ARMS[:-1], "random 2", "bottom")
    almost: Numbers = (0.49, 0.4, 0.6, 0.001)
    given = {("steered", "unsteered"): UP, ("steered", "random"): almost, ("steered", "bottom"): UP}
    near = comparison({TARGET: given}, arms, seeds=(0.4, 0.5, 0.6))
    (found,) = verdicts(near)
    assert reach_of_seeds(near, "towns") == {"random": pytest.approx(0.4968, abs=1e-4)}
    assert not found.claimed
    assert found.short == ("random",)
    assert "p = 0.001]; one more seed may lie 50 points from the others)" in plain(found.sentence)
    beyond = given | {("steered", "random"): (0.51, 0.4, 0.6, 0.001)}
    (found,) = verdicts(comparison({TARGET: beyond}, arms, seeds=(0.4, 0.5, 0.6)))
    assert found.claimed
    # Two targets: t(0.9875; 2) = 6.2053.
    two = comparison({TARGET: beyond, task("rivers"): {}}, arms, seeds=(0.4, 0.5, 0.6))
    assert reach_of_seeds(two, "towns")["random"] == pytest.approx(0.7165, abs=1e-4)
    assert not verdicts(two)[0].claimed


def test_of_one_seed_nothing_is_claimed():
    given = {("steered", pool): UP for pool in ("unsteered", "random", "bottom")}
    arms = tuple(arm for arm in ARMS if arm != "random 1")
    (found,) = verdicts(comparison({TARGET: given}, arms))
    assert not found.claimed
    assert "one seed does not tell how far random experts lie apart" in found.sentence


def test_random_experts_are_seldom_claimed_to_be_better_than_random_experts():
    # The steered arm is one more draw of experts: what sets of experts do differs among sets, and
    # with 120 prompts any two sets differ "significantly".
    arms = [name for name in ARMS if name not in ("reversed", "bottom")] + ["random 2"]
    arms += [f"matched {seed}" for seed in range(3)]
    claimed = by_prompts = 0
    for seed in range(150):
        generator = np.random.default_rng(seed)
        rows = generator.random((len(arms), 120)) < generator.beta(2, 2, (len(arms), 1))
        rows[0] = generator.random(120) < 0.5
        records = [
            {"task": "towns", "arm": arm, "item": item, "outcome": "yes" if hit else "no"}
            for arm, row in zip(arms, rows, strict=True)
            for item, hit in enumerate(row)
        ]
        shares, differences = compare([TARGET], arms, records, seed)
        made = replace(
            comparison({TARGET: {}}, arms),
            shares=tuple(shares),
            differences=tuple(differences),
        )
        (found,) = verdicts(made)
        claimed += found.claimed
        way = np.sign(made.difference("towns", "steered", "unsteered").difference or 0.0)
        by_prompts += all(
            is_beyond(made.difference("towns", "steered", other), way) for other in found.against
        )
    assert claimed <= 14  # 7.5 are expected at most, more than 14 have a chance of 1 in 100
    assert by_prompts > 30


def test_without_controls_nothing_is_claimed():
    given = {("steered", "unsteered"): UP}
    (found,) = verdicts(comparison({TARGET: given}, arms=ARMS[:3]))
    assert not found.claimed
    assert "nothing was found beyond random experts" in found.sentence
    assert "there are no controls" in found.sentence


def plain(sentence: str) -> str:
    return sentence.replace("\N{NARROW NO-BREAK SPACE}", " ")


def test_the_sentence_holds_interval_nearest_control_and_price():
    nearer: Numbers = (0.3, 0.2, 0.4, 0.01)
    (found,) = verdicts(made(UP, nearer, UP, price=(-0.07, -0.12, -0.02, 0.2)))
    assert plain(found.sentence) == (
        "Steering (made.safetensors) raises the share of “yes” on towns from – to –, by +50"
        " points [95 %: +40 … +60, p = 0.001], and beyond every control (the nearest: random, +30"
        " points [95 %: +20 … +40, p = 0.01]); the largest price is −7 points"
        " [95 %: −12 … −2, p = 0.2] on sums."
    )


def test_the_sentence_names_the_control_that_is_not_surpassed():
    (found,) = verdicts(made(UP, SAME, UP))
    assert "but that does not go beyond random (steered less random: +2 points" in found.sentence


def test_an_effect_downwards_is_said_to_lower():
    (found,) = verdicts(made(DOWN, DOWN, DOWN))
    assert "lowers the share" in found.sentence
    assert "−50 points" in found.sentence


def test_where_every_prompt_did_the_same_no_interval_of_no_width_is_shown():
    sure: Numbers = (1.0, 1.0, 1.0, 0.0001)
    (found,) = verdicts(made(sure, sure, sure, price=(0.0, 0.0, 0.0, 1.0)))
    assert "+100 points [the same on each of 20 prompts]" in found.sentence
    assert found.sentence.endswith("; no price seen.")


def test_without_a_price_task_the_sentence_says_so():
    (found,) = verdicts(comparison({TARGET: {("steered", "unsteered"): SAME}}))
    assert found.sentence.endswith("; no price measured.")


@pytest.mark.parametrize(
    ("falls", "worst"), [((-0.1, -0.3), "b"), ((-0.1, 0.2), "a"), ((0.3, 0.2), "b")]
)
def test_the_price_is_the_task_that_falls_most(falls: tuple[float, float], worst: str):
    tasks = {
        task(name, "price"): {("steered", "unsteered"): (fall, fall - 0.1, fall + 0.1, 1.0)}
        for name, fall in zip("ab", falls, strict=True)
    }
    price = worst_price(comparison({TARGET: {}, **tasks}))
    assert price is not None
    assert price.task == worst


def test_each_target_has_a_verdict_and_prices_have_none():
    tasks = {TARGET: {}, PRICE: {}, task("rivers"): {}}
    assert [found.task for found in verdicts(comparison(tasks))] == ["towns", "rivers"]
    assert [found.task for found in verdicts(comparison({PRICE: {}}))] == ["sums"]


@pytest.mark.parametrize("model", ["testbed", "testbed-twin"])
def test_the_testbeds_numbers_are_said_to_mean_nothing(model: str):
    said = warnings_of(comparison({TARGET: {}}, model=model))
    assert any("say nothing about real models" in line for line in said)
    assert not warnings_of(comparison({TARGET: {}}))


def test_a_reversed_profile_that_does_the_same_is_warned_of():
    both = {("steered", pool): UP for pool in ("unsteered", "random", "bottom", "reversed")}
    (said,) = warnings_of(comparison({TARGET: {**both, ("reversed", "unsteered"): UP}}))
    assert "the sign-reversed profile moves the share the same way" in said
    assert not warnings_of(comparison({TARGET: {**both, ("reversed", "unsteered"): DOWN}}))


def test_an_arm_that_did_not_obey_is_warned_of():
    bare = comparison({TARGET: {}})
    arms = (*bare.arms[:1], replace(bare.arms[1], obeyed=False, note="2 layers"), *bare.arms[2:])
    (said,) = warnings_of(replace(bare, arms=arms))
    assert said.startswith("steered: not every token obeyed")


@pytest.mark.parametrize(("split", "warned"), [("test", False), ("dev", True), ("all", True)])
def test_what_was_measured_on_other_prompts_than_test_is_warned_of(split: str, warned: bool):
    said = warnings_of(replace(comparison({TARGET: {}}), split=split))
    assert any("measure it once on test" in line for line in said) is warned
