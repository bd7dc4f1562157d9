"""Rationales by asking: the model names the words that decide, and they are found in the texts.

Two ways of asking (Fayyaz et al. 2024, arXiv 2407.00219), each in the turn of the label or in one
afterwards, where the model's own label stands as its first reply:

* unbound: as many words as the model likes;
* top-var: as many as people marked in this instance.

A reply names words, a rationale is places. A named word is looked for among the words of the texts,
in reading order, and each place is taken once:

1. As it stands, whatever the case. Neighbours that are named together are looked for together
   first ("the wall" is not the first "the"). A word that is named twice takes its second place.
2. What is then left, by its stem ("drilling" is found at "drills"), and counted as inflected.
3. What is still left is not in the texts, or not so often: absent, and counted.

Not read as named words: the label at the beginning of a reply that was to give it, what introduces
the list ("Words:"), its numbers, "and" and "or" between words, what explains a word ("drills: a
dentist does") and what comes after another heading ("Explanation:"). A text's name as a heading
("Premise: …") says which text the words after it are of.

Words explain the label that they are given with. Where label and words come in one reply, the label
that opens it is kept: it may be another than the most probable one, which masking is measured on.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from moesteer.chat import NO_OPTIONS, render_prompt
from moesteer.contrast import Message, located
from moesteer.errors import MoesteerError
from moesteer.rationale.instances import filled
from moesteer.rationale.layout import Laid
from moesteer.rationale.reading import Named
from moesteer.rationale.words import word_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moesteer.engines.base import Engine
    from moesteer.profile import Profile
    from moesteer.rationale.labels import Decision

WAYS = {
    "unbound": "with_label",
    "unbound-two-turn": "afterwards",
    "top-var": "with_label_top_var",
    "top-var-two-turn": "afterwards_top_var",
}
"""What each prompted method asks, by name of `DEFAULT_ASK`."""
PROMPTED = tuple(WAYS)
ONE_TURN = tuple(way for way, ask in WAYS.items() if not ask.startswith("afterwards"))
"""Those where the label is to come in the same reply as the words."""
DEFAULT_ASK = {
    "with_label": (
        "{prompt}\n\nAnswer first. Then write “Words:” and the words of the text above that decide"
        " the answer, as they stand there, separated by commas. Explain nothing."
    ),
    "with_label_top_var": (
        "{prompt}\n\nAnswer first. Then write “Words:” and the {count} words of the text above that"
        " decide the answer, as they stand there, separated by commas. Explain nothing."
    ),
    "afterwards": (
        "Which words of the text above decide your answer? Write them as they stand there,"
        " separated by commas, and nothing else."
    ),
    "afterwards_top_var": (
        "Which {count} words of the text above decide your answer? Write them as they stand there,"
        " separated by commas, and nothing else."
    ),
}
"""How the words are asked for where an instance doesn't say; {prompt} is its prompt, {count} how
many words people marked."""
NEW_TOKENS = 128
"""A reply is cut here, and counted: enough for a sentence or two of words with commas between."""

_INTRODUCTION = re.compile(r"\bwords?\b[^:.,;\n]*:", re.IGNORECASE)
_NUMBER = re.compile(r"(?:^|(?<=,))\s*\(?\d{1,2}[.)](?!\d)(?=\s*\S)")
_COLON = re.compile(r":(?!\d)")
_BETWEEN = ("and", "or")


@dataclass(frozen=True)
class _Place:
    """A word of a text: as it is compared, and the units that it covers."""

    text: str
    word: str
    units: tuple[int, ...]


# -- asking --------------------------------------------------------------------------------------


def ask_rationales(
    engine: "Engine",
    laid: Sequence[Laid],
    decisions: "Sequence[Decision]",
    ways: Sequence[str],
    *,
    profile: "Profile | None" = None,
    chat_options: Mapping[str, object] = NO_OPTIONS,
    plain: bool = False,
    max_new_tokens: int = NEW_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, tuple[tuple[int, ...], Named]]]:
    """The units that the model names for each instance, by way, with what it said; greedily.

    `decisions` are the model's labels under the same `profile`, which the two-turn ways quote.
    `progress` is told how many replies came since the last call. Raises MoesteerError where a way
    is unknown, and where a question and its reply don't fit into the context.
    """
    for way in ways:
        if way not in WAYS:
            raise MoesteerError(
                f"there is no way of asking {way!r}; choose from {', '.join(WAYS)}."
            )
    ask = _asker(engine, chat_options, plain, max_new_tokens)
    labels = [decision.label for decision in decisions]
    asked = [ask(one, label, way) for one, label in zip(laid, labels, strict=True) for way in ways]
    if not asked:
        return [{} for _ in laid]
    replies = iter(
        engine.generate(asked, profile, max_new_tokens=max_new_tokens, progress=progress).replies
    )

    def read(reply: str, one: Laid, way: str) -> tuple[tuple[int, ...], Named]:
        units, named = parse_named(reply, one, _count(one, way), labelled=way in ONE_TURN)
        length = len(engine.tokenizer(reply, add_special_tokens=False)["input_ids"])
        return units, replace(named, cut=length >= max_new_tokens)

    return [{way: read(next(replies), one, way) for way in ways} for one in laid]


def check_askable(
    engine: "Engine",
    laid: Sequence[Laid],
    ways: Sequence[str],
    *,
    chat_options: Mapping[str, object] = NO_OPTIONS,
    plain: bool = False,
    max_new_tokens: int = NEW_TOKENS,
) -> None:
    """Raise now, before hours of work, what `ask_rationales` would, whatever the model's labels."""
    ask = _asker(engine, chat_options, plain, max_new_tokens)
    for one in laid:
        longest = max(one.labels, key=lambda label: len(one.labels[label]))
        for way in ways:
            ask(one, longest, way)


