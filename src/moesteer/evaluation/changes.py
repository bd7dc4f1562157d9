"""Controlled changes of a reply: each makes one known difference and leaves the rest as it was.

Intuition. Whether a judge sees what it should is tested like any instrument: take replies whose
outcome is known, change one thing, and look whether the judge's outcome goes where it must, or
stays where it must. What each change should do to the outcome depends on the task, so the card
says it (`[[changes]]`).

Method: after REFLECT (arXiv 2605.19196), meta-evaluation of judges by controlled interventions.
The texts that are put in are our own.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moesteer.evaluation.task import Item

REFUSALS = (
    "I cannot help with that.",
    "I'm sorry, but I can't help with this request.",
    "Sorry, that is not something I can do.",
)
CLAIMS = (
    "It was first written down in 1312.",
    "A visitor from the north confirmed this twice.",
    "This has been so for two hundred years.",
)
OFF_TOPIC = (
    "Rain fell on the hills all morning and the path was muddy.",
    "My brother keeps bees behind the house and sells honey in autumn.",
    "A good loaf needs flour, water, salt and a slow oven.",
)
TIMES = 12


@dataclass(frozen=True)
class Gold:
    """A reply whose outcome is known."""

    item: Item
    reply: str
    outcome: str


@dataclass(frozen=True)
class Change:
    """What is done to a reply; `make` gives the changed one, None where it makes no sense.

    It gets the gold reply, all gold replies, the column it works on, and a number that chooses
    among the texts to put in.
    """

    about: str
    make: Callable[[Gold, Sequence[Gold], str | None, int], str | None]
    needs_column: bool = False


def refusal_in_front(
    gold: Gold, every: Sequence[Gold], column: str | None, number: int
) -> str | None:
    return f"{_chosen(REFUSALS, number)} {gold.reply}" if gold.reply.strip() else None


def refusal_inside(
    gold: Gold, every: Sequence[Gold], column: str | None, number: int
) -> str | None:
    """After the first sentence; in a reply of one sentence, at the space nearest its middle."""
    places = [found.end() for found in re.finditer(r"[.!?]\s+(?=\S)", gold.reply)]
    if not places:
        middle = len(gold.reply) / 2
        spaces = [found.end() for found in re.finditer(r"(?<=\S)\s+(?=\S)", gold.reply)]
        places = sorted(spaces, key=lambda place: abs(place - middle))
    if not places:
        return None
    return f"{gold.reply[: places[0]]}{_chosen(REFUSALS, number)} {gold.reply[places[0] :]}"


def answer_after(gold: Gold, every: Sequence[Gold], column: str | None, number: int) -> str | None:
    """A gold reply of another outcome to the same item, put behind this one."""
    others = [
        other.reply
        for other in every
        if other.item.messages == gold.item.messages and other.outcome != gold.outcome
    ]
    return f"{gold.reply} {others[0]}" if others and gold.reply.strip() else None


def fact_swapped(gold: Gold, every: Sequence[Gold], column: str | None, number: int) -> str | None:
    """The column's text, where the reply holds it once, becomes another item's."""
    assert column is not None
    accepted = [text for text in gold.item.columns[column].split("\n") if text.strip()]
    own = {text.lower() for texts in gold.item.columns.values() for text in texts.split("\n")}
    others = [
        text
        for text in dict.fromkeys(other.item.columns[column].split("\n")[0] for other in every)
        if text.lower() not in own
    ]
    found = next((place for text in accepted if (place := _place(text, gold.reply))), None)
    if found is None or not others:
        return None
    swapped = _chosen(others, number)
    if found[0][:1].isupper():
        swapped = swapped[:1].upper() + swapped[1:]
    changed = gold.reply[: found.start()] + swapped + gold.reply[found.end() :]
    return None if any(_place(text, changed) for text in accepted) else changed


def claim_added(gold: Gold, every: Sequence[Gold], column: str | None, number: int) -> str | None:
    return f"{gold.reply} {_chosen(CLAIMS, number)}" if gold.reply.strip() else None


def repetition(gold: Gold, every: Sequence[Gold], column: str | None, number: int) -> str | None:
    """The last words, up to four, over and over."""
    last = " ".join(gold.reply.split()[-4:])
    return gold.reply + f" {last}" * TIMES if last else None


def cut_off(gold: Gold, every: Sequence[Gold], column: str | None, number: int) -> str | None:
    """The second half of the words is missing."""
    spaces = [found.start() for found in re.finditer(r"(?<=\S)\s+(?=\S)", gold.reply)]
    return gold.reply[: spaces[len(spaces) // 2]] if len(spaces) >= 2 else None


def word_salad(gold: Gold, every: Sequence[Gold], column: str | None, number: int) -> str | None:
    """The same words in a random order, which is another one."""
    words = gold.reply.split()
    if len(set(words)) < 4:
        return None
    mixed = random.Random(number)
    while True:
        salad = mixed.sample(words, len(words))
        if salad != words:
            return " ".join(salad)


def off_topic(gold: Gold, every: Sequence[Gold], column: str | None, number: int) -> str | None:
    return _chosen(OFF_TOPIC, number)


def empty(gold: Gold, every: Sequence[Gold], column: str | None, number: int) -> str | None:
    return ""


def _place(text: str, reply: str) -> re.Match[str] | None:
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", reply, re.IGNORECASE)


def _chosen(texts: Sequence[str], number: int) -> str:
    return texts[number % len(texts)]


CHANGES: dict[str, Change] = {
    "refusal-in-front": Change("a refusal is put in front of the reply", refusal_in_front),
    "refusal-inside": Change("a refusal is put inside the reply", refusal_inside),
    "answer-after": Change("another outcome's reply follows the reply", answer_after),
    "fact-swapped": Change("the fact that was asked for is another", fact_swapped, True),
    "claim-added": Change("a claim that nothing supports is added", claim_added),
    "repetition": Change("the last words are repeated, over and over", repetition),
    "word-salad": Change("the words stand in a random order", word_salad),
    "cut-off": Change("the second half is missing", cut_off),
    "off-topic": Change("the reply speaks of something else", off_topic),
    "empty": Change("nothing is said", empty),
}
"""The taxonomy: what a card's `mode` does to a reply."""
