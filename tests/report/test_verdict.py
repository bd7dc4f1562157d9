"""Verdicts against a table of what may and what may not be claimed."""

from dataclasses import replace

import pytest
from made_runs import ARMS, Numbers, comparison, task

from moesteer.evaluation.comparison import Comparison
from moesteer.report.verdict import verdicts, warnings_of, worst_price

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
