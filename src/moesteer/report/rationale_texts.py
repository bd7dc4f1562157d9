"""Texts as rationales see them: each word shaded by its score, with people's words underlined."""

from collections.abc import Iterator, Sequence

from moesteer.rationale.reading import Reading
from moesteer.rationale.summary import Summary
from moesteer.report.blocks import Block, Paragraph, Shaded, Word, number, percent
from moesteer.report.page import Rationales
from moesteer.report.rationale_words import best, chosen_methods, prompted_methods

EACH = 2
"""Texts shown that the model labels rightly, and as many wrongly."""
LINES = 4
"""How often a text is shown: by method, and by arm."""
LONGEST = 120
"""Words of a text that is shown rather than a later one."""


def text_blocks(run: Rationales, arms: Sequence[str]) -> list[Block]:
    """A few texts, each as some methods see it: the first labelled rightly, the first wrongly."""
    first = sorted(
        (reading for reading in run.readings if reading.arm == arms[0]),
        key=lambda reading: (len(reading.units) > LONGEST, reading.item),
    )
    right = [reading for reading in first if reading.predicted == reading.label][:EACH]
    wrong = [reading for reading in first if reading.predicted != reading.label][:EACH]
    if not right and not wrong:
        return []
    others = {(r.arm, r.item): r for r in run.readings if r.arm in arms[1:]}
    shown = _shown_methods(run.summary, arms[0])[: max(1, LINES // len(arms))]
    blocks: list[Block] = [
        Paragraph(
            "Underlined: what people marked. Shaded: how much a method makes of a word, red for"
            " the label and, where it tells, blue against it. Framed: its rationale, as many words"
            " as people marked or as the model named."
        )
    ]
    for reading in (*right, *wrong):
        verdict = "right" if reading.predicted == reading.label else f"wrong: {reading.label}"
        share = percent(reading.probabilities.get(reading.predicted)).text
        lines = []
        for method in shown:
            for one in (reading, *(others.get((arm, reading.item)) for arm in arms[1:])):
                if one is not None and method in one.choices:
                    name = method if len(arms) == 1 else f"{method}, {one.arm}"
                    lines.append((name, tuple(_words(one, method))))
        title = f"{reading.source}: {reading.predicted} ({share}), {verdict}"
        blocks.append(Shaded(title, tuple(lines)))
    return blocks


def _shown_methods(summary: Summary, arm: str) -> list[str]:
    """The best by F1 and by flip rate, one by routing, one that the model was asked for."""
    found = [mean.method for m in ("f1", "flip") if (mean := best(summary, arm, m)) is not None]
    chosen = chosen_methods(summary)
    found += [m for m in chosen if m in ("gate-x-gradient", "behaviour-routing")][:1]
    found += prompted_methods(summary)[:1]
    return list(dict.fromkeys([*found, *chosen]))


def _words(reading: Reading, method: str) -> Iterator[Word]:
    """The texts one after the other, each unit with its shade, all else without."""
    scores = reading.scores.get(method)
    largest = max((abs(score) for score in scores or ()), default=0.0) or 1.0
    chosen = set(reading.choices[method].units)
    for place, (name, whole) in enumerate(reading.texts.items()):
        if len(reading.texts) > 1:
            yield Word("\n" * bool(place) + f"{name}: ", "name")
        done = 0
        for unit, (of, start, end) in enumerate(reading.units):  # in reading order
            if of == name:
                yield Word(whole[done:start])
                score = None if scores is None else scores[unit]
                yield _word(whole[start:end], score, largest, unit in reading.human, unit in chosen)
                done = end
        yield Word(whole[done:])


def _word(words: str, score: float | None, largest: float, human: bool, chosen: bool) -> Word:
    said = [words if score is None else f"{words}: {number(score, '+.3g').text}"]
    said += ["in the rationale"] * chosen + ["marked by people"] * human
    share = float(chosen) if score is None else round(abs(score) / largest, 3)
    style = "cold" if score is not None and score < 0 else "warm"
    return Word(words, style, share, human, chosen, "; ".join(said))
