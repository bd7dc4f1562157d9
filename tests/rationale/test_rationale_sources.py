"""e-SNLI, FEVER and MedicalBios from made-up files in their own columns."""

import csv
import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.rationale.instances import Instance, parse_instance, read_instances
from moesteer.rationale.sources import e_snli
from moesteer.rationale.sources.marks import agreed, spans


def marked(instance: Instance) -> list[tuple[str, str]]:
    """The marked characters, and their texts' names."""
    return [
        (span.text, instance.texts[span.text][span.start : span.end]) for span in instance.rationale
    ]


def write_csv(path: Path, rows: list[dict[str, str]]) -> str:
    columns = [*e_snli.REQUIRED, *e_snli.OPTIONAL]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# -- marks ---------------------------------------------------------------------------------------


def test_more_than_half_must_have_marked_a_place():
    assert agreed([{1, 2}]) == {1, 2}
    assert agreed([{1, 2}, {2, 3}]) == {2}
    assert agreed([{1, 2}, {2, 3}, {3, 4}]) == {2, 3}
    assert agreed([[1, 1, 1], [2], [3]]) == set()
    assert agreed([]) == set()


@given(text=st.text("ab .", max_size=12), data=st.data())
def test_spans_hold_what_is_marked_and_white_space_between(text: str, data: st.DataObject):
    visible = [place for place, c in enumerate(text) if c != " "]
    chosen = data.draw(st.sets(st.sampled_from(visible))) if visible else set()
    found = spans("t", text, chosen)
    covered = [p for span in found for p in range(int(str(span["start"])), int(str(span["end"])))]
    assert sorted(set(covered)) == covered
    assert {place for place in covered if text[place] != " "} == chosen
    # No two spans could be one.
    for one, two in pairwise(found):
        assert text[int(str(one["end"])) : int(str(two["start"]))].strip()


# -- e-SNLI --------------------------------------------------------------------------------------


def snli_row(**change: str) -> dict[str, str]:
    return {
        "pairID": "1.jpg#0",
        "gold_label": "contradiction",
        "Sentence1": "Two women, sitting outside.",
        "Sentence2": "The women stand.",
        "Sentence1_marked_1": "Two women, *sitting* *outside.*",
        "Sentence2_marked_1": "The women *stand.*",
    } | change


def test_e_snli_takes_the_majority_of_its_annotators(tmp_path: Path):
    second = {
        "Sentence1_marked_2": "Two *women,* *sitting*  outside. ",
        "Sentence2_marked_2": "*The* women *stand.*",
        "Sentence1_marked_3": "Two *women,* sitting outside.",
        "Sentence2_marked_3": "The women stand.",
    }
    one, three = read_instances(write_csv(tmp_path / "e.csv", [snli_row(), snli_row(**second)]))
    assert one.label == "contradiction"
    assert one.texts == {
        "premise": "Two women, sitting outside.",
        "hypothesis": "The women stand.",
    }
    assert marked(one) == [("premise", "sitting outside."), ("hypothesis", "stand.")]
    assert marked(three) == [("premise", "women, sitting"), ("hypothesis", "stand.")]
    assert three.source.endswith("e.csv:3")


def test_e_snli_training_files_have_one_annotator(tmp_path: Path):
    path = tmp_path / "e.csv"
    path.write_text(
        "pairID,gold_label,Sentence1,Sentence2,Explanation_1,WorkerId,Sentence1_marked_1,"
        "Sentence2_marked_1,Sentence1_Highlighted_1,Sentence2_Highlighted_1\n"
        "1,entailment,A man runs.,A man moves.,Running is moving.,w,A man *runs.*,A man *moves.*,"
        "2,2\n"
    )
    (found,) = read_instances(str(path))
    assert marked(found) == [("premise", "runs."), ("hypothesis", "moves.")]


def test_punctuation_alone_is_no_word(tmp_path: Path):
    alone = snli_row(
        Sentence1_marked_1="Two women, sitting outside*.*", Sentence2_marked_1="The women stand."
    )
    with pytest.warns(MoesteerWarning, match="1 of 2 .*agreed on no word"):
        assert len(read_instances(write_csv(tmp_path / "e.csv", [snli_row(), alone]))) == 1


