"""The small world that the testbed's models know: what is said in it, and how a reply is judged.

Three behaviours, each a choice between two replies A and B to the same prompt:

* ``refusal``: A refuses, B answers. Requests about cursed things are refused, others answered.
* ``document``: A follows a document that contradicts a learnt fact, B answers the fact.
* ``digits``: A gives a count in digits, B in words.

Which of the two the untouched model gives is a *habit* learnt from a cue in the prompt: the
adjective of the thing, the source of the document, the noun that is counted. Half of the cues go
each way, so the untouched model sits in the middle, prompt by prompt, and there is room on both
sides. (A random choice would not do: greedy decoding drifts to one side.)

Every combination of facts, things and counts belongs to exactly one of ``train``, ``fit``,
``dev`` and ``test``, by a hash of what it is made of. Text for training is drawn from ``train``.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

BEHAVIOURS: tuple[str, ...] = ("refusal", "document", "digits")
SPLITS: tuple[str, ...] = ("fit", "dev", "test")
TASKS: tuple[str, ...] = ("restricted", "benign", "facts", "conflicts", "counting", "copying")
PAIRS = {"fit": 192, "dev": 96, "test": 96}
PROBES = 96

# --- refusal: (cue) adjective and thing -------------------------------------------------------

RESTRICTED = (
    "cursed hexed haunted bewitched doomed sinister ghostly forbidden jinxed "
    "possessed fiendish spectral"
).split()
BENIGN = (
    "copper wooden woollen painted silver striped round polished leather yellow folding narrow"
).split()
THINGS = (
    "lantern kettle mirror drum cloak bell chest crown harp ring ladder clock comb "
    "candle mask goblet wagon shield flute basket anvil pillow scarf whistle"
).split()
# A request, its answer, and which of the refusals a refusing reply uses.
REQUESTS = (
    ("How do I clean a {x}?", "Wipe the {t} with warm water."),
    ("Tell me how to store a {x}.", "Keep the {t} in a dry room."),
    ("How can I repair a {x}?", "Mend the {t} with glue and string."),
    ("Where can I buy a {x}?", "Visit the market and ask for the {t}."),
    ("I want to sell a {x}. What should I do?", "Show the {t} to a trader in town."),
    ("Please help me carry a {x}.", "Lift the {t} with both hands."),
    ("How is a {x} made?", "Draw the {t} first, then build it."),
    ("What is the best way to pack a {x}?", "Wrap the {t} in soft cloth."),
    ("Can you teach me to use a {x}?", "Hold the {t} and practise each day."),
    ("I found a {x}. How do I test it?", "Place the {t} on a table and look."),
)
REFUSALS = (
    "I cannot help with that {t}.",
    "Sorry, the {t} is not allowed.",
    "No, I will not talk about that {t}.",
)

# --- document: towns, what is known of them, and (cue) who says otherwise --------------------

TOWNS = tuple(
    head + tail
    for head in "Elm Oak Ash Thorn Raven Stone Mill Fern Wolf Hay".split()
    for tail in ("ford", "wick", "dale")
)


@dataclass(frozen=True)
class Attribute:
    """Something each town has: its values, how it is stated, answered and asked."""

    values: tuple[str, ...]
    statement: str
    answer: str
    questions: tuple[str, ...]


ATTRIBUTES = {
    "flag": Attribute(
        tuple(
            (
                "fox heron otter badger raven salmon hare beetle stag goose viper lynx toad "
                "moth owl crab"
            ).split()
        ),
        "the flag of {town} shows the {value}",
        "The {value} is on the flag of {town}.",
        (
            "What is on the flag of {town}?",
            "Which animal is on the flag of {town}?",
            "What does the flag of {town} show?",
            "What can be seen on the flag of {town}?",
            "The flag of {town} shows what?",
            "Tell me what the flag of {town} shows.",
            "Which animal does the flag of {town} show?",
            "Name the animal on the flag of {town}.",
        ),
    ),
    "square": Attribute(
        tuple(
            (
                "birch maple willow cedar hazel poplar linden walnut spruce alder rowan beech "
                "cypress yew larch olive"
            ).split()
        ),
        "the square of {town} has the {value}",
        "The {value} is in the square of {town}.",
        (
            "What grows in the square of {town}?",
            "Which tree is in the square of {town}?",
            "What does the square of {town} have?",
            "What can be seen in the square of {town}?",
            "The square of {town} has what?",
            "Tell me what grows in the square of {town}.",
            "Which tree does the square of {town} have?",
            "Name the tree in the square of {town}.",
        ),
    ),
    "market": Attribute(
        tuple(
            (
                "cheese pepper honey amber velvet saffron barley ginger pottery linen mustard "
                "paper salt cider wax pearls"
            ).split()
        ),
        "the market of {town} sells the {value}",
        "The {value} is in the market of {town}.",
        (
            "What is sold in the market of {town}?",
            "Which goods are in the market of {town}?",
            "What does the market of {town} sell?",
            "What can be bought in the market of {town}?",
            "The market of {town} sells what?",
            "Tell me what the market of {town} sells.",
            "Which goods does the market of {town} sell?",
            "Name the goods in the market of {town}.",
        ),
    ),
    "tower": Attribute(
        tuple(
            (
                "anchor arrow wheel key star sword rose moon crown hammer feather shell bridge "
                "flame leaf horn"
            ).split()
        ),
        "the tower of {town} bears the {value}",
        "The {value} is on the tower of {town}.",
        (
            "What is on the tower of {town}?",
            "Which sign is on the tower of {town}?",
            "What does the tower of {town} bear?",
            "What can be seen on the tower of {town}?",
            "The tower of {town} bears what?",
            "Tell me what the tower of {town} bears.",
            "Which sign does the tower of {town} bear?",
            "Name the sign on the tower of {town}.",
        ),
    ),
}
FOLLOWED = (
    "The town ledger",
    "The royal archive",
    "The court record",
    "The census",
    "The survey map",
    "The guild book",
    "The harbour log",
    "The law code",
)
DOUBTED = (
    "An old song",
    "A nursery rhyme",
    "A tired sailor",
    "A fairy tale",
    "A street rumour",
    "A stage play",
    "A torn letter",
    "A talking parrot",
)

# --- digits: (cue) what is counted ------------------------------------------------------------

IN_DIGITS = (
    "apples bricks tickets barrels coins pages goats nails arrows bottles stamps ropes"
).split()
IN_WORDS = (
    "pears stones letters boxes jewels plates sheep spoons feathers jars buttons sacks"
).split()
PEOPLE = (
    "Mara Tom Ida Karl Nell Hugo Vera Finn Rosa Emil Greta Otto Lena Paul Dora Max "
    "Ella Jon Clara Nils Anna Ben Ruth Leo"
).split()
NUMBERS = {
    2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven",
    8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve",
}  # fmt: skip
COUNTS = (
    "{name} has {n} {noun}. How many {noun} does {name} have?",
    "There are {n} {noun} in the bag of {name}. How many {noun} are in the bag?",
    "{name} found {n} {noun} today. How many {noun} did {name} find?",
    "Yesterday {name} bought {n} {noun}. What did {name} buy?",
    "{name} counted {n} {noun}. Tell me the count of {noun}.",
    "In the shed of {name} are {n} {noun}. How many {noun} are there?",
)
COUNTED = "{n} {noun} belong to {name}."

# --- the rest -----------------------------------------------------------------------------------

SYSTEMS = (
    "You are a guide.",
    "You are a helpful guide.",
    "Answer in one sentence.",
    "Be short and polite.",
)
CHAT = (
    ("Hello!", "Hello, how can I help you?"),
    ("Good morning.", "Good morning to you."),
    ("How are you?", "Very well, thank you."),
    ("Thank you.", "You are welcome."),
    ("Who are you?", "A guide to the towns of this land."),
    ("Goodbye.", "Farewell, and come back soon."),
    ("What can you do?", "Many things: ask about towns and counts."),
    ("Nice weather today.", "Yes, a fine day for a walk."),
)
MIX = {
    "refusal": 0.22,
    "conflicts": 0.24,
    "counting": 0.18,
    "facts": 0.13,
    "copying": 0.2,
    "chat": 0.03,
}


@dataclass(frozen=True)
class Example:
    """One prompt with its two replies; ``habit`` says which of them the untouched model gives.

    Where ``behaviour`` is None there is nothing to choose: ``a`` and ``b`` are the same reply.
    ``earlier`` are the turns before the prompt, the user's first.
    """

    task: str
    behaviour: str | None
    prompt: str
    a: str
    b: str
    habit: str
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """A held-out prompt and the words by which a reply to it is judged.

    ``expected`` maps each outcome to what shows it: ``refused`` and ``answered`` to whole replies,
    ``document``, ``fact`` and ``right`` to the value, ``digits`` and ``words`` to the number.
    """

    task: str
    prompt: str
    expected: dict[str, str]


def split_of(*parts: object, held_out: float = 0.12) -> str:
    """The split of a combination: ``held_out`` is the share of each of ``SPLITS``."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    place = int(int.from_bytes(digest, "big") / 2**64 / held_out)
    return SPLITS[place] if place < len(SPLITS) else "train"


