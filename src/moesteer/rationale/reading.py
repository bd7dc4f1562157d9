"""What was found out of one instance: the model's label, rationales, and what masking them does."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Masked:
    """What became of the predicted label when units were masked.

    flipped: 1 where another label is predicted without them, else 0 (a mean over seeds of random
    units may lie between). comprehensiveness: how much less probable the label is without them;
    sufficiency: how much less probable with nothing but them.
    """

    flipped: float
    comprehensiveness: float
    sufficiency: float


@dataclass(frozen=True)
class Choice:
    """The units that a method gives as its rationale, by number."""

    units: tuple[int, ...]
    masked: Masked


@dataclass(frozen=True)
class Named:
    """What the model said when it was asked for the words.

    words: how many it named; absent: those that are not in the texts; inflected: how many were
    found by their stem only; surplus: how many went beyond the number that it was asked for. cut:
    whether the reply is as long as it was allowed to be. label: the one whose words open the reply,
    where it was to give label and words; None where no label does.
    """

    reply: str
    words: int
    absent: tuple[str, ...] = ()
    inflected: int = 0
    surplus: int = 0
    cut: bool = False
    label: str | None = None


@dataclass(frozen=True)
class Reading:
    """One instance under one arm (`unsteered`, `steered`).

    probabilities: of each label among the labels; mass: of all of them together as the reply.
    units: (text, start, end) of each; human: the numbers of those that people marked. By method:
    `scores` a number for each unit (attributed methods and `random N`); `choices` the rationale, of
    about as many tokens as people marked or, for a prompted method, the units that the model named;
    `curve` what masking does at each share of `shares` of the tokens, best units first. By prompted
    method: `named`, and `controls`: random units, of about as many tokens as were named.
    """

    item: int
    source: str
    arm: str
    label: str
    predicted: str
    probabilities: dict[str, float]
    mass: float
    texts: dict[str, str]
    units: tuple[tuple[str, int, int], ...]
    human: tuple[int, ...]
    tokens: tuple[int, ...]
    """How many tokens each unit has."""
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    curve: dict[str, tuple[Masked, ...]] = field(default_factory=dict)
    shares: tuple[float, ...] = ()
    named: dict[str, Named] = field(default_factory=dict)
    controls: dict[str, tuple[Choice, ...]] = field(default_factory=dict)
    gap: float | None = None
    """How far integrated gradients miss their sum, relative to it."""
