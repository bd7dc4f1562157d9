"""FEVER as ERASER has it (Thorne et al. 2018, arXiv 1803.05355; DeYoung et al. 2020, arXiv
1911.03429): is the claim right by the evidence?

A JSONL file of claims, and beside it a folder `docs` with the texts, a sentence a line and spaces
between the tokens. The texts that evidence is named of, one after the other, are what is read; each
group of evidence is enough by itself, and all groups together are the rationale.
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from pydantic import ConfigDict, NonNegativeInt

from moesteer.errors import MoesteerError
from moesteer.records import Record, Text, check_record, read_text, shorten

REQUIRED = ("classification", "query", "evidences")
LABELS = {"SUPPORTS": "Yes", "REFUTES": "No"}
PROMPT = "Evidence: {evidence}\nClaim: {claim}\nIs the claim right? Answer Yes or No."


class _Evidence(Record):
    model_config = ConfigDict(extra="ignore", strict=True)

    docid: str
    start_token: NonNegativeInt
    end_token: int
    text: str


class _Claim(Record):
    model_config = ConfigDict(extra="ignore", strict=True)

    classification: str
    query: Text
    evidences: list[list[_Evidence]]


def converted(record: Mapping[str, object], source: str, docs: Path) -> dict[str, object] | str:
    """A claim as one of our records, with its texts from the folder `docs`, or why it can't be
    used.

    Raises MoesteerError where a text is missing or the labels are those of another set.
    """
    claim = check_record(_Claim, record, source)
    if claim.classification not in LABELS:
        raise MoesteerError(
            f"{source}: the classification {shorten(claim.classification)} is none of FEVER's"
            f" ({', '.join(LABELS)}); of ERASER's sets only FEVER is known, write others as records"
            " with texts, label, labels, rationale and prompt"
        )
    marked = [evidence for group in claim.evidences for evidence in group]
    if not marked:
        return "it has no evidence"
    evidence, begins = "", {}
    for docid in dict.fromkeys(mark.docid for mark in marked):
        begins[docid] = len(evidence) + 1 if evidence else 0
        evidence = " ".join(filter(None, (evidence, " ".join(_tokens(docs, docid, source)))))
    rationale = []
    for mark in marked:
        tokens = _tokens(docs, mark.docid, source)
        told = " ".join(tokens[mark.start_token : mark.end_token])
        if not told or told.split() != mark.text.split():
            return "its evidence stands elsewhere in the text than it says"
        before = "".join(token + " " for token in tokens[: mark.start_token])
        start = begins[mark.docid] + len(before)
        rationale.append({"text": "evidence", "start": start, "end": start + len(told)})
    return {
        "texts": {"evidence": evidence, "claim": claim.query},
        "label": claim.classification,
        "labels": LABELS,
        "rationale": rationale,
        "prompt": PROMPT,
    }


def _tokens(docs: Path, docid: str, source: str) -> list[str]:
    path = docs / docid
    if not os.path.isfile(path):  # unlike Path's, it takes any name
        raise MoesteerError(
            f"{source}: there is no text {shorten(str(path))}; ERASER's folder docs must stand"
            " beside the file"
        )
    return _split(path)


@lru_cache(maxsize=256)
def _split(path: Path) -> list[str]:
    """A text's tokens, as ERASER counts them: between spaces, not between other white space."""
    lines = read_text(path).split("\n")
    return [token for line in lines for token in line.strip().split(" ") if token]