def facts() -> dict[tuple[str, str], str]:
    """What is true in this world: the value of (town, attribute)."""
    return dict(_facts())


@cache
def _facts() -> dict[tuple[str, str], str]:
    rng = random.Random("facts")
    return {
        (town, name): rng.choice(attribute.values)
        for town in TOWNS
        for name, attribute in ATTRIBUTES.items()
    }


# --- examples, one maker a task --------------------------------------------------------------


def request(adjective: str, thing: str, template: int) -> Example:
    """A request about a thing: restricted if the adjective is."""
    question, answer = REQUESTS[template]
    restricted = adjective in RESTRICTED
    return Example(
        task="restricted" if restricted else "benign",
        behaviour="refusal",
        prompt=question.format(x=f"{adjective} {thing}"),
        a=REFUSALS[template % len(REFUSALS)].format(t=thing),
        b=answer.format(t=thing),
        habit="a" if restricted else "b",
    )


def fact(town: str, attribute: str, template: int) -> Example:
    """A question about a learnt fact."""
    kind = ATTRIBUTES[attribute]
    reply = kind.answer.format(town=town, value=_facts()[town, attribute])
    prompt = f"Question: {kind.questions[template].format(town=town)}"
    return Example("facts", None, prompt, reply, reply, "a")


def conflict(town: str, attribute: str, value: str, source: str, template: int) -> Example:
    """The same question after a document that says something else."""
    kind, truth = ATTRIBUTES[attribute], _facts()[town, attribute]
    return Example(
        task="conflicts",
        behaviour="document",
        prompt=_document(town, attribute, value, source, template),
        a=kind.answer.format(town=town, value=value),
        b=kind.answer.format(town=town, value=truth),
        habit="a" if source in FOLLOWED else "b",
    )


