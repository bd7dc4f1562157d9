"""What the steps of expert-aware refusal steering share: prompts by side, sizes, and methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesteer.evaluation.direction_choices import Method
from moesteer.evaluation.direction_search import BUDGET
from moesteer.generate import Prompt
from moesteer.profile import Side
from moesteer.reproduce.papers import read_paper

PAPER = read_paper("expert-refusal")
SEED = 0
DATA = ("restricted", "harmless")
WAYS: tuple[tuple[str, Side], ...] = (("away from refusal", "b"), ("towards refusal", "a"))
METHODS: dict[Method, str] = {"one": "a single expert", "two": "all kept experts of a layer"}


@dataclass(frozen=True)
class Sizes:
    """Prompts a side to fit on and to choose on; prompts measured; controls; choices judged."""

    fit: int = PAPER.number("fit")
    validate: int = PAPER.number("validate")
    limit: int | None = None
    seeds: int = 3
    budget: int = BUDGET


SMALL = Sizes(fit=64, validate=24, limit=24, seeds=2, budget=6)
"""For the bundled models."""


@dataclass(frozen=True)
class Work:
    """What all steps share: prompts to find directions on, and those kept back, by side.

    `threshold`: percentage points by which an expert's routing must differ.
    """

    bundled: bool
    found_on: Mapping[str, Sequence[Prompt]]
    kept_back: Mapping[str, Sequence[Prompt]]
    sizes: Sizes
    threshold: float


def folder_of(way: str, method: Method) -> str:
    return f"{way.replace(' ', '-')}-method-{method}"
