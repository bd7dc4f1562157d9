"""Tables of made readings, computed by hand or with another library."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_rel

from moesteer.errors import MoesteerError
from moesteer.evaluation.comparison import holm, wilson_interval
from moesteer.rationale.alignment import auprc
from moesteer.rationale.measures import MEASURES, baseline_of, control_of
from moesteer.rationale.reading import Choice, Masked, Named, Reading
from moesteer.rationale.summary import COMPARED, ArmFacts, Summary, doubtful, summarise

UNITS = (("claim", 0, 1), ("claim", 2, 3), ("document", 0, 1), ("document", 2, 3))
TOKENS = (1, 2, 1, 1)


def choice(*units: int, flipped: float = 0, lost: float = 0, alone: float = 0) -> Choice:
    return Choice(units, Masked(float(flipped), float(lost), float(alone)))


def reading(item: int, right: bool = True, arm: str = "unsteered", **found: object) -> Reading:
    made = Reading(
        item,
        f"made:{item}",
        arm,
        "yes",
        "yes" if right else "no",
        {"yes": 0.75, "no": 0.25} if right else {"yes": 0.25, "no": 0.75},
        0.5,
        {"claim": "a b", "document": "c d"},
        UNITS,
        (1, 2),
        TOKENS,
    )
    return replace(made, **found)


BY_HAND = [
    reading(
        0,
        scores={"occlusion": (0.1, 0.9, 0.5, 0.2), "random 0": (1.0, 0.0, 0.0, 1.0)},
        choices={
            "occlusion": choice(1, 2, flipped=1, lost=0.5, alone=0.125),
            "random 0": choice(0, 1, flipped=0, lost=0.25, alone=0.5),
            "random 1": choice(2, 3, flipped=1, lost=0.5, alone=0),
            "unbound": choice(1, flipped=1, lost=0.5, alone=0.25),
        },
        curve={"occlusion": (Masked(0.0, 0.25, 0.5), Masked(1.0, 0.5, 0.25))},
        shares=(0.1, 0.5),
        named={"unbound": Named("b z", 2, ("z",), 1, 0, cut=True, label="yes")},
        controls={"unbound": (choice(3, flipped=1, lost=0.25, alone=0.5), choice(0))},
    ),
    reading(
        1,
        right=False,
        scores={"occlusion": (0.9, 0.1, 0.5, 0.2), "random 0": (0.0, 1.0, 1.0, 0.0)},
        choices={
            "occlusion": choice(0, 2, flipped=0, lost=0.25, alone=0.25),
            "random 0": choice(1, 2, flipped=0, lost=0.125, alone=0.25),
            "random 1": choice(1, 2, flipped=0, lost=0.125, alone=0.25),
            "unbound": choice(flipped=0, lost=0, alone=0.5),
        },
        curve={"occlusion": (Masked(0.0, 0.0, 0.5), Masked(1.0, 0.5, 0.5))},
        shares=(0.1, 0.5),
        named={"unbound": Named("y z", 2, ("y", "z"), 0, 3, label="yes")},
        controls={"unbound": (choice(alone=0.5), choice(alone=0.5))},
    ),
]

MEANS = {
    ("occlusion", "tokens"): (2, 2.5),
    ("occlusion", "f1"): (2, (1 + 2 * 1 / (2 + 3)) / 2),
    ("occlusion", "precision"): (2, (1 + 1 / 2) / 2),
    ("occlusion", "recall"): (2, (1 + 1 / 3) / 2),
    ("occlusion", "iou"): (2, (1 + 1 / 4) / 2),
    # the second: document's c (1 of 2 tokens chosen), after d nothing, then b (3 of 5)
    ("occlusion", "auprc"): (2, (1 + (1 / 3 * 1 / 2 + 2 / 3 * 3 / 5)) / 2),
    ("occlusion", "flip"): (2, 0.5),
    ("occlusion", "flip_right"): (1, 1),
    ("occlusion", "flip_wrong"): (1, 0),
    ("occlusion", "comprehensiveness"): (2, 0.375),
    ("occlusion", "sufficiency"): (2, 0.1875),
    ("occlusion", "comprehensiveness_area"): (2, (0.375 + 0.25) / 2),
    ("occlusion", "sufficiency_area"): (2, (0.375 + 0.5) / 2),
    ("occlusion", "in:claim"): (2, (2 / 3 + 1 / 2) / 2),
    ("occlusion", "in:document"): (2, (1 / 3 + 1 / 2) / 2),
    ("random", "f1"): (2, ((2 * 2 / 6 + 2 * 1 / 5) / 2 + 1) / 2),
    ("random", "flip"): (2, (0.5 + 0) / 2),
    ("random", "flip_right"): (1, 0.5),
    ("unbound", "tokens"): (2, 1),
    ("unbound", "f1"): (2, (2 * 2 / 5 + 0) / 2),
    ("unbound", "precision"): (2, 0.5),
    ("unbound", "in:claim"): (1, 1),
    ("random for unbound", "flip"): (2, 0.25),
    ("random for unbound", "flip_right"): (1, 0.5),
    ("random for unbound", "comprehensiveness"): (2, (0.125 + 0) / 2),
}


def test_means_by_hand():
    made = summarise(BY_HAND)
    assert made.methods == ("occlusion", "random", "unbound", "random for unbound")
    for (method, measure), (n, value) in MEANS.items():
        found = made.mean("unsteered", method, measure)
        assert found is not None, (method, measure)
        assert (found.n, found.value) == (n, pytest.approx(value)), (method, measure)
        assert found.low <= found.value <= found.high
    assert {m.measure for m in made.means if m.method == "occlusion"} == {
        *MEASURES,
        "in:claim",
        "in:document",
    }
    assert made.mean("unsteered", "unbound", "auprc") is None
    assert made.mean("unsteered", "", "accuracy") is None


def test_curves_by_hand():
    made = summarise(BY_HAND)
    assert made.shares == (0.1, 0.5)
    points = made.curve("unsteered", "occlusion", "comprehensiveness")
    assert [(p.share, p.value) for p in points] == [(0.1, 0.125), (0.5, 0.5)]
    assert [p.value for p in made.curve("unsteered", "occlusion", "flip")] == [0, 1]
    assert made.curve("unsteered", "unbound", "flip") == ()


def test_prompted_replies_are_counted():
    (found,) = summarise(BY_HAND).prompted
    assert (found.arm, found.method, found.replies, found.empty) == ("unsteered", "unbound", 2, 1)
    assert (found.words, found.absent, found.inflected, found.surplus) == (4, 3, 1, 3)
    assert (found.cut, found.otherwise) == (1, 1)


@pytest.mark.parametrize(("method", "otherwise"), [("top-var", 2), ("top-var-two-turn", 0)])
def test_only_a_reply_that_was_to_give_the_label_can_give_another(method: str, otherwise: int):
    """Of labels right, none and wrong, and of choices that don't matter here."""
    said = ("yes", None, "no")
    readings = [
        reading(item, choices={method: choice(1)}, named={method: Named("b", 1, label=label)})
        for item, label in enumerate(said)
    ]
    (found,) = summarise(readings).prompted
    assert (found.replies, found.otherwise, found.cut) == (3, otherwise, 0)


