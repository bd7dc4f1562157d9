"""Task cards: those that come with moesteer, the user's own, and what may be wrong with either."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moesteer.contrast import Message
from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import (
    SHIPPED,
    Card,
    all_cards,
    make_judges,
    read_card,
    read_items,
)
from moesteer.evaluation.templates import fill, placeholders
from moesteer.testbed.world import probes

CARD = """\
name = "towns"
title = "Towns"
about = "What stands where."
outcome = "right"
role = "target"
harmless = true
max_new_tokens = 8

[prompts]
source = "towns.jsonl"
template = "Where is {town}?"
system = "Answer in {language}."
needs = "the columns town, language and answer."

[[judges]]
kind = "contains"
column = "answer"
"""
LINE = {"town": "Elmford", "language": "English", "answer": ["north", "up there"], "id": 7}


@pytest.fixture
def card(in_tmp_path: Path) -> Card:
    Path("towns.toml").write_text(CARD)
    return read_card("towns.toml")


def write(*records: dict, name: str = "towns.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


# --- those that come with moesteer ----------------------------------------------------------------

NAMES = [card.name for card in all_cards()]


def test_the_cards_there_are():
    assert NAMES[:7] == [
        f"testbed-{name}"
        for name in "benign copying digits document facts fluency restricted".split()
    ]
    assert set(NAMES[7:]) == {
        *("advbench", "tdc2023", "maliciousinstruct", "strongreject"),
        *("faitheval-counterfactual", "faitheval-unanswerable", "faitheval-inconsistent"),
        *("cf-triviaqa", "mquake", "mctest", "harmless-100", "fluency", "xstest"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_card(name: str):
    card = read_card(name)
    assert card.name == name == Path(card.where).stem
    assert card.outcome in card.outcomes
    assert len(card.outcomes) >= 2
    assert card.max_new_tokens == (512 if card.testbed is None else 16)
    assert card.depends_on  # the judge is checked on something
    # A change that may not be told from its opposite checks nothing: outcomes differ by mode.
    assert any(change.to is not None for change in card.changes)


@pytest.mark.parametrize("name", ["advbench", "tdc2023", "maliciousinstruct", "strongreject"])
def test_safety_cards_hold_no_prompts(name: str):
    card = read_card(name)
    assert not card.harmless
    assert re.fullmatch(r"\{\w+\}", card.prompts.template)  # the user's prompt and nothing else
    assert card.prompts.system is None
    assert {path.suffix for path in SHIPPED.iterdir()} == {".toml"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("testbed-")])
@pytest.mark.parametrize("split", ["fit", "dev", "test"])
def test_testbed_prompts(name: str, split: str):
    card = read_card(name)
    assert card.testbed is not None
    items = read_items(card, split)
    assert [item.messages for item in items] == [
        (Message("user", probe.prompt),) for probe in probes(card.testbed, split)
    ]
    assert all(set(card.columns) <= set(item.columns) for item in items)


def test_all_splits_together():
    card = read_card("testbed-facts")
    parts = [item for split in ("fit", "dev", "test") for item in read_items(card, split)]
    assert read_items(card, "all") == parts


# --- the user's own -------------------------------------------------------------------------------


def test_a_card_of_the_users(card: Card):
    write(LINE)
    (item,) = read_items(card, "all")
    assert item.messages == (
        Message("system", "Answer in English."),
        Message("user", "Where is Elmford?"),
    )
    assert item.source == "towns.jsonl:1"
    assert item.columns["answer"] == "north\nup there"
    assert item.columns["id"] == "7"
    assert (card.outcomes, card.combine, card.behaviour) == (("right", "wrong"), "first", None)
    (judge,) = make_judges(card)
    assert [v.outcome for v in judge([item] * 2, ["Up there.", "no"])] == ["right", "wrong"]


def test_braces_in_the_data_stay(card: Card):
    write({**LINE, "town": "{answer} {{x}} {0}"})
    (item,) = read_items(card, "all")
    assert item.prompt == "Where is {answer} {{x}} {0}?"


def test_columns_of_other_names(in_tmp_path: Path):
    Path("towns.toml").write_text(CARD + '\n[prompts.columns]\ntown = "Name of it"\n')
    write({"Name of it": "Oakwick", "language": "English", "answer": "n", "town": "not this"})
    (item,) = read_items(read_card("towns.toml"), "all")
    assert item.prompt == "Where is Oakwick?"


def test_other_data_and_csv(card: Card):
    Path("mine.csv").write_text("id,town,language,answer\n3,Ash,German,south\n")
    (item,) = read_items(card, "all", "mine.csv")
    assert item.prompt == "Where is Ash?"
    assert item.columns["id"] == "3"


def test_choices_become_lettered_lines(in_tmp_path: Path):
    write(
        {
            "context": "c",
            "question": "q",
            "answerKey": "B",
            "choices": {"label": ["A", "B"], "text": ["sun", "moon"]},
        }
    )
    (item,) = read_items(read_card("faitheval-counterfactual"), "all", "towns.jsonl")
    assert "\nA) sun\nB) moon\n" in item.prompt


def test_a_data_set(card: Card, monkeypatch: pytest.MonkeyPatch):
    asked = []
    module = ModuleType("datasets")

    def load_dataset(name: str, split: str | None):
        asked.append((name, split))
        return [LINE]

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    (item,) = read_items(card, "all", "someone/towns:train")
    assert asked == [("someone/towns", "train")]
    assert item.source == "someone/towns:train:1"


def test_dev_and_test_split_the_users_prompts(card: Card):
    write(*({**LINE, "town": f"town {i}"} for i in range(400)))
    every, dev, test = (
        [item.prompt for item in read_items(card, split)] for split in ("all", "dev", "test")
    )
    assert sorted(dev + test) == sorted(every)
    assert not set(dev) & set(test)
    assert 70 < len(dev) < 130  # a quarter
    # Neither the order nor what else is there moves a prompt; a prompt twice is on one side.
    write(*({**LINE, "town": f"town {i}"} for i in reversed(range(300)) for _ in range(2)))
    assert {item.prompt for item in read_items(card, "dev")} == {
        prompt for prompt in dev if int(prompt.split()[-1][:-1]) < 300
    }


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("title =", "tittle =", ["towns.toml: ", "'title'", "'tittle'", "max_new_tokens"]),
        ('role = "target"', 'role = "goal"', ["role is 'goal'", "target", "price"]),
        ("max_new_tokens = 8", "max_new_tokens = 0", ["max_new_tokens", "greater"]),
        ("max_new_tokens = 8", 'max_new_tokens = "8"', ["max_new_tokens", "integer"]),
        ('outcome = "right"', 'outcome = "good"', ["'good'", "right, wrong"]),
        ("harmless = true", "harmless = maybe", ["towns.toml: not TOML", "line 6"]),
        ("source =", "sauce =", ["[prompts]", "'sauce'", "a record has source"]),
        ("{town}", "{town.x}", ["[prompts]", "template", "{town.x}"]),
        ("{town}", "{}", ["[prompts]", "template", "{}"]),
        ("{town}", "{town", ["[prompts]", "template"]),
        ("{language}", "{language!r}", ["[prompts]", "system", "{language}"]),
        ('kind = "contains"', 'kind = "oracle"', ["[[judges]] 1", "'oracle'", "guard"]),
        ('kind = "contains"', "", ["[[judges]] 1", "kind is None"]),
        ('kind = "contains"', 'kind = ["contains"]', ["[[judges]] 1", "kind is ['contains']"]),
        ("column =", 'outcome = "wrong"\ncolumn =', ["(contains)", "wrong, wrong", "of the same"]),
        ("column =", "colum =", ["[[judges]] 1 (contains)", "'colum'", "column"]),
        ("[[judges]]", "[[judge]]", ["'judges'", "'judge'"]),
        ("harmless", 'combine = "any"\nharmless', ["combine is 'any'", "majority"]),
        ("harmless", 'depends_on = ["empty"]\nharmless', ["depends_on", "'empty'", "it has none"]),
    ],
)
def test_cards_that_are_none(in_tmp_path: Path, old: str, new: str, words: list[str]):
    assert old in CARD
    Path("towns.toml").write_text(CARD.replace(old, new, 1))
    with pytest.raises(MoesteerError) as error:
        read_card("towns.toml")
    assert str(error.value).startswith("towns.toml: ")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('mode = "shout"', ["'shout'", "refusal-in-front", "empty"]),
        ('mode = "empty"\nto = "gone"', ["'gone'", "right, wrong"]),
        ('mode = "empty"\nof = ["gone"]', ["'gone'", "right, wrong"]),
        ('mode = "fact-swapped"\nto = "wrong"', ["fact-swapped needs column"]),
        ('mode = "empty"\ncolumn = "answer"', ["empty takes no column"]),
        ('mode = "empty"\ninto = "wrong"', ["'into'", "a record has mode"]),
    ],
)
def test_changes_that_are_none(in_tmp_path: Path, change: str, words: list[str]):
    Path("towns.toml").write_text(f"{CARD}\n[[changes]]\n{change}\n")
    with pytest.raises(MoesteerError, match=re.escape("towns.toml: [[changes]] 1: ")) as error:
        read_card("towns.toml")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["nope", "../cards", "", "testbed/restricted"])
def test_no_such_task(name: str):
    with pytest.raises(MoesteerError, match=r"there is no task .* testbed-restricted"):
        read_card(name)


def test_no_such_file(in_tmp_path: Path):
    with pytest.raises(MoesteerError, match=r"nope.toml: cannot be read"):
        read_card("nope.toml")


def test_missing_data_says_what_it_needs(card: Card):
    with pytest.raises(MoesteerError) as error:
        read_items(card, "test")
    for words in ("towns.jsonl: neither", "the columns town, language", "--data towns=FILE"):
        assert words in str(error.value)


@pytest.mark.parametrize("value", [None, "", {"a": 1}, [], [[1]]])
def test_missing_columns_say_what_there_is(card: Card, value: object):
    write(LINE, {**LINE, "answer": value})
    with pytest.raises(MoesteerError) as error:
        read_items(card, "all")
    for words in ("towns.jsonl:2: no text in the column 'answer'", "town, language", "--data"):
        assert words in str(error.value)


def test_an_empty_record_and_a_column_twice(card: Card):
    write({})
    with pytest.raises(MoesteerError, match=r"'town'; there are none\. The task"):
        read_items(card, "all")
    Path("twice.csv").write_text("town,town,language,answer\na,b,c,d\n")
    said = "twice.csv:1: column 'town' twice; a record may have town, language, answer"
    with pytest.raises(MoesteerError, match=said):
        read_items(card, "all", "twice.csv")


def test_splits_that_are_none(card: Card):
    write(LINE)
    with pytest.raises(MoesteerError, match="no split 'train'; there are fit, dev, test, all"):
        read_items(card, "train")
    with pytest.raises(MoesteerError, match="have the splits dev and test"):
        read_items(card, "fit")
    empty = "dev" if read_items(card, "test") else "test"
    with pytest.raises(MoesteerError, match=f"none of its 1 prompts belongs to the split {empty}"):
        read_items(card, empty)


def test_no_data_for_the_testbed():
    with pytest.raises(MoesteerError, match="built in"):
        read_items(read_card("testbed-facts"), "dev", "mine.jsonl")


def test_no_such_prompts_of_the_testbed(in_tmp_path: Path):
    Path("towns.toml").write_text(CARD.replace("towns.jsonl", "testbed:towns"))
    with pytest.raises(MoesteerError, match="no prompts 'towns'; it has restricted"):
        read_items(read_card("towns.toml"), "dev")


# --- templates ------------------------------------------------------------------------------------


def test_placeholders():
    assert placeholders("{a} {b}{a} {{c}}") == ("a", "b")
    assert fill("{a} {{c}} {a}", {"a": "{b}"}) == "{b} {c} {b}"