def _asker(
    engine: "Engine", chat_options: Mapping[str, object], plain: bool, max_new_tokens: int
) -> Callable[[Laid, str, str], str]:
    """What gives the text that asks for an instance's words, for its label and a way, and checks
    that it fits into the context with its reply."""
    begins = _beginning(engine.tokenizer) if plain else ""

    def ask(one: Laid, label: str, way: str) -> str:
        with located(one.instance.source):
            turns = question(one, label, way)
            if plain:
                text = begins + _as_plain_text(turns)
            else:
                text = render_prompt(turns, engine.tokenizer, chat_options)
        length = len(engine.tokenizer(text, add_special_tokens=False)["input_ids"])
        if engine.max_tokens is not None and length + max_new_tokens > engine.max_tokens:
            raise MoesteerError(
                f"{one.instance.source}: asking for its words ({way}) takes {length} tokens and the"
                f" reply up to {max_new_tokens}, over the model's context of {engine.max_tokens};"
                " shorten the texts, or take methods that ask nothing."
            )
        return text

    return ask


def question(laid: Laid, label: str, way: str) -> tuple[Message, ...]:
    """What is said up to where the model names its words; `label` is the one that it predicted."""
    instance = laid.instance
    prompt, _ = filled(instance)
    values = {"prompt": prompt, "count": str(words_marked(laid))}
    ask = (DEFAULT_ASK | instance.ask)[WAYS[way]]
    # In one go, so that braces in the prompt's own texts stay.
    asked = Message("user", re.sub(r"\{(prompt|count)\}", lambda found: values[found[1]], ask))
    if way in ONE_TURN:
        return (asked,)
    said = Message("assistant", instance.labels[label].strip())
    return (Message("user", prompt), said, asked)


def words_marked(laid: Laid) -> int:
    """How many words people marked, whatever the units are."""
    human = set(laid.human)
    return sum(not human.isdisjoint(place.units) for place in _places(laid))


def _count(laid: Laid, way: str) -> int | None:
    return words_marked(laid) if WAYS[way].endswith("top_var") else None


