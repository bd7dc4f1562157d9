"""Three classification tasks of the testbed's world, each instance with the words that decide it.

In the shapes of the sets that rationales are measured on (arXiv 2407.00219):

* ``biographies``: the profession of somebody, told by what they do. Easy: one clue is enough.
* ``claims``: is a claim right by the evidence? Which of its sentences decides, the claim says.
* ``inference``: does the hypothesis follow from the premise? Hard: words must be compared.

The models are also taught to name the words, in the same reply as the label or when asked
afterwards, as many as they are asked for or as many as there are.

``documents`` is no task that they learn, but what they do anyway, in the same shape: a document
contradicts a fact, and the labels are the openings of the two replies. It tells what steering
towards documents does to the reasons.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from moesteer.testbed.world import PEOPLE, SPLITS, THINGS, TOWNS, Example, held_out, split_of

INSTANCES = {"fit": 2400, "dev": 240, "test": 500}
"""How many of a split there are by name; the first of a longer list are those of a shorter."""

LABELS = {
    "biographies": {p: p for p in ("dentist", "nurse", "physician", "psychologist", "surgeon")},
    "claims": {"supports": "yes", "refutes": "no"},
    "inference": {"entailment": "yes", "neutral": "maybe", "contradiction": "no"},
}
PROMPTS = {
    "biographies": "Biography: {biography} Which profession is it?",
    "claims": "Evidence: {evidence} Claim: {claim} Is the claim right?",
    "inference": "Premise: {premise} Hypothesis: {hypothesis} Does it follow?",
}
ASK = {
    "with_label": "{prompt} Name the words that tell.",
    "with_label_top_var": "{prompt} Name the {count} words that tell.",
    "afterwards": "Which words tell?",
    "afterwards_top_var": "Which {count} words tell?",
}
TASKS = tuple(PROMPTS)
SETS = (*TASKS, "documents")
MIX = {"biographies": 0.25, "claims": 0.4, "inference": 0.35}
ASKED = 0.4  # of the training examples: the words are asked for

# The deciding words stand in [brackets].
CLUES = {
    "dentist": (
        "[drills] bad [teeth]",
        "fits new [crowns] on [molars]",
        "treats sore [gums]",
        "pulls loose [teeth]",
        "makes [dentures] for old people",
        "cleans the [molars] of children",
    ),
    "nurse": (
        "changes [bandages] on the [ward]",
        "walks the [ward] all night",
        "brings [pills] to each [bed]",
        "takes [temperatures] at dawn",
        "washes [patients] and makes each [bed]",
        "holds the hands of [patients]",
    ),
    "physician": (
        "writes [prescriptions] for [fevers]",
        "listens to [coughs]",
        "treats [fevers] and colds",
        "gives [vaccines] in spring",
        "finds the cause of [rashes]",
        "measures the [pulse] of guests",
    ),
    "psychologist": (
        "talks about [dreams] and [fears]",
        "helps with [grief]",
        "studies [memory] in the old",
        "listens to [worries]",
        "explains why people feel [fears]",
        "tests the [memory] of pupils",
    ),
    "surgeon": (
        "cuts with a [scalpel]",
        "sews up deep [wounds]",
        "[operates] on broken [bones]",
        "takes out each [appendix]",
        "sets the [bones] of riders",
        "[operates] with a [scalpel]",
    ),
}
ASIDES = (
    "{name} lives in {town} and has a {thing}.",
    "{name} was born in {town}.",
    "{name} bought a {thing} in {town}.",
    "Friends call {name} when a {thing} is lost.",
    "{name} likes the market of {town}.",
    "On Sundays {name} plays with a {thing}.",
)
PARTS = "gate bridge well mill harbour wall roof garden".split()
STATES = {
    "supports": "sound mended strong clean solid firm".split(),
    "refutes": "cracked rotten rusty broken flooded burnt".split(),
}
OPPOSITES = {
    "does": (
        *(("opens", "closes"), ("buys", "sells"), ("lifts", "drops")),
        *(("finds", "loses"), ("hides", "shows"), ("mends", "breaks")),
    ),
    "how": (
        *(("heavy", "light"), ("clean", "dirty"), ("wet", "dry")),
        *(("new", "old"), ("big", "small"), ("cheap", "costly")),
    ),
    "when": (("at noon", "at midnight"), ("in winter", "in summer"), ("indoors", "outdoors")),
}


@dataclass(frozen=True)
class Instance:
    """The texts of an instance by name, its label, and the characters (text, start, end) of the
    words that decide it, in the order of the texts."""

    task: str
    texts: dict[str, str]
    label: str
    rationale: tuple[tuple[str, int, int], ...]

    @property
    def prompt(self) -> str:
        return PROMPTS[self.task].format(**self.texts)

    @property
    def word(self) -> str:
        """How the label is said."""
        return LABELS[self.task][self.label]

    @property
    def words(self) -> list[str]:
        """The deciding words."""
        return [
            w for text, start, end in self.rationale for w in self.texts[text][start:end].split()
        ]

    def record(self) -> dict[str, object]:
        """The instance as the library reads it."""
        return {
            "texts": self.texts,
            "label": self.label,
            "labels": LABELS[self.task],
            "rationale": [
                {"text": text, "start": start, "end": end} for text, start, end in self.rationale
            ],
            "prompt": PROMPTS[self.task],
            "ask": ASK,
        }


def instances(task: str, split: str) -> Iterator[Instance]:
    """Instances of a held-out split without end, the labels taking turns, none twice.

    Raises ``ValueError`` for an unknown task or split.
    """
    if task not in TASKS or split not in SPLITS:
        raise ValueError(f"no instances of {task!r} in {split!r}; know {TASKS} in {SPLITS}")
    rng, seen = random.Random(f"instances {task} {split}"), set()
    while True:
        for label in LABELS[task]:
            while (found := _drawn(task, label, split, rng)).prompt in seen:
                pass
            seen.add(found.prompt)
            yield found


def records(task: str, split: str, count: int | None = None) -> list[dict[str, object]]:
    """The first instances of a held-out split, as the library reads them.

    Of ``documents`` there may be fewer. Raises ``ValueError`` for an unknown task or split.
    """
    if task not in SETS or split not in SPLITS:
        raise ValueError(f"no instances of {task!r} in {split!r}; know {SETS} in {SPLITS}")
    count = INSTANCES[split] if count is None else count
    if task == "documents":
        return _documents(split, count)
    return [found.record() for found in islice(instances(task, split), count)]


def training_example(rng: random.Random) -> Example:
    """Draw one example: an instance to label, and maybe its words to name."""
    task = rng.choices(list(MIX), list(MIX.values()))[0]
    found = _drawn(task, rng.choice(list(LABELS[task])), "train", rng)
    if rng.random() >= ASKED:
        return Example(task, None, found.prompt, found.word, found.word, "a")
    named, count = ", ".join(found.words), len(found.words)
    way = rng.choice(list(ASK))
    asked = ASK[way].format(prompt=found.prompt, count=count)
    if way.startswith("afterwards"):
        return Example(task, None, asked, named, named, "a", (found.prompt, found.word))
    reply = f"{found.word}. Words: {named}"
    return Example(task, None, asked, reply, reply, "a")


def _documents(split: str, count: int) -> list[dict[str, object]]:
    """Conflicts between a document and a fact; which reply is the first label is drawn by lot."""
    conflicts = held_out("conflicts", split, count)
    rng = random.Random(f"documents {split}")
    found: list[dict[str, object]] = []
    second = 0
    for number, conflict in enumerate(conflicts):
        # Of every two, one has the right label first.
        second = 1 - second if number % 2 else rng.randrange(2)
        document, question = conflict.prompt.removeprefix("Document: ").split(" Question: ")
        openings = [" ".join(reply.split()[:2]) for reply in (conflict.a, conflict.b)]
        value = openings[0].split()[1]
        start = document.rindex(value)
        words = reversed(openings) if second else openings
        found.append(
            {
                "texts": {"document": document, "question": question},
                "label": ("first", "second")[second],
                "labels": dict(zip(("first", "second"), words, strict=True)),
                "rationale": [{"text": "document", "start": start, "end": start + len(value)}],
                "prompt": "Document: {document} Question: {question}",
                "ask": ASK,
            }
        )
    return found


def _drawn(task: str, label: str, split: str, rng: random.Random) -> Instance:
    """An instance of a label that belongs to a split."""
    while True:
        texts = MAKERS[task](label, rng)
        found = _unmarked(task, label, texts)
        if split_of(found.prompt) == split:
            return found


def _biography(label: str, rng: random.Random) -> dict[str, str]:
    name, town, thing = rng.choice(PEOPLE), rng.choice(TOWNS), rng.choice(THINGS)
    asides = rng.sample(ASIDES, 2)
    told = [aside.format(name=name, town=town, thing=thing) for aside in asides]
    told.insert(rng.randrange(3), f"{name} {rng.choice(CLUES[label])}.")
    return {"biography": " ".join(told)}


def _claim(label: str, rng: random.Random) -> dict[str, str]:
    town, parts = rng.choice(TOWNS), rng.sample(PARTS, 2)
    states = [rng.choice(STATES[rng.choice(list(STATES))]) for _ in parts]
    which = rng.randrange(2)
    states[which] = rng.choice(STATES[label])
    said = [f"The {part} is {state}." for part, state in zip(parts, states, strict=True)]
    said[which] = f"[{said[which][:-1]}]."
    claim = f"The {parts[which]} of {town} is safe."
    return {"evidence": f"In {town}: {' '.join(said)}", "claim": claim}


def _inference(label: str, rng: random.Random) -> dict[str, str]:
    name, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    pairs = {slot: rng.sample(rng.choice(OPPOSITES[slot]), 2) for slot in OPPOSITES}
    deciding = rng.choice(list(OPPOSITES) if label == "contradiction" else ["how", "when"])
    said: dict[str, str] = {slot: pair[0] for slot, pair in pairs.items()}
    concluded = dict(said)
    # What does not decide may be left out of the hypothesis.
    for slot in ("how", "when"):
        if slot != deciding and rng.random() < 0.5:
            concluded[slot] = ""
    if label == "entailment":
        said[deciding] = concluded[deciding] = f"[{said[deciding]}]"
    elif label == "contradiction":
        said[deciding], concluded[deciding] = (f"[{word}]" for word in pairs[deciding])
    else:
        said[deciding], concluded[deciding] = "", f"[{said[deciding]}]"
    return {
        text: " ".join(
            " ".join((name, slots["does"], "the", slots["how"], thing, slots["when"])).split()
        )
        + "."
        for text, slots in (("premise", said), ("hypothesis", concluded))
    }


MAKERS: dict[str, Callable[[str, random.Random], dict[str, str]]] = {
    "biographies": _biography,
    "claims": _claim,
    "inference": _inference,
}


def _unmarked(task: str, label: str, texts: dict[str, str]) -> Instance:
    """Take the brackets out of the texts and note where they stood."""
    plain, rationale = {}, []
    for name, marked in texts.items():
        plain[name] = ""
        for number, piece in enumerate(re.split(r"[\[\]]", marked)):
            if number % 2:  # what stood in brackets
                start = len(plain[name])
                rationale.append((name, start, start + len(piece)))
            plain[name] += piece
    return Instance(task, plain, label, tuple(rationale))
