"""Where the sides of a pair part, on token ids written by hand."""

import numpy as np
import pytest

from moesteer.chat import TokenisedConversation, TokenisedPair, tokenise_pairs
from moesteer.contrast import parse_pair, read_pairs
from moesteer.detection.decision import pair_readouts, side_readout, summed_by_pair
from moesteer.engines.readouts import Readout, Term
from moesteer.engines.transformers_engine import load_transformers
from moesteer.errors import MoesteerError
from moesteer.testbed.evaluate import encode, parting, render
from moesteer.testbed.world import BEHAVIOURS, contrast_pairs


def side(ids: str, target: str) -> TokenisedConversation:
    return TokenisedConversation(tuple(map(ord, ids)), tuple(mark == "^" for mark in target))


def pair(a: tuple[str, str], b: tuple[str, str]) -> TokenisedPair:
    return TokenisedPair(side(*a), side(*b), "pairs.jsonl:7")


@pytest.mark.parametrize(
    ("a", "b", "context", "tokens"),
    [
        (("PPyes.", "  ^^^ "), ("PPno.", "  ^^ "), "PP", "yn"),
        (("PPa cat.", "  ^^^^^ "), ("PPa dog.", "  ^^^^^ "), "PPa ", "cd"),
        # One reply is the beginning of the other: it ends, the other goes on.
        (("PPyes.", "  ^^^ "), ("PPyes sir.", "  ^^^^^^^ "), "PPyes", ". "),
        (("PPyes sir.", "  ^^^^^^^ "), ("PPyes.", "  ^^^ "), "PPyes", " ."),
        # The first token of the reply begins with a space of the template's.
        (("P:_y", "  ^^"), ("P:-n", "  ^^"), "P:", "_-"),
    ],
)
def test_the_decision_is_the_first_token_that_differs(
    a: tuple[str, str], b: tuple[str, str], context: str, tokens: str
) -> None:
    (readout,) = pair_readouts(pair(a, b))
    assert readout.ids == tuple(map(ord, context))
    terms = [(t.position, chr(t.token), t.weight) for t in readout.terms]
    assert terms == [(len(context), tokens[0], 1.0), (len(context), tokens[1], -1.0)]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            ("DQw", "  ^"),
            ("Qw", " ^"),
            r"part at token 1, before their .* \(at 3 in A and 2 in B\)",
        ),
        # The border is merged otherwise: the token before the target differs, too.
        (("Pxyes", "  ^^^"), ("P-no", "  ^^"), r"part at token 2, before their targets begin"),
        # What stands between two targets.
        (("P^x", " ^ "), ("P^y", " ^ "), "part at token 3"),
        (("Pab", " ^^"), ("Pabc", " ^^ "), "one side's tokens are the beginning of the other's"),
        (("yes", "^^^"), ("no", "^^"), "part at token 1"),
    ],
)
def test_pairs_without_a_decision_are_refused_by_name(
    a: tuple[str, str], b: tuple[str, str], message: str
) -> None:
    with pytest.raises(MoesteerError, match=r"^pairs\.jsonl:7: .*" + message + r".*--over span\.$"):
        pair_readouts(pair(a, b))


def test_a_span_is_the_mean_of_each_side() -> None:
    a, b = pair_readouts(pair(("DQw?", " ^^ "), ("Qw?", "^^^")), "span")
    assert a == Readout((68, 81, 119, 63), (Term(1, 81, 0.5), Term(2, 119, 0.5)))
    # Nothing predicts the very first token.
    assert b == Readout((81, 119, 63), (Term(1, 119, -0.5), Term(2, 63, -0.5)))
    assert side_readout(pair(("ab", " ^"), ("ac", " ^")), "b").terms == (Term(1, 99, 1.0),)


def test_a_span_that_nothing_predicts_is_refused_by_name() -> None:
    with pytest.raises(MoesteerError, match=r"pairs\.jsonl:7: side b: a text of 2 tokens has no"):
        pair_readouts(pair(("ab", " ^"), ("ab", "^ ")), "span")


def test_readouts_are_added_up_by_pair() -> None:
    one, empty = Readout((5,), ()), Readout((6,), ())
    pairs = [(one,), (one, empty), (empty,)]
    values = np.arange(8.0).reshape(2, 4)
    np.testing.assert_array_equal(summed_by_pair(values, pairs), [[0, 3, 3], [4, 11, 7]])


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_bundled_pairs_part_where_the_testbed_says(behaviour: str) -> None:
    tokenizer = load_transformers("testbed").tokenizer
    pairs = tokenise_pairs(read_pairs(f"testbed:{behaviour}:dev"), tokenizer)
    for read, record in zip(pairs, contrast_pairs(behaviour, "dev"), strict=True):
        head = encode(tokenizer, render(tokenizer, record["prompt"]))
        a, b = encode(tokenizer, record["a"]), encode(tokenizer, record["b"])
        where = parting(a, b)
        (readout,) = pair_readouts(read)
        assert list(readout.ids) == head + a[:where]
        assert [term.token for term in readout.terms] == [a[where], b[where]]


def test_prompts_that_differ_have_a_span_but_no_decision() -> None:
    """What `pairs document` makes."""
    tokenizer = load_transformers("testbed").tokenizer
    question = "Question: Name the tree in the square of Ravenford."
    record = {
        "a": [{"role": "user", "content": f"Document: The map says so. {question}"}],
        "b": [{"role": "user", "content": question}],
        "target": {"last": question},
    }
    (read,) = tokenise_pairs([parse_pair(record, "docs.jsonl:1")], tokenizer)
    with pytest.raises(MoesteerError, match=r"docs\.jsonl:1: .* --over span"):
        pair_readouts(read)
    assert len(pair_readouts(read, "span")) == 2