def test_faithfulness_is_compared_at_equal_counts_only():
    made = summarise(BY_HAND)
    pairs = {(d.method, d.against): set[str]() for d in made.differences}
    for d in made.differences:
        pairs[d.method, d.against].add(d.measure)
    assert pairs == {
        ("occlusion", "random"): {*COMPARED}
        - {"comprehensiveness_area", "sufficiency_area"},  # no curve of random units here
        ("unbound", "random for unbound"): {"f1", "flip", "comprehensiveness", "sufficiency"},
        ("occlusion", "unbound"): {"f1"},
    }
    found = made.difference("unsteered", "comprehensiveness", "occlusion", "random")
    assert found is not None
    assert found.difference == pytest.approx((0.5 - 0.375 + 0.25 - 0.125) / 2)
    # Two differences: both of one sign in 2 of the 4 patterns.
    assert (found.n, found.p) == (2, 0.5)
    assert made.difference("unsteered", "flip", "occlusion", "unbound") is None


def test_random_units_of_a_method_without_its_own_are_the_pool():
    assert control_of("unbound") == "random for unbound"
    assert baseline_of("unbound", ["unbound", "random for unbound"]) == "random for unbound"
    assert baseline_of("occlusion", ["occlusion", "random"]) == "random"


# -- many readings -------------------------------------------------------------------------------

METHODS = ("attention-mean", "saliency-l1", "occlusion")


def many(n: int, arm: str = "unsteered", seed: int = 0, shift: float = 0.0) -> list[Reading]:
    """Methods that flip the more often the later they stand in METHODS; every 4th label wrong."""
    rng = np.random.default_rng(seed)
    made = []
    for item in range(n):
        choices = {
            method: choice(
                *sorted(rng.choice(4, 2, replace=False).tolist()),
                flipped=float(rng.random() < 0.2 + 0.3 * place),
                lost=float(rng.normal(0.2 * place + shift, 0.3)),
                alone=float(rng.normal(0, 0.3)),
            )
            for place, method in enumerate((*METHODS, "random 0", "random 1"))
        }
        scores = {method: tuple(rng.normal(size=4).tolist()) for method in choices}
        curve = {method: (one.masked, Masked(1.0, 0.5, 0.0)) for method, one in choices.items()}
        found = {"choices": choices, "scores": scores, "curve": curve, "shares": (0.2, 0.5)}
        made.append(reading(item, item % 4 != 0, arm, **found))
    return made


