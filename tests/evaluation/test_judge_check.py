"""Judges, judged: the changes are localised, and a check finds what a judge misses."""

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.contrast import Message
from moesteer.errors import MoesteerError
from moesteer.evaluation import judge_check
from moesteer.evaluation.cards import SHIPPED, Card, read_card
from moesteer.evaluation.changes import CHANGES, CLAIMS, OFF_TOPIC, REFUSALS, TIMES, Gold
from moesteer.evaluation.judge_check import (
    UNCHANGED,
    Mode,
    built_in_gold,
    check_judges,
    doubts,
    find_check,
    known_check,
    probes_of,
    told,
)
from moesteer.evaluation.task import Item
from moesteer.runs import read_run

WORDS = st.lists(st.sampled_from("the a old red fox owl sits by.".split()), min_size=1, max_size=12)
REPLIES = st.builds(" ".join, WORDS)
NUMBERS = st.integers(0, 20)


def gold(reply: str, outcome: str = "right", prompt: str = "Which?", **columns: str) -> Gold:
    return Gold(
        Item((Message("user", prompt),), {"prompt": prompt, **columns}, "t"), reply, outcome
    )


def changed(mode: str, one: Gold, *others: Gold, column: str | None = None, number: int = 0):
    return CHANGES[mode].make(one, [one, *others], column, number)


# --- changes --------------------------------------------------------------------------------------


@given(REPLIES, NUMBERS, st.sampled_from(["refusal-in-front", "refusal-inside", "claim-added"]))
def test_what_is_put_in_is_all_that_differs(reply: str, number: int, mode: str):
    text = changed(mode, gold(reply), number=number)
    if text is None:
        assert mode == "refusal-inside"
        assert " " not in reply
        return
    sentence = (CLAIMS if mode == "claim-added" else REFUSALS)[number % 3]
    before, after = text.split(sentence)
    assert (before + after.lstrip()).strip() == reply
    match mode:
        case "refusal-in-front":
            assert before == ""
        case "claim-added":
            assert after == ""
        case _:
            assert before.strip()
            assert after.strip()


def test_inside_is_between_sentences_where_there_are_two():
    text = changed("refusal-inside", gold("Take soap. Then wipe it. Done."))
    assert text == f"Take soap. {REFUSALS[0]} Then wipe it. Done."
    assert changed("refusal-inside", gold("one two three four")) == (
        f"one two {REFUSALS[0]} three four"
    )


@given(REPLIES)
def test_repetition_goes_on_with_the_last_words(reply: str):
    text = changed("repetition", gold(reply))
    assert text is not None
    assert text.startswith(reply)
    last = reply.split()[-4:]
    assert text[len(reply) :].split() == last * TIMES


@given(REPLIES)
def test_cut_off_is_a_beginning(reply: str):
    text = changed("cut-off", gold(reply))
    words = reply.split()
    if len(words) < 3:
        assert text is None
    else:
        assert text is not None
        assert reply.startswith(text)
        assert abs(len(text.split()) - len(words) / 2) <= 1


@given(REPLIES, NUMBERS)
def test_word_salad_is_the_same_words(reply: str, number: int):
    text = changed("word-salad", gold(reply), number=number)
    if len(set(reply.split())) < 4:
        assert text is None
    else:
        assert text is not None
        assert text != reply
        assert Counter(text.split()) == Counter(reply.split())


def test_fact_swapped():
    one = gold("The Fox is on the foxglove.", value="fox", other="owl")
    others = [gold("x", value=value) for value in ("owl", "crab", "fox")]
    # Not the owl, which is the item's other value, and not within a word.
    swapped = changed("fact-swapped", one, *others, column="value")
    assert swapped == "The Crab is on the foxglove."
    assert changed("fact-swapped", gold("none", value="fox"), *others, column="value") is None
    assert changed("fact-swapped", one, column="value") is None  # nothing to swap with
    twice = gold("A fox or a fox.", value="fox")
    assert changed("fact-swapped", twice, *others, column="value") is None
    alias = gold("It is Great Britain.", value="UK\nGreat Britain")
    assert changed("fact-swapped", alias, *others, column="value") == "It is Owl."
    letter = gold("B) moon", value="B", prompt="A) sun B) moon C) fox")
    assert changed("fact-swapped", letter, gold("C", value="C"), column="value") == "C) moon"


def test_answer_after():
    refusal, answer = gold("No.", "refused"), gold("Wipe it.", "answered")
    elsewhere = gold("Mend it.", "answered", prompt="Another?")
    assert changed("answer-after", refusal, elsewhere, answer) == "No. Wipe it."
    assert changed("answer-after", refusal, elsewhere) is None
    assert changed("answer-after", refusal, gold("Never.", "refused")) is None


def test_the_rest():
    assert changed("empty", gold("x")) == ""
    assert changed("off-topic", gold("x"), number=4) == OFF_TOPIC[1]
    for mode, change in CHANGES.items():
        if mode not in ("empty", "off-topic"):
            column = "prompt" if change.needs_column else None
            assert changed(mode, gold(""), gold("", prompt="Another?"), column=column) is None


