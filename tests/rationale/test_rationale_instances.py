"""Instances: what is read, what is refused, and where."""

import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesteer.errors import MoesteerError
from moesteer.rationale.instances import (
    TextSpan,
    filled,
    instances_hash,
    parse_instance,
    read_instances,
)
from moesteer.testbed import world
from moesteer.testbed.classification import SETS, TASKS
from moesteer.testbed.data import export_data

RECORD: dict[str, Any] = {
    "texts": {"premise": "A dog runs.", "claim": "It {moves}."},
    "label": "right",
    "labels": {"right": "yes", "wrong": "no"},
    "rationale": [{"text": "premise", "start": 6, "end": 10}],
    "prompt": "Claim: {claim} {{so}} Premise: {premise}",
}


def changed(**change: object) -> dict[str, Any]:
    return deepcopy(RECORD) | change


def test_a_record_is_read_as_it_stands(tmp_path: Path):
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(RECORD) + "\n" + json.dumps(changed(label="wrong")) + "\n")
    first, second = read_instances(str(file))
    assert (first.source, second.source) == (f"{file}:1", f"{file}:2")
    assert first.texts == RECORD["texts"]
    assert first.rationale == (TextSpan("premise", 6, 10),)
    assert (first.label, second.label) == ("right", "wrong")
    assert first.ask == {}


def test_the_prompt_is_filled_and_its_texts_are_found():
    said, places = filled(parse_instance(RECORD, "here"))
    assert said == "Claim: It {moves}. {so} Premise: A dog runs."
    assert list(places) == ["claim", "premise"]
    assert all(said[at:].startswith(RECORD["texts"][name]) for name, at in places.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "maybe"}, "'maybe' is none of the labels right, wrong"),
        ({"labels": {"right": "yes"}}, "labels"),
        ({"labels": {"right": "yes", "wrong": " yes"}}, "the same or begin alike"),
        ({"labels": {"right": "yes", "wrong": "yes, but"}}, "the same or begin alike"),
        ({"labels": {"right": "yes", "wrong": " "}}, "no visible character"),
        ({"texts": {}}, "texts"),
        ({"texts": {"premise": "A dog runs."}}, "'{claim}'"),
        ({"prompt": "{claim} {premise} {claim}"}, "'claim' 2 times"),
        ({"prompt": "{claim}"}, "'premise' 0 times"),
        ({"prompt": "{claim} {premise} {"}, "a brace too many or too few"),
        ({"prompt": "{claim!r} {premise}"}, "'claim' must stand alone"),
        ({"prompt": "{claim:>9} {premise}"}, "'claim' must stand alone"),
        ({"prompt": "{claim} {premise} {}"}, "'{}'"),
        ({"rationale": []}, "rationale"),
        ({"rationale": [{"text": "claim", "start": 3, "end": 12}]}, "up to 12 .* which has 11"),
        ({"rationale": [{"text": "claim", "start": -1, "end": 2}]}, "characters -1 up to 2"),
        ({"rationale": [{"text": "claim", "start": 2, "end": 2}]}, "characters 2 up to 2"),
        ({"rationale": [{"text": "premise", "start": 1, "end": 2}]}, "nothing there is visible"),
        ({"rationale": [{"text": "story", "start": 1, "end": 2}]}, "'story', but the texts are"),
        ({"ask": {"how": "Which?"}}, "ask.how"),
        ({"ask": {"with_label": "Which?"}}, r"ask.with_label must have \{prompt\}"),
        ({"ask": {"afterwards": "Which of {count}?"}}, "ask.afterwards must have no names"),
        ({"ask": {"afterwards_top_var": "{count} of {count}?"}}, r"must have \{count\}"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_line(
    change: dict[str, object], said: str, tmp_path: Path
):
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(RECORD) + "\n\n" + json.dumps(changed(**change)) + "\n")
    with pytest.raises(MoesteerError, match=f"set.jsonl:3: .*{said}"):
        read_instances(str(file))


def test_label_words_may_begin_alike_within_a_word():
    labels = {"right": "no", "wrong": "none"}
    assert parse_instance(changed(labels=labels), "here").labels == labels


def test_the_hash_is_of_what_is_said():
    one = parse_instance(RECORD, "here")
    assert instances_hash([one]) == instances_hash([replace(one, source="there")])
    others = [
        replace(one, label="wrong"),
        replace(one, texts={**one.texts, "claim": "It is."}),
        replace(one, rationale=(TextSpan("premise", 2, 5),)),
        replace(one, prompt=one.prompt + "?"),
        replace(one, ask={"afterwards": "Which?"}),
    ]
    assert len({instances_hash([other]) for other in [one, *others]}) == 6
    assert instances_hash([one, others[0]]) != instances_hash([others[0], one])


# -- the testbed's -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", SETS)
@pytest.mark.parametrize("split", world.SPLITS)
def test_built_in_sets_are_read_and_balanced(task: str, split: str):
    instances = read_instances(f"testbed:{task}:{split}")
    assert instances[0].source == f"testbed:{task}:{split}:1"
    counts = Counter(instance.label for instance in instances)
    assert set(counts) == set(instances[0].labels)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({filled(instance)[0] for instance in instances}) == len(instances)


def test_without_a_split_it_is_the_test_split():
    assert instances_hash(read_instances("testbed:claims")) == instances_hash(
        read_instances("testbed:claims:test")
    )


@pytest.mark.parametrize("name", ["testbed:claim", "testbed:claims:train", "testbed:"])
def test_an_unknown_built_in_set_is_refused_with_those_there_are(name: str):
    with pytest.raises(MoesteerError, match=r"biographies, claims, inference, documents and fit"):
        read_instances(name)


@pytest.mark.parametrize("split", world.SPLITS)
def test_documents_are_the_prompts_of_the_behaviour(split: str):
    instances = read_instances(f"testbed:documents:{split}")
    conflicts = world.held_out("conflicts", split, len(instances))
    for instance, conflict in zip(instances, conflicts, strict=True):
        assert filled(instance)[0] == conflict.prompt
        assert conflict.a.startswith(instance.labels[instance.label] + " ")
        (other,) = (words for label, words in instance.labels.items() if label != instance.label)
        assert conflict.b.startswith(other + " ")
        (span,) = instance.rationale
        marked = instance.texts[span.text][span.start : span.end]
        assert instance.labels[instance.label] == f"The {marked}"
        assert instance.texts["document"].endswith(f" {marked}.")


def test_the_habit_does_not_tell_which_label_is_right():
    instances = read_instances("testbed:documents:dev")
    followed = [
        instance.label for instance in instances if instance.source.endswith(tuple("13579"))
    ]
    assert 0.35 < followed.count("first") / len(followed) < 0.65


def test_exported_instances_read_back(tmp_path: Path):
    files = {path.name for path in export_data(str(tmp_path))}
    for task in (*TASKS, "documents"):
        assert f"tasks-{task}-dev.jsonl" in files
        assert instances_hash(
            read_instances(str(tmp_path / f"tasks-{task}-dev.jsonl"))
        ) == instances_hash(read_instances(f"testbed:{task}:dev"))
