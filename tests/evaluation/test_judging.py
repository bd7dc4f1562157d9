"""Verdicts of several judges, combined and compared."""

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.contrast import Message
from moesteer.evaluation.cards import read_card
from moesteer.evaluation.judges.base import OneByOne
from moesteer.evaluation.judging import Judged, combined, cost_of, disagreement, judge_replies
from moesteer.evaluation.task import Cost, Item, Verdict

CARD = read_card("testbed-fluency")  # its outcome is `fluent`
Combine = Literal["first", "majority", "all"]


def verdicts(letters: str) -> tuple[Verdict, ...]:
    """A verdict a letter: f, d, o for outcomes, - for none."""
    words = {"f": "fluent", "d": "degenerate", "o": "other", "-": None}
    return tuple(Verdict(str(n), words[letter]) for n, letter in enumerate(letters))


@pytest.mark.parametrize(
    ("combine", "letters", "outcome"),
    [
        ("first", "fdd", "fluent"),
        ("first", "-ff", None),
        ("majority", "ffd", "fluent"),
        ("majority", "fd", None),
        ("majority", "fd-", None),
        ("majority", "-d-", "degenerate"),
        ("majority", "fdo", None),
        ("majority", "ffdo", None),
        ("majority", "fffdo", "fluent"),
        ("majority", "--", None),
        ("all", "fff", "fluent"),
        ("all", "fdf", "degenerate"),
        ("all", "fdo", "degenerate"),
        ("all", "f-", None),
        ("all", "-d", "degenerate"),
        ("all", "--", None),
    ],
)
def test_combined(combine: Combine, letters: str, outcome: str | None):
    assert combined(replace(CARD, combine=combine), verdicts(letters)) == outcome


@given(st.text("fdo-", min_size=1, max_size=6), st.sampled_from(["first", "majority", "all"]))
def test_an_outcome_is_one_that_a_judge_gave(letters: str, combine: Combine):
    given_ = verdicts(letters)
    outcome = combined(replace(CARD, combine=combine), given_)
    assert outcome is None or outcome in [verdict.outcome for verdict in given_]
    if len(set(letters)) == 1:
        assert outcome == given_[0].outcome


def test_judge_replies():
    def judge(name: str, word: str) -> OneByOne:
        def say(item: Item, reply: str) -> tuple[str, str, float]:
            found = word in item.prompt + reply
            return ("degenerate" if found else "fluent"), f"looked for {word}", float(found)

        return OneByOne(name, ("fluent", "degenerate"), say)

    items = [Item((Message("user", text),), {}, "made") for text in ("ask x", "ask", "ask")]
    judged = judge_replies(CARD, [judge("one", "x"), judge("two", "y")], items, ["a", "y", "z"])
    assert [one.outcome for one in judged] == ["degenerate", "degenerate", "fluent"]
    assert judged[0].verdicts == (
        Verdict("one", "degenerate", "looked for x", 1.0),
        Verdict("two", "fluent", "looked for y", 0.0),
    )
    assert disagreement(judged) == (2, 3)
    assert judge_replies(CARD, [judge("one", "x")], [], []) == []
    with pytest.raises(ValueError, match="zip"):
        judge_replies(CARD, [judge("one", "x")], items, ["too few"])


def test_disagreement_leaves_out_who_said_nothing():
    table = ["ff", "fd", "f-", "--", "fd-", "d", "fdd"]
    judged = [Judged(None, verdicts(letters)) for letters in table]
    assert disagreement(judged) == (3, 4)  # fd, fd-, fdd of ff, fd, fd-, fdd
    assert disagreement([]) == (0, 0)


def test_cost():
    class Counting(OneByOne):
        cost = Cost(2, 30)

    plain = OneByOne("plain", (), lambda item, reply: (None, "", None))
    counting = Counting("counting", (), lambda item, reply: (None, "", None))
    assert cost_of([plain, counting, counting]) == Cost(4, 60)
