"""MedicalBios (Eberle et al. 2023, arXiv 2310.11906): the profession told by a short biography.

The part of coastalcph/medical-bios that has rationales, as a file or a data set: `text`, `label`
(its number or name), `words` (the text in words), and for each word 0 or 1 in `rationales`, or from
each annotator in `annotations`, of which the majority counts. The foils of its contrastive
rationales are not used.
"""

from collections.abc import Mapping

from pydantic import ConfigDict

from moesteer.errors import MoesteerError
from moesteer.rationale.sources.marks import agreed, marks_a_word, spans
from moesteer.records import Record, Text, check_record, shorten

REQUIRED = ("text", "label", "words")
LABELS = {name: name for name in ("psychologist", "surgeon", "nurse", "dentist", "physician")}
PROMPT = (
    "Biography: {biography}\n"
    "Is this person a psychologist, a surgeon, a nurse, a dentist or a physician?"
    " Answer with one word."
)


class _Row(Record):
    model_config = ConfigDict(extra="ignore", strict=True)

    text: Text
    label: int | str
    words: list[str]
    rationales: list[int] | None = None
    annotations: list[list[int]] | None = None


def converted(record: Mapping[str, object], source: str) -> dict[str, object] | str:
    """A biography as one of our records, or why it can't be used.

    Raises MoesteerError for an unknown label and where there are no rationales at all.
    """
    row = check_record(_Row, record, source)
    names = list(LABELS)
    if isinstance(row.label, int) and 0 <= row.label < len(names):
        label = names[row.label]
    elif row.label in names:
        label = str(row.label)
    else:
        raise MoesteerError(
            f"{source}: the label {shorten(str(row.label))} is neither one of {', '.join(names)}"
            f" nor its number from 0 to {len(names) - 1}"
        )
    marks = row.annotations if row.rationales is None else [row.rationales]
    if marks is None:
        raise MoesteerError(
            f"{source}: neither rationales nor annotations; take the part of MedicalBios that has"
            " rationales"
        )
    if any(len(marked) != len(row.words) for marked in marks):
        return "not as many marks as words"
    places = _places(row.words, row.text)
    if places is None:
        return "its words are not those of its text"
    chosen = agreed([[at for at, mark in enumerate(marked) if mark] for marked in marks])
    rationale = spans("biography", row.text, [place for at in chosen for place in places[at]])
    if not marks_a_word(rationale, {"biography": row.text}):
        return "no word is marked"
    return {
        "texts": {"biography": row.text},
        "label": label,
        "labels": LABELS,
        "rationale": rationale,
        "prompt": PROMPT,
    }


def _places(words: list[str], text: str) -> list[range] | None:
    """The characters of each word, one after the other; None where a word isn't there."""
    found, end = [], 0
    for word in words:
        start = text.find(word, end)
        if start < 0:
            return None
        end = start + len(word)
        found.append(range(start, end))
    return found