def test_a_difference_is_what_other_tests_see():
    readings = many(80)
    made = summarise(readings)
    values = {
        method: np.array([r.choices[method].masked.comprehensiveness for r in readings])
        for method in METHODS
    }
    pairs = [d for d in made.differences if d.measure == "comprehensiveness"]
    between = [d for d in pairs if d.against != "random"]
    assert len(between) == 3
    for d in between:
        one, other = values[d.method], values[d.against]
        assert d.difference == pytest.approx((one - other).mean())
        assert d.p == pytest.approx(ttest_rel(one, other).pvalue, abs=0.02)
        half = 1.96 * (one - other).std() / np.sqrt(80)
        assert d.low == pytest.approx(d.difference - half, abs=0.02)
        assert d.high == pytest.approx(d.difference + half, abs=0.02)
    for family in (between, [d for d in pairs if d.against == "random"]):
        assert [d.holm for d in family] == pytest.approx(holm([d.p for d in family]))
    found = made.mean("unsteered", "occlusion", "auprc")
    by_hand = [auprc(r.scores["occlusion"], r.human, r.tokens) for r in readings]
    assert found is not None
    assert found.value == pytest.approx(np.mean(by_hand))


def test_curves_of_random_units_are_one():
    made = summarise(many(30))
    for method in (*METHODS, "random"):
        whole = made.mean("unsteered", method, "comprehensiveness")
        area = made.mean("unsteered", method, "comprehensiveness_area")
        points = made.curve("unsteered", method, "comprehensiveness")
        assert whole is not None
        assert area is not None
        assert [p.value for p in points] == pytest.approx([whole.value, 0.5])
        assert area.value == pytest.approx((whole.value + 0.5) / 2)
        if method != "random":
            d = made.difference("unsteered", "comprehensiveness", method, "random")
            half = made.difference("unsteered", "comprehensiveness_area", method, "random")
            assert d is not None
            assert half is not None
            assert half.difference == pytest.approx(d.difference / 2)


def test_changes_between_arms():
    unsteered, steered = many(60), many(60, "steered", shift=0.4)
    steered = [replace(r, predicted="yes") for r in steered]
    made = summarise([*steered, *unsteered])
    assert [arm.name for arm in made.arms] == ["unsteered", "steered"]
    accuracy = made.change("accuracy", "", "steered", "unsteered")
    assert accuracy is not None
    assert (accuracy.n, accuracy.difference) == (60, pytest.approx(0.25))
    assert accuracy.p < 0.001
    for measure in ("flip", "comprehensiveness", "sufficiency"):
        family = [c for c in made.changes if c.measure == measure]
        assert [c.method for c in family] == [*METHODS, "random"]
        assert [c.holm for c in family] == pytest.approx(holm([c.p for c in family]))
    for method in METHODS:
        changed = made.change("comprehensiveness", method, "steered", "unsteered")
        assert changed is not None
        assert changed.difference == pytest.approx(0.4)
        same = made.change("f1", method, "steered", "unsteered")
        assert same is not None
        assert (same.difference, same.p, same.holm) == (0, 1, 1)
        assert made.change("in:document", method, "steered", "unsteered") is not None


def test_control_arms_are_one_where_arms_are_compared():
    arms = {"unsteered": 0.0, "random 0": 0.1, "random 1": 0.3, "steered": 0.6}
    made = summarise([r for arm, shift in arms.items() for r in many(20, arm, shift=shift)])
    assert [arm.name for arm in made.arms] == ["unsteered", "steered", "random 0", "random 1"]
    expected = {
        ("random", "unsteered"): 0.2,
        ("steered", "unsteered"): 0.6,
        ("steered", "random"): 0.4,
    }
    for (arm, against), difference in expected.items():
        found = made.change("comprehensiveness", "occlusion", arm, against)
        assert found is not None
        assert found.difference == pytest.approx(difference)


def test_without_an_unsteered_arm_each_is_compared_with_the_first():
    """Runs are named as people like; of one that holds several arms, controls are one again."""
    arms = {"epoch 1": 0.0, "epoch 2": 0.1, "x: random 0": 0.2, "x: random 1": 0.4}
    made = summarise([r for arm, shift in arms.items() for r in many(8, arm, shift=shift)])
    assert {(c.arm, c.against) for c in made.changes} == {
        ("epoch 2", "epoch 1"),
        ("x: random", "epoch 1"),
    }
    for arm, difference in (("epoch 2", 0.1), ("x: random", 0.3)):
        found = made.change("comprehensiveness", "occlusion", arm, "epoch 1")
        assert found is not None
        assert found.difference == pytest.approx(difference)


