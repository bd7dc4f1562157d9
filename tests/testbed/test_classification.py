"""The classification tasks: what is held out stays out, labels are balanced, words decide."""

import random
from collections import Counter
from itertools import islice

import pytest

from moesteer.rationale.instances import parse_instance
from moesteer.testbed import classification, world
from moesteer.testbed.classification import ASK, LABELS, STATES, TASKS, instances


def held_out(split: str, count: int = 300) -> set[str]:
    return {found.prompt for task in TASKS for found in islice(instances(task, split), count)}


def test_splits_are_disjoint_from_each_other_and_from_training() -> None:
    rng = random.Random("any seed")
    trained: set[str] = set()
    for _ in range(5_000):
        example = classification.training_example(rng)
        trained |= {example.prompt, *example.earlier}
    fit, dev, test = (held_out(split) for split in world.SPLITS)
    assert not fit & dev
    assert not fit & test
    assert not dev & test
    for prompts in (fit, dev, test):
        assert not any(prompt in said for prompt in prompts for said in trained)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", world.SPLITS)
def test_labels_take_turns_and_no_instance_comes_twice(task: str, split: str) -> None:
    found = list(islice(instances(task, split), 240))
    counts = Counter(one.label for one in found)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == set(LABELS[task])
    assert len({one.prompt for one in found}) == 240


@pytest.mark.parametrize("task", classification.SETS)
def test_records_are_what_the_library_reads(task: str) -> None:
    for number, record in enumerate(classification.records(task, "test", 50), start=1):
        read = parse_instance(record, f"{task}:{number}")
        assert read.texts == record["texts"]
        marked = [read.texts[span.text][span.start : span.end] for span in read.rationale]
        assert all(words == words.strip() != "" for words in marked)


def test_the_marked_words_decide() -> None:
    """By rules written anew from the marked words alone."""
    for found in islice(instances("claims", "test"), 100):
        (sentence,) = (found.texts[text][start:end] for text, start, end in found.rationale)
        part, state = sentence.split()[1], sentence.split()[-1]
        assert found.texts["claim"].startswith(f"The {part} ")
        assert state in STATES[found.label]
    for found in islice(instances("biographies", "test"), 100):
        words = set(found.words)
        said = {
            label: {word for clue in clues for word in clue.split() if word[0] == "["}
            for label, clues in classification.CLUES.items()
        }
        assert words <= {word.strip("[]") for word in said[found.label]}
    opposites = {frozenset(pair) for pairs in classification.OPPOSITES.values() for pair in pairs}
    for found in islice(instances("inference", "test"), 100):
        marked = [(text, found.texts[text][start:end]) for text, start, end in found.rationale]
        match found.label, marked:
            case "entailment", [("premise", said), ("hypothesis", concluded)]:
                assert said == concluded
            case "contradiction", [("premise", said), ("hypothesis", concluded)]:
                assert frozenset((said, concluded)) in opposites
            case "neutral", [("hypothesis", added)]:
                assert added not in found.texts["premise"]
            case _:
                raise AssertionError(found)


def test_every_way_of_asking_is_taught() -> None:
    rng = random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(2_000):
        example = classification.training_example(rng)
        labels = set(LABELS[example.task].values())
        if example.earlier:
            prompt, label = example.earlier
            assert label in labels
            assert all(word in prompt for word in example.a.split(", "))
            seen[example.prompt.split()[1]] += 1
        elif "Name the" in example.prompt:
            label, words = example.a.split(". Words: ")
            assert label in labels
            assert all(word in example.prompt for word in words.split(", "))
            seen["words" if "Name the words" in example.prompt else "count"] += 1
        else:
            assert example.a in labels
            seen["label"] += 1
    assert seen["label"] / 2_000 == pytest.approx(1 - classification.ASKED, abs=0.05)
    assert {"label", "words", "count"} <= set(seen)
    assert len(ASK) == 4


def test_a_count_is_the_number_of_the_words() -> None:
    rng = random.Random(1)
    for _ in range(500):
        example = classification.training_example(rng)
        numbers = [word for word in example.prompt.split()[-5:] if word.isdigit()]
        if numbers and "words tell" in example.prompt:
            assert int(numbers[-1]) == len(example.a.split(": ")[-1].split(", "))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no instances of 'riddles'"):
        next(instances("riddles", "test"))