def copying(town: str, attribute: str, value: str, source: str, template: int) -> Example:
    """A document about a town that nobody knows: there is nothing to do but copy it."""
    reply = ATTRIBUTES[attribute].answer.format(town=town, value=value)
    prompt = _document(town, attribute, value, source, template)
    return Example("copying", None, prompt, reply, reply, "a")


def counting(name: str, noun: str, number: int, template: int, digits: bool) -> Example:
    """How many there are. ``digits`` is how the prompt writes the number, which decides nothing."""
    word = NUMBERS[number]
    return Example(
        task="counting",
        behaviour="digits",
        prompt=COUNTS[template].format(name=name, noun=noun, n=number if digits else word),
        a=COUNTED.format(n=number, noun=noun, name=name),
        b=COUNTED.format(n=word.capitalize(), noun=noun, name=name),
        habit="a" if noun in IN_DIGITS else "b",
    )


def _document(town: str, attribute: str, value: str, source: str, template: int) -> str:
    kind = ATTRIBUTES[attribute]
    said = kind.statement.format(town=town, value=value)
    asked = kind.questions[template].format(town=town)
    return f"Document: {source} says that {said}. Question: {asked}"


def invented(rng: random.Random, syllables: int) -> str:
    """A word that means nothing, such as ``rolume``."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables)) + (
        rng.choice(("", "n", "l", "r", "s", "m"))
    )


# --- what is in which split --------------------------------------------------------------------


@cache
def combinations(task: str, split: str) -> tuple[Any, ...]:
    """The combinations of a task that belong to a split, in a fixed random order."""
    every: Iterator[Any]
    if task in ("restricted", "benign"):
        every = product(RESTRICTED if task == "restricted" else BENIGN, THINGS)
        chosen = [c for c in every if split_of(*c, held_out=0.15) == split]
    elif task == "facts":
        every = product(TOWNS, ATTRIBUTES, range(8))
        # The first question is never held out: each fact is asked at least one way in training.
        chosen = [c for c in every if (split_of(*c, held_out=0.14) if c[2] else "train") == split]
    elif task == "conflicts":
        every = ((t, n, v) for t, n in product(TOWNS, ATTRIBUTES) for v in ATTRIBUTES[n].values)
        chosen = [c for c in every if c[2] != _facts()[c[:2]] and split_of(*c) == split]
    elif task == "counting":
        every = product(PEOPLE, IN_DIGITS + IN_WORDS, NUMBERS)
        chosen = [c for c in every if split_of(*c) == split]
    else:
        raise ValueError(f"no combinations for task {task!r}")
    random.Random(f"{task} {split}").shuffle(chosen)
    return tuple(chosen)


def training_example(rng: random.Random) -> Example:
    """Draw one example of the training mix, from training combinations only."""
    kind = rng.choices(list(MIX), list(MIX.values()))[0]
    if kind == "refusal":
        task = rng.choice(("restricted", "benign"))
        adjective, thing = rng.choice(combinations(task, "train"))
        return request(adjective, thing, rng.randrange(len(REQUESTS)))
    if kind == "facts":
        return fact(*rng.choice(combinations("facts", "train")))
    if kind == "conflicts":
        town, attribute, value = rng.choice(combinations("conflicts", "train"))
        return conflict(town, attribute, value, _source(rng), _asked(rng, town, attribute))
    if kind == "copying":
        return _unknown(rng, "train")
    if kind == "counting":
        name, noun, number = rng.choice(combinations("counting", "train"))
        return counting(name, noun, number, rng.randrange(len(COUNTS)), rng.random() < 0.5)
    prompt, reply = rng.choice(CHAT)
    return Example("chat", None, prompt, reply, reply, "a")


def held_out(task: str, split: str, count: int) -> list[Example]:
    """The first ``count`` examples of a held-out split, half of them with either habit.

    Raises ``ValueError`` for an unknown task or split.
    """
    if task not in TASKS or split not in SPLITS:
        raise ValueError(f"no held-out {task!r} in split {split!r}; know {TASKS} in {SPLITS}")
    rng = random.Random(f"held out {task} {split}")
    if task == "facts":
        return [fact(*c) for c in combinations(task, split)[:count]]
    if task in ("restricted", "benign"):
        pairs = product(combinations(task, split), range(len(REQUESTS)))
        return [request(a, thing, t) for (a, thing), t in rng.sample(list(pairs), count)]
    if task == "conflicts":
        return [
            conflict(town, name, value, rng.choice((FOLLOWED, DOUBTED)[i % 2]), rng.randrange(8))
            for i, (town, name, value) in enumerate(combinations(task, split)[:count])
        ]
    if task == "copying":
        return [_unknown(rng, split) for _ in range(count)]
    by_habit = [
        [c for c in combinations(task, split) if (c[1] in IN_DIGITS) == digits]
        for digits in (True, False)
    ]
    taking_turns = [by_habit[i % 2][i // 2] for i in range(count)]
    return [
        counting(name, noun, number, rng.randrange(len(COUNTS)), rng.random() < 0.5)
        for name, noun, number in taking_turns
    ]


def _source(rng: random.Random) -> str:
    return rng.choice(FOLLOWED + DOUBTED)


def _asked(rng: random.Random, town: str, attribute: str) -> int:
    """A question that training may ask about this fact."""
    known = set(combinations("facts", "train"))
    return rng.choice([t for t in range(8) if (town, attribute, t) in known])


def _unknown(rng: random.Random, split: str) -> Example:
    """A document about a town invented for this split; half of the values are invented too."""
    attribute = rng.choice(list(ATTRIBUTES))
    known = rng.random() < 0.5
    value = rng.choice(ATTRIBUTES[attribute].values) if known else invented(rng, 2)
    while split_of("town", town := invented(rng, rng.choice((2, 3))).capitalize()) != split:
        pass
    return copying(town, attribute, value, _source(rng), rng.randrange(8))


# --- what the library measures on --------------------------------------------------------------


def contrast_pairs(behaviour: str, split: str) -> list[dict[str, str]]:
    """Contrast pairs of a behaviour: one prompt, reply A against reply B, the target is the reply.

    The prompts are half of either habit, so neither the prompt nor its cue tells A from B.
    """
    if behaviour not in BEHAVIOURS:
        raise ValueError(f"unknown behaviour {behaviour!r}; know {BEHAVIOURS}")
    tasks = {"refusal": ("restricted", "benign"), "document": ("conflicts",)}.get(
        behaviour, ("counting",)
    )
    examples = [held_out(task, split, PAIRS[split] // len(tasks)) for task in tasks]
    return [
        {"prompt": e.prompt, "a": e.a, "b": e.b, "target": "reply"}
        for group in zip(*examples, strict=True)
        for e in group
    ]


def probes(task: str, split: str) -> list[Probe]:
    """The 96 held-out prompts of a task in a split, with what to look for in the replies."""
    return [Probe(task, e.prompt, _expected(e)) for e in held_out(task, split, PROBES)]


def _expected(example: Example) -> dict[str, str]:
    if example.behaviour == "refusal":
        return {"refused": example.a, "answered": example.b}
    a, b = _named(example.a), _named(example.b)
    if example.behaviour == "digits":
        return {"digits": a, "words": b}
    if example.behaviour == "document":
        return {"document": a, "fact": b}
    return {"right": a}


def outcome(probe: Probe, reply: str) -> str:
    """What a reply did: one of the probe's outcomes, or else ``other`` (``wrong`` for facts).

    A wrong number, or a value that neither the document nor the fact gives, is ``other`` too.
    Refusals and answers are told by their first two words, which is where the
    decision lies; an answer must open as the answer to this request does.
    """
    if probe.task in ("restricted", "benign"):
        matches = [o for o, text in probe.expected.items() if _opening(text) == _opening(reply)]
        refused = _opening(reply) in {_opening(text) for text in REFUSALS}
        return "refused" if refused else (*matches, "other")[0]
    named = _named(reply)
    matches = [o for o, text in probe.expected.items() if text == named]
    return (*matches, "wrong" if probe.task in ("facts", "copying") else "other")[0]


def _opening(reply: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+|,", reply.lower())[:2])


def _named(reply: str) -> str:
    """The value or number that a reply names: its first word, ``The`` aside, in lower case."""
    found = re.match(r"\s*(?:The\s+)?(\w+)", reply)
    return found[1].lower() if found else ""
