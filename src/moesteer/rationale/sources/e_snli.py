"""e-SNLI (Camburu et al. 2018, arXiv 1812.01193): does the hypothesis follow from the premise?

The authors' CSV files, where each annotator's words stand between *stars* in a copy of the sentence
(Sentence1_marked_1, …; one annotator in the training files, three in the others). What more than
half of the annotators marked is the rationale; annotators go by characters, as a marked word takes
its punctuation with it. For neutral pairs they could mark the hypothesis only.
"""

from collections.abc import Mapping

from pydantic import ConfigDict

from moesteer.rationale.sources.marks import agreed, marks_a_word, spans
from moesteer.records import Record, check_record

REQUIRED = ("gold_label", "Sentence1", "Sentence2", "Sentence1_marked_1", "Sentence2_marked_1")
OPTIONAL = (
    *("pairID", "WorkerId"),
    *(f"Explanation_{n}" for n in (1, 2, 3)),
    *(f"Sentence{s}_marked_{n}" for n in (2, 3) for s in (1, 2)),
    *(f"Sentence{s}_Highlighted_{n}" for n in (1, 2, 3) for s in (1, 2)),
)
LABELS = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}
PROMPT = (
    "Premise: {premise}\nHypothesis: {hypothesis}\n"
    "Does the hypothesis follow from the premise? Answer Yes, Maybe or No."
)
_TEXTS = {"premise": 1, "hypothesis": 2}


class _Row(Record):
    model_config = ConfigDict(extra="ignore", strict=True)

    gold_label: str
    sentence1: str
    sentence2: str
    sentence1_marked_1: str
    sentence2_marked_1: str
    sentence1_marked_2: str | None = None
    sentence2_marked_2: str | None = None
    sentence1_marked_3: str | None = None
    sentence2_marked_3: str | None = None


def converted(record: Mapping[str, object], source: str) -> dict[str, object] | str:
    """A row as one of our records, or why it can't be used."""
    row = check_record(_Row, {key.lower(): value for key, value in record.items()}, source)
    cells = row.model_dump()
    texts = {name: cells[f"sentence{number}"] for name, number in _TEXTS.items()}
    if not all(text.strip() for text in texts.values()):
        return "a sentence is missing"
    if row.gold_label not in LABELS:
        return "the annotators agreed on no label"
    rationale = []
    for name, number in _TEXTS.items():
        copies = [cells[f"sentence{number}_marked_{annotator}"] for annotator in (1, 2, 3)]
        marks = [_starred(copy, texts[name]) for copy in copies if copy]
        known = [marked for marked in marks if marked is not None]
        if len(known) < len(marks):
            return "a marked sentence is another than the sentence"
        rationale += spans(name, texts[name], agreed(known))
    if not marks_a_word(rationale, texts):
        return "most annotators agreed on no word"
    return {
        "texts": texts,
        "label": row.gold_label,
        "labels": LABELS,
        "rationale": rationale,
        "prompt": PROMPT,
    }


def _starred(marked: str, text: str) -> set[int] | None:
    """The characters of a text that stand between stars in its copy; None if it is no copy.

    Copies may differ in white space.
    """
    told: list[tuple[str, bool]] = []
    inside = False
    for character in marked:
        if character == "*":
            inside = not inside
        elif not character.isspace():
            told.append((character, inside))
    places = [place for place, c in enumerate(text) if c != "*" and not c.isspace()]
    if [character for character, _ in told] != [text[place] for place in places]:
        return None
    return {place for place, (_, star) in zip(places, told, strict=True) if star}
