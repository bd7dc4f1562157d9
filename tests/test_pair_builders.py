"""Pairs built from the user's data: counted and located by hand."""

import json
from collections import Counter

import pytest

from moesteer.contrast import parse_pair
from moesteer.errors import MoesteerError
from moesteer.pair_builders import (
    DEFAULT_REFUSALS,
    document_pairs,
    read_refusals,
    refusal_pairs,
)


@pytest.fixture
def write(tmp_path):
    def write_lines(*records: object, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write_lines


def span_texts(record: dict[str, object]) -> list[tuple[str, str]]:
    """For each side, the target and what stands before it in its message."""
    pair = parse_pair(record, "built")
    texts = []
    for side in (pair.a, pair.b):
        (span,) = side.spans
        content = side.messages[span.message].content
        texts.append((content[span.start : span.end], content[: span.start]))
    return texts


def test_refusal_pairs(write):
    source = write(*({"prompt": f"p{i}", "reply": f"r{i}"} for i in range(30)))
    pairs = refusal_pairs(source, seed=3)
    assert [pair["prompt"] for pair in pairs] == [f"p{i}" for i in range(30)]
    assert [pair["b"] for pair in pairs] == [f"r{i}" for i in range(30)]
    assert all(set(pair) == {"prompt", "a", "b", "target"} for pair in pairs)
    used = Counter(pair["a"] for pair in pairs)
    assert set(used) == set(DEFAULT_REFUSALS)
    assert set(used.values()) == {2, 3}
    assert pairs == refusal_pairs(source, seed=3)
    assert pairs != refusal_pairs(source, seed=4)
    assert span_texts(pairs[0]) == [(pairs[0]["a"], ""), ("r0", "")]


def test_the_default_refusals_differ_and_are_a_dozen():
    assert len(set(DEFAULT_REFUSALS)) == 12


def test_own_refusals(write, tmp_path):
    source = write({"prompt": "p", "reply": "r"}, {"prompt": "q", "reply": "s"})
    path = tmp_path / "refusals.txt"
    path.write_bytes(b"\xef\xbb\xbfNo.\r\n\r\n  Never. \r\n")
    refusals = read_refusals(path)
    assert refusals == ("No.", "Never.")
    assert {pair["a"] for pair in refusal_pairs(source, refusals)} == {"No.", "Never."}


def test_refusal_errors(write, tmp_path):
    with pytest.raises(MoesteerError, match=r"data.jsonl:1: missing key 'reply'.* prompt, reply"):
        refusal_pairs(write({"prompt": "p"}))
    with pytest.raises(MoesteerError, match=r"data.jsonl:1: a and b are the same"):
        refusal_pairs(write({"prompt": "p", "reply": "No."}), ["No."])
    with pytest.raises(MoesteerError, match="no refusals"):
        refusal_pairs(write({"prompt": "p", "reply": "r"}), [])
    path = tmp_path / "empty.txt"
    path.write_text("\n")
    with pytest.raises(MoesteerError, match=r"empty.txt: holds no refusals"):
        read_refusals(path)
    with pytest.raises(MoesteerError, match=r"nowhere.txt: cannot be read"):
        read_refusals(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("document", "question"),
    [
        ("Paris is a town.", "Where?"),
        ("Question: Where? Where? Document: Where?", "Where?"),
        ("aa", "a"),
        ("Question:", "Question: Question:"),
        (" Spaces. ", " Where? Where?\n"),
    ],
)
def test_document_pairs(write, document: str, question: str):
    (pair,) = document_pairs(write({"document": document, "question": question}))
    question, document = question.strip(), document.strip()
    assert pair["a"] == [{"role": "user", "content": f"Document: {document} Question: {question}"}]
    assert pair["b"] == [{"role": "user", "content": f"Question: {question}"}]
    assert span_texts(pair) == [
        (question, f"Document: {document} Question: "),
        (question, "Question: "),
    ]


def test_document_pairs_from_csv(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('document,question\n"One, two.",Where?\n')
    (pair,) = document_pairs(path)
    assert span_texts(pair)[0] == ("Where?", "Document: One, two. Question: ")
    path.write_text("document,query\nOne,Where?\n")
    with pytest.raises(MoesteerError, match=r"data.csv:1: missing column 'question'; unknown col"):
        document_pairs(path)


def test_document_errors(write):
    with pytest.raises(MoesteerError, match=r"data.jsonl:2: question holds no visible character"):
        document_pairs(write({"document": "d", "question": "q"}, {"document": "d", "question": ""}))
