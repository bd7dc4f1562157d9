"""Asking for words and finding them: what is asked, and where each named word is found."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_laid import made_laid, words_of

from moesteer.engines.base import Generation
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError
from moesteer.rationale.labels import Decision
from moesteer.rationale.layout import Unit
from moesteer.rationale.prompting import (
    PROMPTED,
    WAYS,
    ask_rationales,
    parse_named,
    question,
    words_marked,
)
from moesteer.rationale.reading import Named
from moesteer.testbed.classification import ASK

DENTIST = made_laid(
    {"biography": "Ann drills bad teeth. On Sundays Ann plays the drums and the harp, in winter."},
    marked=("drills", "teeth"),
)
GATE = made_laid(
    {"premise": "The wall is red. The gate is red.", "hypothesis": "The gate is blue."},
    marked=("blue",),
)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("drills, teeth", "drills teeth"),
        ("teeth, drills", "drills teeth"),  # in reading order
        ("TEETH and Drills.", "drills teeth"),
        ("“drills”, **bad**, _teeth_", "drills bad teeth"),
        ('["drills", "teeth"]', "drills teeth"),
        ("1. drills\n2. teeth", "drills teeth"),
        ("(1) drills, (2) teeth", "drills teeth"),
        ("1. drills, 2. teeth", "drills teeth"),
        ("- drills\n• teeth", "drills teeth"),
        ("bad teeth in winter", "bad teeth in winter"),
        ("Words: drills, teeth", "drills teeth"),
        ("Sure! The words that decide it are:\ndrills\nteeth", "drills teeth"),
        ("Here: drills, teeth", "drills teeth"),
        ("Well, here they are: drills, teeth", "drills teeth"),
        ("drills, teeth\nExplanation: Ann is the one who plays.", "drills teeth"),
        ("- drills: Ann does so\n- teeth: bad ones", "drills teeth"),
        ("drills; teeth", "drills teeth"),
        ("the drums and the harp", "the drums and the harp"),
        ("drills and teeth or harp", "drills teeth harp"),
        ("and", "and"),
        ("Biography: drills, teeth", "drills teeth"),
    ],
)
def test_a_list_is_read_however_it_is_written(reply: str, words: str) -> None:
    units, named = parse_named(reply, DENTIST, None)
    assert words_of(DENTIST, units) == words.split()
    assert (named.reply, named.words) == (reply, len(words.split()))
    assert (named.absent, named.inflected, named.surplus) == ((), 0, 0)


@pytest.mark.parametrize(
    ("reply", "words", "label"),
    [
        ("yes. Words: drills, teeth", "drills teeth", "right"),
        ("Label: yes\nWords: drills, teeth", "drills teeth", "right"),
        ("Yes, drills, teeth", "drills teeth", "right"),
        ("Answer: no\ndrills\nteeth", "drills teeth", "wrong"),
        ("**No**. Words: drills", "drills", "wrong"),
        ("Yes or no: no. Words: drills", "drills", "wrong"),
        ("Norway. Words: drills", "drills", None),
        ("yes", "", "right"),
        ("drills, teeth", "drills teeth", None),
        ("Words: drills, teeth", "drills teeth", None),
        ("", "", None),
    ],
)
def test_the_label_that_was_asked_for_is_no_named_word(
    reply: str, words: str, label: str | None
) -> None:
    units, named = parse_named(reply, DENTIST, None, labelled=True)
    assert words_of(DENTIST, units) == words.split()
    assert (named.words, named.absent, named.label) == (len(words.split()), (), label)
    assert parse_named(reply, DENTIST, None)[1].label is None


def test_the_longest_label_opens_a_reply_and_none_of_the_list_does() -> None:
    labels = {"s": "nurse", "l": "nurse aide", "y": " yes"}
    nurse = made_laid({"text": "A nurse said yes."}, labels=labels)
    for reply, label in (
        ("Nurse aide. Words: A", "l"),
        ("nurse, aide", "s"),
        ("YES", "y"),
        ("Words: nurse, yes", None),
        ("The words: yes", None),
    ):
        assert parse_named(reply, nurse, None, labelled=True)[1].label == label


def test_only_the_label_at_the_beginning_is_left_out() -> None:
    nurse = made_laid({"biography": "A nurse said yes to the nurse."}, labels={"n": "nurse"})
    assert words_of(nurse, parse_named("nurse. Nurse, yes", nurse, None, labelled=True)[0]) == [
        "nurse",
        "yes",
    ]
    # Asked for words alone, the model names the label's as it names others.
    units, _ = parse_named("nurse, nurse", nurse, None)
    assert units == (1, 6)
    # A word that only begins like the label is none.
    norway = made_laid({"text": "They live in Norway."}, labels={"a": "yes", "b": "no"})
    assert parse_named("Norway", norway, None, labelled=True)[0] == (3,)


@pytest.mark.parametrize(
    ("reply", "units"),
    [
        ("red", (3,)),
        ("red, red", (3, 7)),
        ("gate, blue", (5, 11)),
        ("the gate is blue", (8, 9, 10, 11)),  # together, they stand in the hypothesis
        ("The gate", (4, 5)),  # not the first "The"
        ("the, gate", (0, 5)),
        ("Hypothesis: gate", (9,)),
        ("Premise: red; Hypothesis: the gate", (3, 8, 9)),
        ("premise: red\nhypothesis:\nis", (3, 10)),
    ],
)
def test_which_of_equal_words_is_meant(reply: str, units: tuple[int, ...]) -> None:
    found, named = parse_named(reply, GATE, None)
    assert found == units
    assert (named.words, named.absent) == (len(units), ())


def test_what_stands_before_a_colon_is_not_lost() -> None:
    units, named = parse_named("drills, teeth. Label: yes", DENTIST, None)
    assert words_of(DENTIST, units) == ["drills", "teeth"]
    assert named.absent == ("Label", "yes")
    clock = made_laid({"text": "At 3:30 it rang."})
    assert parse_named("at 3:30", clock, None)[0] == (0, 1)


def test_words_that_are_not_there_are_counted() -> None:
    units, named = parse_named("drills, molars, teeth, teeth", DENTIST, None)
    assert words_of(DENTIST, units) == ["drills", "teeth"]
    assert (named.words, named.absent) == (4, ("molars", "teeth"))


@pytest.mark.parametrize(
    ("said", "stands"),
    [
        *(("drilling", "drills"), ("drilled", "drills"), ("drill", "drills"), ("drills", "drill")),
        *(("cut", "cutting"), ("washes", "washed"), ("makes", "making"), ("nurses", "nurse")),
        *(("cries", "cry"), ("cry", "cried"), ("boxes", "box"), ("classes", "class")),
        *(("Ann’s", "Ann"), ("strings", "string"), ("operates", "operating")),
    ],
)
def test_inflected_words_are_found_and_counted(said: str, stands: str) -> None:
    laid = made_laid({"text": f"Some {stands} here."})
    units, named = parse_named(said, laid, None)
    assert (units, named.inflected, named.absent) == ((1,), 1, ())


@pytest.mark.parametrize(
    ("said", "stands"),
    [
        *(("corner", "corn"), ("thin", "thing"), ("is", "i"), ("his", "hi"), ("string", "stred")),
        *(("bring", "bred"), ("bus", "bu"), ("class", "clad")),
    ],
)
def test_other_words_are_not(said: str, stands: str) -> None:
    laid = made_laid({"text": f"Some {stands} here."})
    assert parse_named(said, laid, None) == ((), Named(said, 1, absent=(said,)))


def test_a_word_as_it_stands_comes_before_an_inflected_one() -> None:
    laid = made_laid({"text": "One drill."})
    units, named = parse_named("drills, drill", laid, None)
    assert (units, named.absent, named.inflected) == ((1,), ("drills",), 0)


def test_those_beyond_the_number_asked_for_are_kept_and_counted() -> None:
    units, named = parse_named("drills, bad, molars, teeth", DENTIST, 2)
    assert words_of(DENTIST, units) == ["drills", "bad", "teeth"]
    assert (named.words, named.surplus) == (4, 2)
    assert parse_named("teeth", DENTIST, 2)[1].surplus == 0


@pytest.mark.parametrize("reply", ["", "  \n", "…", "Words:", "yes. Words: –"])
def test_an_empty_rationale(reply: str) -> None:
    found = parse_named(reply, made_laid({"text": "Some words."}), 3, labelled=True)
    assert found == ((), Named(reply, 0, label="right" if "yes" in reply else None))


def test_tokens_as_units_are_found_by_their_word() -> None:
    text = "He unlocked doors."
    units = tuple(
        Unit("text", start, end, (number,), start in (3, 5))
        for number, (start, end) in enumerate([(0, 2), (3, 5), (5, 11), (12, 17)])
    )
    laid = replace(made_laid({"text": text}), units=units)
    assert parse_named("unlocked", laid, None)[0] == (1, 2)
    assert words_marked(laid) == 1


_BAG = st.lists(st.sampled_from("ant bee cow dog elk fox".split()), max_size=12)


@given(_BAG, _BAG)
def test_as_many_are_found_as_both_have(text: list[str], named_words: list[str]) -> None:
    """Of each word the smaller of the two counts, at its first places."""
    laid = made_laid({"text": " ".join(["so", *text])})
    units, named = parse_named(", ".join(named_words), laid, 3)
    both = Counter(text) & Counter(named_words)
    expected = [
        place
        for place, word in enumerate(text, start=1)
        if text[: place - 1].count(word) < both[word]
    ]
    assert list(units) == expected
    assert Counter(named.absent) == Counter(named_words) - both
    assert named.words == len(named_words)
    assert named.surplus == max(0, len(named_words) - 3)


@given(st.text(alphabet="drills teeth.,:;\n-1)and“Words”’s", max_size=60), st.booleans())
def test_nothing_is_lost_on_the_way(reply: str, labelled: bool) -> None:
    """Every word is found at a place of its own or absent."""
    units, named = parse_named(reply, DENTIST, None, labelled=labelled)
    assert named.words == len(units) + len(named.absent)
    assert list(units) == sorted(set(units))


# -- asking --------------------------------------------------------------------------------------


def test_what_is_asked_in_each_way() -> None:
    laid = made_laid({"text": "Ann {count} drills."}, marked=("Ann", "drills"), ask=ASK)
    prompt = "Ann {count} drills. So?"

    def said(way: str) -> list[tuple[str, str]]:
        return [(turn.role, turn.content) for turn in question(laid, "wrong", way)]

    assert said("unbound") == [("user", f"{prompt} Name the words that tell.")]
    assert said("top-var") == [("user", f"{prompt} Name the 2 words that tell.")]
    before = [("user", prompt), ("assistant", "no")]
    assert said("unbound-two-turn") == [*before, ("user", "Which words tell?")]
    assert said("top-var-two-turn") == [*before, ("user", "Which 2 words tell?")]


@pytest.mark.parametrize("way", PROMPTED)
def test_without_words_of_its_own_an_instance_is_asked_in_english(way: str) -> None:
    *_, asked = question(DENTIST, "right", way)
    assert ("Ann drills" in asked.content) == (not way.endswith("two-turn"))
    assert ("the 2 words" in asked.content.replace("Which", "the")) == way.startswith("top-var")
    assert "{" not in asked.content


def _engine(folder: Path, replies: list[str]) -> Any:
    """The tokenizer of a model, and replies that were written before."""
    asked: list[str] = []

    def generate(prompts: list[str], profile: object, **_: object) -> Generation:
        asked.extend(prompts)
        return Generation(replies, [])

    tokenizer = load_transformers(str(folder)).tokenizer
    return SimpleNamespace(tokenizer=tokenizer, max_tokens=10_000, generate=generate, asked=asked)


def test_each_way_of_each_instance_gets_its_reply(model_folder: Path) -> None:
    engine = _engine(model_folder, ["yes. Words: bad", "teeth, drills", "blue", "gate, wall"])
    decisions = [Decision("right", "wrong", {}), Decision("wrong", "right", {})]
    ways = ["unbound", "top-var-two-turn"]
    first, second = ask_rationales(engine, [DENTIST, GATE], decisions, ways)
    assert words_of(DENTIST, first["unbound"][0]) == ["bad"]
    assert words_of(DENTIST, first["top-var-two-turn"][0]) == ["drills", "teeth"]
    assert words_of(GATE, second["unbound"][0]) == ["blue"]
    assert second["top-var-two-turn"][1].surplus == 1
    assert (first["unbound"][1].label, second["unbound"][1].label) == ("right", None)
    assert first["top-var-two-turn"][1].label is None
    assert engine.asked[3].endswith("and nothing else.<|end|><|assistant|>")
    assert "So?<|end|><|assistant|>no<|end|><|user|>Which 1 words" in engine.asked[3]


def test_a_base_model_is_asked_without_a_template(model_folder: Path) -> None:
    engine = _engine(model_folder, ["drills", "teeth"])
    ask_rationales(
        engine,
        [replace(DENTIST, instance=replace(DENTIST.instance, ask=ASK))],
        [Decision("wrong", "right", {})],
        ["unbound", "unbound-two-turn"],
        plain=True,
    )
    prompt = DENTIST.instance.texts["biography"] + " So?"
    assert engine.asked == [
        f"{prompt} Name the words that tell.",
        f"{prompt} no\nWhich words tell?\n",
    ]


def test_a_model_is_asked(model_folder: Path) -> None:
    engine, counted = load_transformers(str(model_folder)), []
    laid = made_laid({"text": "Tell me."}, ask=ASK)
    (found,) = ask_rationales(
        engine,
        [laid],
        [Decision("right", "wrong", {})],
        PROMPTED,
        max_new_tokens=4,
        progress=counted.append,
    )
    assert list(found) == list(WAYS)
    assert sum(counted) == len(WAYS)
    for _, named in found.values():
        length = len(engine.tokenizer(named.reply, add_special_tokens=False)["input_ids"])
        assert named.cut == (length >= 4)
    assert ask_rationales(engine, [laid], [Decision("right", "wrong", {})], []) == [{}]


def test_a_reply_as_long_as_allowed_is_cut(model_folder: Path) -> None:
    reply = "yes. Words: drills, bad, teeth"
    engine = _engine(model_folder, [reply])
    length = len(engine.tokenizer(reply, add_special_tokens=False)["input_ids"])
    decision = Decision("right", "wrong", {})
    for allowed, cut in ((length - 1, True), (length, True), (length + 1, False)):
        (found,) = ask_rationales(
            engine, [DENTIST], [decision], ["unbound"], max_new_tokens=allowed
        )
        units, named = found["unbound"]
        assert (words_of(DENTIST, units), named.cut) == (["drills", "bad", "teeth"], cut)


def test_errors_say_where_and_what(model_folder: Path) -> None:
    engine = _engine(model_folder, [])
    decision = Decision("right", "wrong", {})
    with pytest.raises(MoesteerError, match="no way of asking 'loudly'; choose from unbound, "):
        ask_rationales(engine, [GATE], [decision], ["loudly"])
    engine.max_tokens = 40
    with pytest.raises(
        MoesteerError, match=r"made:1: .* \d+ tokens and the reply up to 128.* of 40"
    ):
        ask_rationales(engine, [GATE], [decision], ["unbound"])
