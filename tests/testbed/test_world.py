"""The world: what is held out stays out, cues are balanced, replies are judged as they read."""

import random

import pytest

from moesteer.testbed import world


def prompts(split: str) -> set[str]:
    asked = {p.prompt for task in world.TASKS for p in world.probes(task, split)}
    return asked | {p["prompt"] for b in world.BEHAVIOURS for p in world.contrast_pairs(b, split)}


def test_splits_are_disjoint_from_each_other_and_from_training() -> None:
    rng = random.Random("any seed")
    trained = {world.training_example(rng).prompt for _ in range(20_000)}
    fit, dev, test = (prompts(split) for split in world.SPLITS)
    assert not fit & dev
    assert not fit & test
    assert not dev & test
    assert not trained & (fit | dev | test)


def test_combinations_are_held_out_not_only_their_wording() -> None:
    for task in ("restricted", "benign", "facts", "conflicts", "counting"):
        splits = [set(world.combinations(task, s)) for s in ("train", *world.SPLITS)]
        assert sum(map(len, splits)) == len(set.union(*splits))


@pytest.mark.parametrize("behaviour", world.BEHAVIOURS)
@pytest.mark.parametrize("split", world.SPLITS)
def test_pairs_have_the_promised_shape(behaviour: str, split: str) -> None:
    pairs = world.contrast_pairs(behaviour, split)
    assert len({p["prompt"] for p in pairs}) == len(pairs) == world.PAIRS[split]
    for pair in pairs:
        assert set(pair) == {"prompt", "a", "b", "target"}
        assert pair["target"] == "reply"
        assert pair["a"] != pair["b"]


@pytest.mark.parametrize("split", world.SPLITS)
def test_habits_are_half_and_half(split: str) -> None:
    for task in ("conflicts", "counting"):
        habits = [e.habit for e in world.held_out(task, split, 96)]
        assert habits.count("a") == habits.count("b") == 48
    for task, habit in (("restricted", "a"), ("benign", "b")):
        assert {e.habit for e in world.held_out(task, split, 96)} == {habit}


@pytest.mark.parametrize("task", world.TASKS)
def test_probes_know_both_replies(task: str) -> None:
    examples = world.held_out(task, "test", world.PROBES)
    probes = world.probes(task, "test")
    assert len(probes) == world.PROBES
    shows = {
        "restricted": ("refused", "answered"),
        "benign": ("refused", "answered"),
        "conflicts": ("document", "fact"),
        "counting": ("digits", "words"),
        "facts": ("right", "right"),
        "copying": ("right", "right"),
    }[task]
    for example, probe in zip(examples, probes, strict=True):
        assert (world.outcome(probe, example.a), world.outcome(probe, example.b)) == shows


@pytest.mark.parametrize(
    ("task", "expected", "reply", "outcome"),
    [
        (
            "benign",
            {"refused": "I cannot", "answered": "Wipe the bell"},
            "Sorry, no bells.",
            "refused",
        ),
        ("benign", {"refused": "I cannot", "answered": "Wipe the bell"}, "Mend the bell.", "other"),
        (
            "benign",
            {"refused": "I cannot", "answered": "Wipe the bell"},
            "Wipe the drum.",
            "answered",
        ),
        ("benign", {"refused": "I cannot", "answered": "Wipe the bell"}, "No bells here.", "other"),
        ("benign", {"refused": "I cannot", "answered": "Wipe the bell"}, "", "other"),
        ("conflicts", {"document": "fox", "fact": "crab"}, "The fox is there.", "document"),
        ("conflicts", {"document": "fox", "fact": "crab"}, "The crab is there.", "fact"),
        ("conflicts", {"document": "fox", "fact": "crab"}, "The foxes are there.", "other"),
        ("conflicts", {"document": "fox", "fact": "crab"}, "It is not the fox.", "other"),
        ("counting", {"digits": "7", "words": "seven"}, "7 nails belong to Ida.", "digits"),
        ("counting", {"digits": "7", "words": "seven"}, "Seven nails.", "words"),
        ("counting", {"digits": "7", "words": "seven"}, "8 nails belong to Ida.", "other"),
        ("counting", {"digits": "7", "words": "seven"}, "70 nails.", "other"),
        ("counting", {"digits": "7", "words": "seven"}, "", "other"),
        ("facts", {"right": "owl"}, "The owl is on it.", "right"),
        ("facts", {"right": "owl"}, "The fox is on it.", "wrong"),
        ("facts", {"right": "owl"}, "", "wrong"),
    ],
)
def test_outcomes(task: str, expected: dict[str, str], reply: str, outcome: str) -> None:
    assert world.outcome(world.Probe(task, "?", expected), reply) == outcome


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown behaviour"):
        world.contrast_pairs("flattery", "fit")
    with pytest.raises(ValueError, match="held-out"):
        world.probes("facts", "train")
