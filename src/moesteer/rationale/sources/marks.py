"""Marked characters of a text: what several people agree on, and as the spans of a record."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moesteer.rationale.words import word_spans


def agreed(marks: Sequence[Collection[int]]) -> set[int]:
    """The places that more than half of the people marked, each person's given once."""
    votes = Counter(place for places in marks for place in set(places))
    return {place for place, count in votes.items() if 2 * count > len(marks)}


def spans(name: str, text: str, marked: Collection[int]) -> list[dict[str, Any]]:
    """Marked characters of the text `name` as spans; white space between two belongs to them."""
    found: list[dict[str, Any]] = []
    end = 0
    for place in sorted(marked):
        if found and not text[end:place].strip():
            found[-1]["end"] = place + 1
        else:
            found.append({"text": name, "start": place, "end": place + 1})
        end = place + 1
    return found


def marks_a_word(rationale: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> bool:
    """Whether some span holds more than punctuation."""
    return any(word_spans(texts[span["text"]][span["start"] : span["end"]]) for span in rationale)