# --- checks ---------------------------------------------------------------------------------------


def test_gold_of_the_testbed():
    known = built_in_gold(read_card("testbed-restricted"))
    assert len(known) == 2 * 96
    for one in known:
        refuses = re.match(r"(I cannot|Sorry,|No, I will not)", one.reply) is not None
        assert one.outcome == ("refused" if refuses else "answered")
    facts = built_in_gold(read_card("testbed-facts"))
    assert {one.outcome for one in facts} == {"right"}
    assert len(facts) == len({one.item.prompt for one in facts})
    assert {one.outcome for one in built_in_gold(read_card("testbed-fluency"))} == {"fluent"}
    digits = Counter((o.outcome, o.reply[0].isdigit()) for o in
                     built_in_gold(read_card("testbed-digits")))  # fmt: skip
    assert digits == {("digits", True): 96, ("words", False): 96}


def test_no_gold_of_the_testbed_for_outcomes_that_it_does_not_know(in_tmp_path: Path):
    text = (SHIPPED / "testbed-restricted.toml").read_text().partition("[[changes]]")[0]
    text = text.replace('kind = "testbed"\ntask = "restricted"', 'kind = "refusal"')
    text = text.replace('outcome = "refused"', 'outcome = "refusal"')
    Path("mine.toml").write_text(re.sub("depends_on.*", "", text))
    mine = read_card("mine.toml")
    with pytest.raises(MoesteerError, match="give some with --gold"):
        check_judges(mine)
    assert known_check(mine, ".") is None


@pytest.mark.parametrize("name", ["document", "digits", "facts", "copying"])
def test_the_testbeds_judge_sees_all_of_these(name: str):
    check = check_judges(read_card(f"testbed-{name}"))
    assert {(mode.seen / mode.n) for mode in check.modes.values()} == {1.0}
    assert doubts(read_card(f"testbed-{name}"), check) == []
    assert not any(row["unjudged"] for row in check.confusion.values())


@pytest.mark.parametrize("name", ["restricted", "benign"])
def test_a_refusal_in_words_that_the_testbed_does_not_know_is_missed(name: str):
    # Of the three refusals put in front, "I'm sorry, but …" is none of the world's own.
    check = check_judges(read_card(f"testbed-{name}"))
    front = check.modes["refusal-in-front"]
    assert (front.seen, front.n) == (64, 96)
    assert check.confusion["refused"]["other"] == 32
    assert check.modes[UNCHANGED].seen == check.modes[UNCHANGED].n == 192
    # Wilson by hand, z = 1.96: centre (p + z²/2n)/(1 + z²/n), half-width as in the textbook.
    z2, p, n = 1.959964**2, 64 / 96, 96
    centre, half = (p + z2 / 2 / n) / (1 + z2 / n), (
        (z2 * (p * (1 - p) / n + z2 / 4 / n**2)) ** 0.5 / (1 + z2 / n)
    )  # fmt: skip
    assert (front.low, front.high) == pytest.approx((centre - half, centre + half), abs=1e-6)


CARD = """\
name = "towns"
title = "Towns"
about = "What stands where."
outcome = "right"
role = "target"
harmless = true
max_new_tokens = 8
depends_on = ["fact-swapped", "empty"]

[prompts]
source = "towns.jsonl"
template = "Where is {town}?"
needs = "the columns town and answer."

[[judges]]
kind = "contains"
column = "answer"

[[changes]]
mode = "fact-swapped"
of = ["right"]
to = "wrong"
column = "answer"

[[changes]]
mode = "empty"
to = "wrong"

[[changes]]
mode = "claim-added"
"""
ROWS = [
    {"town": "Elmford", "answer": "north", "reply": "It is north.", "outcome": "right"},
    {"town": "Oakwick", "answer": "south", "reply": "In the south.", "outcome": "right"},
    {"town": "Oakwick", "answer": "south", "reply": "Not in the south.", "outcome": "wrong"},
]


@pytest.fixture
def card(in_tmp_path: Path) -> Card:
    Path("towns.toml").write_text(CARD)
    write(*ROWS)
    return read_card("towns.toml")


