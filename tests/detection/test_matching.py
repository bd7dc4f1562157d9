"""Matched spans: how many tokens are kept, which, and when unequal ones are warned of."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.chat import TokenisedConversation, TokenisedPair
from moesteer.detection.matching import match_spans, warn_of_unequal_spans
from moesteer.errors import MoesteerWarning


def conversation(target: str) -> TokenisedConversation:
    """x is a target token, . another one."""
    return TokenisedConversation(tuple(range(len(target))), tuple(c == "x" for c in target))


def pair(a: str, b: str) -> TokenisedPair:
    return TokenisedPair(conversation(a), conversation(b), "p:1")


def shown(side: TokenisedConversation) -> str:
    return "".join("x" if inside else "." for inside in side.target)


@pytest.mark.parametrize(
    ("long", "short", "kept"),
    [
        ("xxxxxxxxx", "xxx", ".x..x..x."),  # the middle of each third
        (".xxxxxxxxx.", ".x", ".....x....."),
        ("xxxx", "xx", ".x.x"),
        ("xxxxx", "xxxx", "xx.xx"),  # 0.6, 1.9, 3.1, 4.4
        ("x.x.x.xx", "x.x", "..x...x."),  # of the target tokens 0–4 the second and the fourth
        ("xxx", "xxx", "xxx"),
    ],
)
def test_which_are_kept(long: str, short: str, kept: str):
    matched = match_spans(pair(long, short))
    assert shown(matched.a) == kept
    assert shown(matched.b) == short
    assert match_spans(pair(short, long)) == TokenisedPair(matched.b, matched.a, "p:1")
    assert matched.a.ids == conversation(long).ids


targets = st.text("x.", min_size=1, max_size=60).filter(lambda text: "x" in text)


@given(targets, targets)
def test_what_must_hold(a: str, b: str):
    before = pair(a, b)
    matched = match_spans(before)
    n = min(a.count("x"), b.count("x"))
    for was, now in ((before.a, matched.a), (before.b, matched.b)):
        inside = [i for i, target in enumerate(was.target) if target]
        kept = [inside.index(i) for i, target in enumerate(now.target) if target]  # targets only
        assert len(kept) == n
        for j, place in enumerate(kept):  # within a token of where it should be
            assert place / len(inside) <= (j + 0.5) / n < (place + 1) / len(inside)
    assert match_spans(matched) == matched


def test_unequal_spans_are_warned_of_with_both_numbers():
    with pytest.warns(MoesteerWarning, match=r"5 tokens of A and 2 of B.*--match-spans"):
        warn_of_unequal_spans([pair("xxx", "x"), pair("xx", "x")])
    with pytest.warns(MoesteerWarning, match=r"2 tokens of A and 5 of B"):
        warn_of_unequal_spans([pair("xx", "xxxxx")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unequal_spans([pair("xxxx", "xx"), pair("x", "xxx")])  # 5 and 5 in all
        warn_of_unequal_spans([pair("xxxx", "xx")])  # twice is not yet more than twice