def _beginning(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The special tokens that the tokenizer begins a text with."""
    encoded: Any = tokenizer("x", return_special_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    first = [token for token, _ in takewhile(lambda pair: pair[1], pairs)]
    return "".join(tokenizer.convert_ids_to_tokens(first))


def _as_plain_text(turns: Sequence[Message]) -> str:
    """For a base model: the label right after the prompt, where it was read."""
    match turns:
        case (asked,):
            return asked.content
        case (prompt, said, asked):
            between = "" if prompt.content[-1:].isspace() else " "
            return f"{prompt.content}{between}{said.content}\n{asked.content}\n"
    raise AssertionError(f"{len(turns)} turns")


# -- finding the words ---------------------------------------------------------------------------


def parse_named(
    reply: str, laid: Laid, count: int | None, *, labelled: bool = False
) -> tuple[tuple[int, ...], Named]:
    """The units that a reply names, in reading order, and what became of its words.

    `count`: how many words it was asked for, None where that was left to it; those beyond are kept
    and counted. `labelled`: the reply was to begin with the label, which is then told. A reply that
    names nothing gives no units.
    """
    label, listed = _after_label(reply, laid) if labelled else (None, reply)
    places = _places(laid)
    taken: set[int] = set()
    missed: list[tuple[str | None, str]] = []
    words = 0
    for where, together in _named(listed, laid, places):
        start = 0
        while start < len(together):
            run = _longest_run(places, taken, where, together[start:])
            word = together[start]
            start += max(1, len(run))
            if len(run) < 2 and len(together) > 1 and _compared(word) in _BETWEEN:
                continue
            words += max(1, len(run))
            taken.update(run)
            if not run:
                missed.append((where, word))
    absent = []
    for where, word in missed:
        found = _by_stem(places, taken, where, word)
        if found is None:
            absent.append(word)
        else:
            taken.add(found)
    units = {unit for number in taken for unit in places[number].units}
    surplus = 0 if count is None else max(0, words - count)
    inflected = len(missed) - len(absent)
    return tuple(sorted(units)), Named(reply, words, tuple(absent), inflected, surplus, label=label)


def _places(laid: Laid) -> list[_Place]:
    """The words of the texts that have units, in reading order."""
    of_text: dict[str, list[int]] = {}
    for number, unit in enumerate(laid.units):
        of_text.setdefault(unit.text, []).append(number)
    found = []
    for text, numbers in of_text.items():
        whole = laid.instance.texts[text]
        for start, end in word_spans(whole):
            units = tuple(
                number
                for number in numbers
                if laid.units[number].start < end and laid.units[number].end > start
            )
            if units:
                found.append(_Place(text, _compared(whole[start:end]), units))
    return found


def _named(
    reply: str, laid: Laid, places: Sequence[_Place]
) -> Iterator[tuple[str | None, list[str]]]:
    """Words that are named together, and the text that they are said to be of."""
    texts = {_as_heading(name): name for name in laid.instance.texts}
    stems = {_stem(place.word) for place in places}
    where, read = None, False
    introduced = _INTRODUCTION.search(reply)
    for line in re.split(r"[\n;]", reply[introduced.end() :] if introduced else reply):
        line = _NUMBER.sub(" ", line)
        colon = _COLON.search(line)
        if colon:
            heading, rest = line[: colon.start()], line[colon.end() :]
            stand = [
                all(_stem(_compared(word)) in stems for word in together)
                for together in _side_by_side(heading)
            ]
            if _as_heading(heading) in texts:
                where, line = texts[_as_heading(heading)], rest
            elif stand and all(stand):  # words of the texts, explained
                line = heading
            elif not any(stand) and not read:  # an introduction
                line = rest
            elif not any(stand):  # another heading
                return
        for together in _side_by_side(line):
            read = True
            yield where, together


def _side_by_side(line: str) -> Iterator[list[str]]:
    """The words of a line, those together that only white space parts."""
    together, last = [], 0
    for start, end in word_spans(line):
        if together and line[last:start].strip():
            yield together
            together = []
        together.append(line[start:end])
        last = end
    if together:
        yield together


def _as_heading(text: str) -> str:
    return " ".join(_compared(text[start:end]) for start, end in word_spans(text))


def _after_label(reply: str, laid: Laid) -> tuple[str | None, str]:
    """The label whose words open the reply, before any list of words, and what comes after them."""
    introduced = _INTRODUCTION.search(reply)
    opening = reply[: introduced.start()] if introduced else reply
    labels = {name: words.strip() for name, words in laid.instance.labels.items()}
    names = sorted(labels, key=lambda name: len(labels[name]), reverse=True)
    said = "|".join(f"({re.escape(labels[name])})" for name in names)
    found = re.match(rf"\W*(?:\w[\w ]*:\W*)?(?:{said})(?!\w)", opening, re.IGNORECASE)
    if found is None or found.lastindex is None:
        return None, reply
    return names[found.lastindex - 1], reply[found.end() :]


def _longest_run(
    places: Sequence[_Place], taken: set[int], where: str | None, words: Sequence[str]
) -> range:
    """The first free places where most of these words, from the first on, stand side by side."""
    wanted, best = [_compared(word) for word in words], range(0)
    for start, first in enumerate(places):
        if where not in (None, first.text):
            continue
        end = start
        for word, place in zip(wanted, places[start : start + len(wanted)], strict=False):
            if (place.text, place.word) != (first.text, word) or end in taken:
                break
            end += 1
        if end - start > len(best):
            best = range(start, end)
    return best


def _by_stem(places: Sequence[_Place], taken: set[int], where: str | None, word: str) -> int | None:
    """The first free place with a word of the same stem."""
    stem = _stem(_compared(word))
    for number, place in enumerate(places):
        if number not in taken and where in (None, place.text) and _stem(place.word) == stem:
            return number
    return None


def _compared(word: str) -> str:
    """As words are compared: whatever the case, the apostrophe and Markdown's underscores."""
    return word.strip("_").replace("’", "'").casefold()


def _stem(word: str) -> str:
    """What inflected forms of an English word have in common: drill, drills, drilled, drilling.

    Endings that make another word (-er, -ly) stay: a word that is wrongly found is worse than one
    that is counted as absent.
    """
    word = word.removesuffix("'s")
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    for ending in ("ing", "ed"):
        bare = word.removesuffix(ending)
        if bare != word and len(bare) > 2 and any(vowel in bare for vowel in "aeiouy"):
            word = bare
            break
    if len(word) > 3:
        word = word.removesuffix("e")
    if len(word) > 2 and word[-1] == word[-2]:
        word = word[:-1]
    return word[:-1] + "i" if len(word) > 2 and word.endswith("y") else word