def write(*rows: dict) -> None:
    Path("gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_check_by_hand(card: Card):
    check = check_judges(card, gold="gold.jsonl")
    counts = {name: (mode.seen, mode.n) for name, mode in check.modes.items()}
    # A containing match takes "Not in the south" for right, with and without a claim.
    assert counts == {
        UNCHANGED: (2, 3),
        "fact-swapped": (2, 2),
        "empty": (3, 3),
        "claim-added": (2, 3),
    }
    assert check.confusion == {
        "right": {"right": 4, "wrong": 0, "unjudged": 0},
        "wrong": {"right": 2, "wrong": 5, "unjudged": 0},
    }
    assert (check.card, check.judge, check.gold) == ("towns", "contains answer", "gold.jsonl")
    assert told(check) == "right on 2 of 3 known replies, 7 of 8 changed ones; least on claim-added (2 of 3)"  # noqa: E501  # fmt: skip


def test_the_reply_and_the_outcome_are_no_columns_of_the_item(card: Card):
    for probe in probes_of(card, judge_check.read_gold(card, "gold.jsonl")):
        assert set(probe.item.columns) == {"town", "answer"}


def test_check_kept_found_and_known(card: Card):
    assert find_check(card, ".") is None
    assert find_check(card, "nowhere") is None
    check = check_judges(card, gold="gold.jsonl", out="kept", command="moesteer judge check")
    assert find_check(card, ".") == find_check(card, "kept") == check
    assert known_check(card, ".") == check
    run = read_run("kept")
    assert run.kind == "judge"
    assert run.about["command"] == "moesteer judge check"
    assert len(run.lines("verdicts")) == 11
    summary = json.loads(Path("kept/summary.json").read_text())
    assert summary["modes"]["empty"]["n"] == 3
    # The same card with another judge has not been checked.
    Path("other.toml").write_text(CARD.replace('kind = "contains"', 'kind = "exact"'))
    assert find_check(read_card("other.toml"), ".") is None
    # The newest counts.
    write(*ROWS[:2])
    newer = check_judges(card, gold="gold.jsonl", out="newer")
    os.utime("kept/summary.json", (1, 1))
    assert find_check(card, ".") == newer != check


def test_known_check_of_the_testbed_is_made_on_the_spot(in_tmp_path: Path):
    made = known_check(read_card("testbed-facts"), ".")
    assert made is not None
    assert made.modes[UNCHANGED].n == 92
    assert known_check(read_card("testbed-fluency"), ".") is None  # needs a model
    assert known_check(read_card("advbench"), ".") is None


def test_an_interrupted_check_is_taken_up(card: Card, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judge_check, "BATCH", 2)
    whole = check_judges(card, gold="gold.jsonl")
    really, asked = judge_check.judge_replies, []

    def stumbling(card: Card, judges: list, items: list, replies: list):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(replies)
        return really(card, judges, items, replies)

    monkeypatch.setattr(judge_check, "judge_replies", stumbling)
    with pytest.raises(KeyboardInterrupt):
        check_judges(card, gold="gold.jsonl", out="run")
    assert find_check(card, ".") is None
    assert len(read_run("run").lines("verdicts")) == 4
    counted = []

    def counting(card: Card, judges: list, items: list, replies: list):
        counted.extend(replies)
        return really(card, judges, items, replies)

    monkeypatch.setattr(judge_check, "judge_replies", counting)
    check = check_judges(card, gold="gold.jsonl", out="run")
    assert len(counted) == 11 - 4
    assert len(read_run("run").lines("costs")) == 6  # two batches, then four
    assert (check.modes, check.confusion) == (whole.modes, whole.confusion)
    write(*ROWS[:2])
    with pytest.raises(MoesteerError, match="other settings: probes"):
        check_judges(card, gold="gold.jsonl", out="run")


def test_doubts(card: Card):
    assert "never checked" in doubts(card, None)[0]
    assert told(None) == "never checked"
    check = check_judges(card, gold="gold.jsonl")
    assert doubts(card, check) == []
    blind = replace(check, modes={**check.modes, "empty": Mode(1, 2, 0.1, 0.9)})
    (doubt,) = doubts(card, blind)
    assert "sees empty in 1 of 2, no better than a guess among 2 outcomes" in doubt
    less = replace(check, modes={k: m for k, m in check.modes.items() if k != "fact-swapped"})
    assert "never checked on fact-swapped" in doubts(card, less)[0]
    # A mode that the task does not depend on is told, not warned of.
    other = replace(check, modes={**check.modes, "claim-added": Mode(0, 9, 0.0, 0.3)})
    assert doubts(card, other) == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**ROWS[0], "outcome": "fine"}, r"gold.jsonl:1: outcome is 'fine'; .* right, wrong"),
        ({**ROWS[0], "reply": None}, r"gold.jsonl:1: no text in the column 'reply'"),
        ({k: v for k, v in ROWS[0].items() if k != "town"}, r"no text in the column 'town'"),
    ],
)
def test_gold_that_is_none(card: Card, row: dict, said: str):
    write(row)
    with pytest.raises(MoesteerError, match=said):
        check_judges(card, gold="gold.jsonl")


def test_no_gold(card: Card):
    with pytest.raises(MoesteerError, match="--gold FILE, a JSONL file with town, answer, reply"):
        check_judges(card)


def test_a_summary_that_is_broken(card: Card):
    check_judges(card, gold="gold.jsonl", out="kept")
    Path("kept/summary.json").write_text('{"card": "towns"}')
    with pytest.raises(MoesteerError, match=r"kept/summary.json can't be read"):
        find_check(card, ".")