def test_arms_of_several_runs_are_compared_within_their_run_and_with_the_first():
    arms = [f"{run}: {arm}" for run in "ab" for arm in ("unsteered", "steered", "random 0")]
    made = summarise([r for arm in arms for r in many(4, arm)])
    assert {(c.arm, c.against) for c in made.changes} == {
        ("a: steered", "a: unsteered"),
        ("a: random", "a: unsteered"),
        ("b: unsteered", "a: unsteered"),
        ("b: steered", "b: unsteered"),
        ("b: steered", "a: steered"),
        ("b: random", "b: unsteered"),
        ("b: random", "a: random"),
    }


def test_arms_are_compared_in_faithfulness_at_equal_counts_only():
    """The steered model names one unit more of one instance."""
    steered = [replace(r, arm="steered") for r in BY_HAND]
    steered[0] = replace(steered[0], choices=steered[0].choices | {"unbound": choice(0, 1)})
    steered[0] = replace(steered[0], controls={"unbound": (choice(2, 3), choice(0, 3))})
    made = summarise([*BY_HAND, *steered])
    changed = {
        method: {c.measure for c in made.changes if c.method == method} for method in made.methods
    }
    for method in ("occlusion", "random"):
        assert {"f1", "flip", "comprehensiveness", "sufficiency"} <= changed[method]
    assert changed["unbound"] == {"tokens", "f1", "in:claim", "in:document"}
    assert changed["random for unbound"] == {"tokens", "f1", "in:claim", "in:document"}


def test_the_order_of_readings_does_not_matter_to_numbers():
    readings = many(15)
    one, other = summarise(readings), summarise(readings[::-1])
    for mean in one.means:
        found = other.mean(mean.arm, mean.method, mean.measure)
        assert found is not None
        assert (found.low, found.value, found.high) == pytest.approx(
            (mean.low, mean.value, mean.high)
        )


def test_json_gives_back_the_same():
    made = summarise([*BY_HAND, *many(3, "steered")], seed=1)
    assert Summary.from_json(made.to_json()) == made


def test_no_readings():
    with pytest.raises(MoesteerError, match="no readings"):
        summarise([])


def test_other_files_are_refused():
    with pytest.raises(MoesteerError, match=r"^here is a summary of rationales of format None"):
        Summary.from_json("{}", "here")


# -- accuracy first ------------------------------------------------------------------------------


def arm(gold: dict[str, int], predicted: dict[str, int], right: int, mass: float = 0.9) -> ArmFacts:
    n = sum(gold.values())
    low, high = wilson_interval(right, n)
    majority = max(gold.values()) / n
    return ArmFacts("a", n, right, right / n, low, high, majority, gold, predicted, mass)


def test_accuracy_and_labels():
    (facts,) = summarise(many(40)).arms
    assert (facts.n, facts.right, facts.accuracy) == (40, 30, 0.75)
    assert (facts.low, facts.high) == wilson_interval(30, 40)
    assert facts.gold == {"yes": 40, "no": 0}
    assert facts.predicted == {"yes": 30, "no": 10}
    assert facts.majority == 1
    assert facts.doubt == doubtful(facts) is not None


def test_a_model_near_chance_is_doubted():
    even = {"yes": 50, "no": 50}
    assert doubtful(arm(even, even, 80)) is None
    assert doubtful(arm(even, even, 59)) == (
        "59 of 100 instances are labelled rightly (59%, interval 49% to 68%), where always saying"
        " “yes” would reach 50%"
    )


def test_labels_that_the_model_would_not_say_are_doubted():
    even = {"yes": 50, "no": 50}
    assert doubtful(arm(even, even, 80, mass=0.02)) is None
    said = doubtful(arm(even, even, 80, mass=2e-5))
    assert said is not None
    assert "2e-05 of the probability of all replies" in said


def test_the_mass_is_the_median():
    found = [replace(r, mass=mass) for r, mass in zip(many(3), (0.1, 0.9, 0.3), strict=True)]
    assert summarise(found).arms[0].mass == 0.3


def test_a_label_that_takes_over_is_doubted():
    gold = {"yes": 300, "no": 700}
    said = doubtful(arm(gold, {"yes": 90, "no": 910}, 790))
    assert said == "“no” takes 91% of the predictions, but is right for 70%"
    assert doubtful(arm(gold, {"yes": 110, "no": 890}, 790)) is None
    # Where nearly everything is of one label, saying it nearly always is no collapse.
    assert doubtful(arm({"yes": 100, "no": 900}, {"yes": 80, "no": 920}, 960)) is None