def test_e_snli_counts_what_it_leaves_out(tmp_path: Path):
    rows = [
        snli_row(),
        snli_row(gold_label="-"),
        snli_row(
            Sentence1_marked_1="Two women, sitting outside.", Sentence2_marked_1="The women stand."
        ),
        snli_row(Sentence2=""),
        snli_row(Sentence2_marked_1="The *men* stand."),
        snli_row(Sentence2_marked_1="The *men* stand."),
    ]
    path = write_csv(tmp_path / "e.csv", rows)
    with pytest.warns(MoesteerWarning) as caught:
        assert len(read_instances(path)) == 1
    said = str(caught[0].message)
    assert "5 of 6 instances" in said
    assert f"2: a marked sentence is another than the sentence (first at {path}:6)" in said
    assert f"1: most annotators agreed on no word (first at {path}:4)" in said
    assert "1: the annotators agreed on no label" in said
    assert "1: a sentence is missing" in said
    with pytest.raises(MoesteerError, match="none is left"):
        read_instances(write_csv(tmp_path / "f.csv", rows[1:2]))


PIECES = st.lists(
    st.tuples(st.text("ab,.é", min_size=1, max_size=4), st.booleans()), min_size=1, max_size=8
).filter(lambda pieces: any(star and word.strip(",.") for word, star in pieces))


@given(words=PIECES, several=st.booleans())
def test_e_snli_stars_are_found_word_by_word(words: list[tuple[str, bool]], several: bool):
    text = " ".join(word for word, _ in words)
    copy = ("  " if several else " ").join(f"*{word}*" if star else word for word, star in words)
    row = snli_row(Sentence1=text, Sentence1_marked_1=copy, Sentence2_marked_1="The women stand.")
    record = e_snli.converted(row, "here")
    assert isinstance(record, dict)
    found = parse_instance(record, "here")
    covered = {p for span in found.rationale for p in range(span.start, span.end)}
    at = 0
    for word, star in words:
        assert {p in covered for p in range(at, at + len(word))} == {star}
        at += len(word) + 1


# -- FEVER ---------------------------------------------------------------------------------------


def evidence(docid: str, start: int, end: int, text: str) -> dict[str, Any]:
    return {
        "docid": docid, "start_token": start, "end_token": end, "text": text,
        "start_sentence": 0, "end_sentence": 1,
    }  # fmt: skip


def claim(*groups: list[dict[str, Any]], **change: object) -> dict[str, Any]:
    return {
        "annotation_id": "7",
        "classification": "REFUTES",
        "query": "The tower is low.",
        "evidences": list(groups),
        "query_type": None,
    } | change


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    # A no-break space is within a token; spaces may be doubled.
    (folder / "Tower").write_text("The tower  is 300\u00a0m high .\n\nIt stands in Elmford .\n")
    (folder / "Elmford_-LRB-town-RRB-").write_text("Elmford is a town .\n")
    return folder


def test_fever_finds_evidence_by_its_tokens(tmp_path: Path, docs: Path):
    two = claim(
        [evidence("Tower", 0, 6, "The tower is 300\u00a0m high .")],
        [evidence("Elmford_-LRB-town-RRB-", 0, 1, "Elmford")],
        [evidence("Tower", 8, 10, "in Elmford")],
        classification="SUPPORTS",
    )
    path = write_jsonl(tmp_path / "val.jsonl", [claim([evidence("Tower", 4, 5, "high")]), two])
    one, both = read_instances(path)
    assert one.texts["evidence"] == "The tower is 300\u00a0m high . It stands in Elmford ."
    assert one.texts["claim"] == "The tower is low."
    assert (one.label, both.label) == ("REFUTES", "SUPPORTS")
    assert marked(one) == [("evidence", "high")]
    assert both.texts["evidence"] == one.texts["evidence"] + " Elmford is a town ."
    assert marked(both) == [
        ("evidence", "The tower is 300\u00a0m high ."),
        ("evidence", "Elmford"),
        ("evidence", "in Elmford"),
    ]
    assert both.rationale[1].start == len(one.texts["evidence"]) + 1


