"""Instances laid out by hand: a token a word, between two tokens of a template."""

from collections.abc import Mapping

from moesteer.rationale.instances import Instance, TextSpan
from moesteer.rationale.layout import Laid, Unit
from moesteer.rationale.words import word_spans


def made_laid(
    texts: Mapping[str, str],
    marked: tuple[str, ...] = (),
    labels: Mapping[str, str] | None = None,
    ask: Mapping[str, str] | None = None,
    source: str = "made:1",
) -> Laid:
    """`marked`: words that are human wherever they stand. Units' tokens are numbered from 1."""
    labels = labels or {"right": "yes", "wrong": "no"}
    units: list[Unit] = []
    for name, text in texts.items():
        for start, end in word_spans(text):
            human = text[start:end] in marked
            units.append(Unit(name, start, end, (len(units) + 1,), human))
    spans = tuple(TextSpan(unit.text, unit.start, unit.end) for unit in units if unit.human)
    prompt = " ".join(f"{{{name}}}" for name in texts) + " So?"
    instance = Instance(
        source, dict(texts), next(iter(labels)), dict(labels), spans, prompt, dict(ask or {})
    )
    ids = tuple(range(5, 5 + len(units) + 2))
    tokens = {label: (number,) for number, label in enumerate(labels, start=200)}
    return Laid(instance, ids, tuple(units), tokens)


def words_of(laid: Laid, units: tuple[int, ...]) -> list[str]:
    """The words at these units, in the order of the units."""
    return [
        laid.instance.texts[laid.units[n].text][laid.units[n].start : laid.units[n].end]
        for n in units
    ]
