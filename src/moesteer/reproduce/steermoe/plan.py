"""What SteerMoE's steps share: which way is steered, on which tasks, with what was brought."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesteer.contrast import ContrastPair
from moesteer.evaluation.search import BUDGET
from moesteer.profile import Side
from moesteer.reproduce.given import Tasks
from moesteer.reproduce.papers import PaperModel, read_paper

PAPER = read_paper("steermoe")

FAITHFULNESS = (
    "mquake",
    "cf-triviaqa",
    "faitheval-counterfactual",
    "faitheval-unanswerable",
    "faitheval-inconsistent",
)
SAFETY = ("tdc2023", "maliciousinstruct", "advbench", "strongreject")
FOR_FAITHFULNESS = ("mctest", "harmless-100", "fluency")
FOR_SAFETY = ("harmless-100", "fluency")
PAIRS = {
    "document": "from lines of document and question (moesteer pairs document)",
    "refusal": "from lines of prompt and reply (moesteer pairs refusal)",
}


@dataclass(frozen=True)
class Aim:
    """Which way is steered: towards a side of a behaviour's pairs, measured on which tasks."""

    key: str
    title: str
    behaviour: str
    toward: Side
    targets: tuple[str, ...]
    prices: tuple[str, ...]

    @property
    def folder(self) -> str:
        return self.title.replace(" ", "-")


AIMS = (
    Aim("faithful", "towards faithful", "document", "a", FAITHFULNESS, FOR_FAITHFULNESS),
    Aim("safe", "towards safe", "refusal", "a", SAFETY, FOR_SAFETY),
    Aim("unsafe", "away from safe", "refusal", "b", SAFETY, FOR_SAFETY),
)
STAND_INS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "document": (("testbed-document",), ("testbed-copying", "testbed-benign", "testbed-fluency")),
    "refusal": (("testbed-restricted",), ("testbed-benign", "testbed-fluency")),
}
"""The testbed's tasks in place of the paper's, by behaviour: targets and prices."""


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each task, controls of each kind, and tries for numbers of experts."""

    limit: int | None = None
    seeds: int = 3
    budget: int = BUDGET


SMALL = Sizes(limit=24, seeds=2, budget=15)
"""For the bundled models."""


@dataclass(frozen=True)
class Work:
    """What all steps share; `known` is the paper's model of this name, if it has one."""

    known: PaperModel | None
    bundled: bool
    sources: Mapping[str, str]
    pairs: Mapping[str, Sequence[ContrastPair]]
    tasks: Tasks
    sizes: Sizes
    aims: tuple[Aim, ...]

    def aim(self, key: str) -> Aim:
        return next(aim for aim in self.aims if aim.key == key)


def lacks(work: Work, behaviour: str, targets: Sequence[str] = ()) -> str:
    """What a step lacks: pairs, or any of the targets; empty where all is here."""
    if behaviour not in work.sources:
        return f"contrast pairs: --pairs {behaviour}=FILE, {PAIRS[behaviour]}."
    if targets and not any(name in work.tasks.cards for name in targets):
        return f"prompts of a task: --data TASK=FILE, of {', '.join(targets)}."
    return ""


def first_here(work: Work, aim: Aim) -> str:
    return next((name for name in aim.targets if name in work.tasks.cards), aim.targets[0])
