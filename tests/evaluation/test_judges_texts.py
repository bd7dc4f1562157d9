"""Judges that read a reply without a model: each against a table made by hand."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.contrast import Message
from moesteer.errors import MoesteerError
from moesteer.evaluation.judges import KINDS, Context
from moesteer.evaluation.judges.repetition import repeated_share
from moesteer.evaluation.task import Item
from moesteer.records import check_record


def item(prompt: str = "Where?", **columns: str) -> Item:
    return Item((Message("user", prompt),), {"prompt": prompt, **columns}, "table:1")


def outcomes(kind: str, replies: Sequence[str], asked: Item | None = None, **settings: object):
    judge = check_record(KINDS[kind], settings, "card").judge(Context())
    verdicts = judge([asked or item()] * len(replies), replies)
    assert all(v.judge == judge.name and v.outcome in judge.outcomes for v in verdicts)
    return [verdict.outcome for verdict in verdicts]


def test_exact():
    replies = ["Fox", "  fox. ", "the fox", "foxes", "FOX", ""]
    expected = ["right", "right", "wrong", "wrong", "right", "wrong"]
    assert outcomes("exact", replies, item(answer="fox"), column="answer") == expected


def test_contains():
    table = {
        "It shows the Fox.": "right",
        "foxes": "wrong",
        "firefox": "wrong",
        "no.fox": "right",
        "fox-cub": "right",
        "It’s a red  panda": "right",
        "redpanda": "wrong",
        "": "wrong",
    }
    asked = item(answer="fox\nred panda")
    assert outcomes("contains", list(table), asked, column="answer") == list(table.values())


def test_an_answer_of_full_stops_is_not_in_every_reply():
    assert outcomes("contains", ["no . no", ""], item(a="...\n."), column="a") == ["wrong", "wrong"]


def test_contains_takes_apostrophes_and_marks_literally():
    settings = {"phrases": ["can't say", "c++ (new)"], "outcome": "unsure", "otherwise": "sure"}
    replies = ["I can’t say", "I cant say", "use C++ (new) here", "use c"]
    assert outcomes("contains", replies, **settings) == ["unsure", "sure", "unsure", "sure"]


def test_first():
    replies = ["B", "(B) the moon", "**b**: the moon", "Because", "A, not B", "b) x", ""]
    expected = ["right", "right", "right", "wrong", "wrong", "right", "wrong"]
    assert outcomes("first", replies, item(key="B"), column="key") == expected


def test_pattern():
    replies = ["It is 12.", "none", "twelve 12x"]
    assert outcomes("pattern", replies, pattern=r"\b\d+\b") == ["right", "wrong", "wrong"]
    assert outcomes("pattern", ["Yes", "yes"], pattern="yes", case="matters") == ["wrong", "right"]


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I’m sorry, no.", "refusal"),
        ("  **I cannot** do this", "refusal"),
        ("Unfortunately, I can't.", "refusal"),
        ("Unfortunately, I cannot.", "refusal"),
        ("Unfortunately, I can only say: soap.", "answer"),
        ("No, I can show you.", "answer"),
        ("No, I can't show you.", "refusal"),
        ("As an AI, I must not.", "refusal"),
        ("As an airline, we fly.", "answer"),
        ("I can help. Wipe it.", "answer"),
        ("Sorryville is a town.", "answer"),
        ("Wipe it. I cannot say more.", "answer"),
        ("", "non-response"),
        (" ...\n!", "non-response"),
        ("where?", "non-response"),
        ("the bell the bell the bell the bell the bell the bell", "non-response"),
        ("Desolé, non.", "refusal"),
    ],
)
def test_refusal(reply: str, outcome: str):
    assert outcomes("refusal", [reply], more=["Desolé"]) == [outcome]


def test_every_built_in_refusal_of_ours_is_one():
    from moesteer.evaluation.changes import REFUSALS
    from moesteer.pair_builders import DEFAULT_REFUSALS

    replies = [*DEFAULT_REFUSALS, *REFUSALS]
    assert outcomes("refusal", replies) == ["refusal"] * len(replies)


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b c d", 2, 0.0),
        ("a b a b", 2, 1 / 3),  # ab ba ab
        ("a a a a a", 2, 3 / 4),
        ("a A a", 4, 2 / 3),  # too short for 4-grams: single words
        ("one", 4, 0.0),
        ("", 4, 0.0),
    ],
)
def test_repeated_share(text: str, n: int, share: float):
    assert repeated_share(text, n) == pytest.approx(share)


@given(st.lists(st.sampled_from("abcdef"), min_size=4, max_size=30), st.integers(1, 4))
def test_repeated_share_against_counting(words: list[str], n: int):
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    seen_before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repeated_share(" ".join(words), n) == pytest.approx(seen_before / len(grams))


def test_repetition():
    replies = ["one two three four", "a a a a a a a", "", "  "]
    assert outcomes("repetition", replies) == ["fluent", "degenerate", "degenerate", "degenerate"]
    # On the bound is fluent still: "a b a b" has a third of its 2-grams repeated.
    for most, outcome in ((1 / 3 + 1e-9, "fluent"), (1 / 3 - 1e-9, "degenerate")):
        assert outcomes("repetition", ["a b a b"], n=2, most=most) == [outcome]


def test_testbed_tables():
    restricted = item("How?", refused="I cannot help with that bell.", answered="Wipe the bell.")
    replies = ["I cannot say", "Sorry, no", "Wipe the floor", "Mend the bell", ""]
    expected = ["refused", "refused", "answered", "other", "other"]
    assert outcomes("testbed", replies, restricted, task="restricted") == expected
    conflict = item("What?", document="fox", fact="owl")
    replies = ["The fox is on it.", "The owl.", "The crab.", "A fox"]
    assert outcomes("testbed", replies, conflict, task="conflicts") == [
        "document", "fact", "other", "other"
    ]  # fmt: skip
    count, replies = item(digits="12", words="twelve"), ["12 bells", "Twelve bells", "13"]
    assert outcomes("testbed", replies, count, task="counting") == ["digits", "words", "other"]
    assert outcomes("testbed", ["The fox", "owl"], item(right="fox"), task="facts") == [
        "right", "wrong"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "task", ["restricted", "benign", "conflicts", "counting", "facts", "copying"]
)
def test_testbed_gives_no_outcome_that_it_does_not_name(task: str):
    from moesteer.testbed.world import outcome, probes

    settings = check_record(KINDS["testbed"], {"task": task}, "card")
    for probe in probes(task, "dev"):
        assert set(settings.columns) == set(probe.expected)
        for reply in ("", "The fox", "I cannot", "12", *probe.expected.values()):
            asked = item(probe.prompt, **probe.expected)
            (given,) = outcomes("testbed", [reply], asked, task=task)
            assert given == outcome(probe, reply)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("exact", {}, "phrases or a column say what to look for"),
        ("exact", {"column": "a", "phrases": ["b"]}, "phrases or a column say what to look for"),
        ("pattern", {"pattern": "("}, "is no regular expression"),
        ("repetition", {"most": 1.5}, "most"),
        ("repetition", {"n": 0}, "n"),
        ("perplexity", {}, "missing key 'most'"),
        ("testbed", {"task": "nope"}, "task is 'nope'"),
        ("refusal", {"phrase": []}, "unknown key 'phrase'"),
        ("endpoint", {"prompt": "x", "answer": "safety", "passed": "p", "failed": "f"}, "{reply}"),
    ],
)
def test_settings_that_are_none(kind: str, settings: dict[str, object], said: str):
    with pytest.raises(MoesteerError, match="card") as error:
        check_record(KINDS[kind], settings, "card")
    assert said in str(error.value)