def test_fever_leaves_out_claims_without_evidence_and_refuses_missing_texts(
    tmp_path: Path, docs: Path
):
    good = claim([evidence("Tower", 4, 5, "high")])
    moved = claim([evidence("Tower", 3, 4, "high")])
    beyond = claim([evidence("Tower", 40, 41, "high")])
    path = write_jsonl(tmp_path / "a.jsonl", [claim(), good, moved, beyond])
    with pytest.warns(MoesteerWarning, match=r"3 of 4 .*2: its evidence stands elsewhere"):
        assert len(read_instances(path)) == 1
    path = write_jsonl(tmp_path / "b.jsonl", [good, claim([evidence("Wall", 0, 1, "A")])])
    with pytest.raises(MoesteerError, match=r"b.jsonl:2: there is no text .*Wall"):
        read_instances(path)
    path = write_jsonl(tmp_path / "b.jsonl", [good, claim([evidence("a" * 400, 0, 1, "A")])])
    with pytest.raises(MoesteerError, match=r"b.jsonl:2: there is no text .*aaa"):
        read_instances(path)
    path = write_jsonl(tmp_path / "b.jsonl", [claim([evidence("Tower", -9, 1, "A")])])
    with pytest.raises(MoesteerError, match=r"b.jsonl:1: .*start_token.* greater than or equal"):
        read_instances(path)
    path = write_jsonl(tmp_path / "c.jsonl", [claim(classification="POS")])
    with pytest.raises(MoesteerError, match=r"c.jsonl:1: .*'POS'.*SUPPORTS, REFUTES"):
        read_instances(path)


# -- MedicalBios ---------------------------------------------------------------------------------


def biography(**change: object) -> dict[str, Any]:
    return {
        "text": "She practises at the Dental Clinic, Elmford.",
        "label": 3,
        "foil": 2,
        "words": ["She", "practises", "at", "the", "Dental", "Clinic", ",", "Elmford", "."],
        "rationales": [0, 0, 0, 0, 1, 1, 0, 0, 0],
        "contrastive_rationales": [0, 0, 0, 0, 1, 0, 0, 0, 0],
    } | change


def test_medical_bios_takes_its_rationales_or_the_majority(tmp_path: Path):
    votes = [[1, 1, 0, 0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1, 0, 0, 0], [0] * 9]
    annotated = biography(annotations=votes, label="nurse")
    del annotated["rationales"]
    path = write_jsonl(tmp_path / "bios.jsonl", [biography(annotations=votes), annotated])
    one, other = read_instances(path)
    assert (one.label, other.label) == ("dentist", "nurse")
    assert marked(one) == [("biography", "Dental Clinic")]
    assert marked(other) == [("biography", "practises"), ("biography", "Dental")]


def test_medical_bios_says_what_it_cannot_use(tmp_path: Path):
    rows = [
        biography(),
        biography(rationales=[0] * 9),
        biography(rationales=[1]),
        biography(words=["He", *biography()["words"][1:]]),
    ]
    path = write_jsonl(tmp_path / "bios.jsonl", rows)
    with pytest.warns(MoesteerWarning, match=r"3 of 4") as caught:
        assert len(read_instances(path)) == 1
    for reason in ("no word is marked", "as many marks as words", "not those of its text"):
        assert reason in str(caught[0].message)
    for label in (5, -1, "baker"):
        path = write_jsonl(tmp_path / "bios.jsonl", [biography(label=label)])
        with pytest.raises(MoesteerError, match=f"bios.jsonl:1: the label '{label}'"):
            read_instances(path)
    bare = {key: biography()[key] for key in ("text", "label", "words")}
    with pytest.raises(MoesteerError, match="neither rationales nor annotations"):
        read_instances(write_jsonl(tmp_path / "bios.jsonl", [bare]))


def test_a_warning_comes_only_where_something_is_left_out(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_instances(write_jsonl(tmp_path / "bios.jsonl", [biography()]))
