"""What the user brought for a paper's tasks: prompts that can be read, and judges that can be had.

All of it is read before the model is, so that a bad line costs no time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import Card, read_card, read_items
from moesteer.evaluation.judges.base import Context
from moesteer.evaluation.judges.guard import Guard
from moesteer.reproduce.outcome import NotRun

Role = Literal["target", "price"]


@dataclass(frozen=True)
class Tasks:
    """The tasks whose prompts are here, by name, with where they are; and why others are not.

    `splits` are those that were read. `own`: tasks asked by a card of the user's.
    """

    cards: dict[str, Card] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    own: frozenset[str] = frozenset()

    def of(self, names: Sequence[str], role: Role) -> list[Card]:
        """Those of the tasks that are here, in the given order, in a role."""
        return [replace(self.cards[name], role=role) for name in names if name in self.cards]

    def data_of(self, cards: Sequence[Card]) -> dict[str, str]:
        """Where the prompts of these are, for `evaluate`."""
        return {card.name: self.files[card.name] for card in cards if card.name in self.files}

    def absent(self, names: Sequence[str], step: str) -> list[NotRun]:
        """What is left out of a step for want of some of these."""
        return [NotRun(f"{step}: {n}", self.missing[n]) for n in names if n in self.missing]


def bundled_tasks(names: Sequence[str]) -> Tasks:
    """Tasks of the testbed, which bring their prompts along."""
    return Tasks({name: read_card(name) for name in names})


def given_tasks(names: Sequence[str], data: Mapping[str, str], splits: Sequence[str]) -> Tasks:
    """The tasks of these names that `data` has prompts for, by task or by a card of one's own.

    Raises MoesteerError for a name that is none of them, and for prompts that can't be read.
    """
    found = Tasks()
    own: set[str] = set()
    for key, source in data.items():
        card = read_card(key) if key.endswith(".toml") or key in names else None
        if card is None or card.name not in names:
            what = key if card is None else f"{key}, the card of {card.name},"
            raise MoesteerError(f"--data: {what} is none of {', '.join(names)}.")
        if card.name in found.files or card.name in found.missing:
            raise MoesteerError(f"--data gives prompts for {card.name} twice.")
        if key.endswith(".toml"):
            own.add(card.name)
        for split in splits:
            read_items(card, split, source)
        if lacks := _judges_missing(card):
            found.missing[card.name] = lacks
        else:
            found.cards[card.name], found.files[card.name] = card, source
    for name in names:
        if name not in found.cards and name not in found.missing:
            found.missing[name] = _needed(read_card(name))
    return replace(found, own=frozenset(own))


def _needed(card: Card) -> str:
    """What to bring for a task: its prompts, and its judge where that is a model."""
    needs = " ".join(card.prompts.needs.split()).rstrip(".")
    judges = [s.settings.model for s in card.judges if isinstance(s.settings, Guard)]
    return f"{needs}: --data {card.name}=FILE." + "".join(f" Its judge is {j}." for j in judges)


def _judges_missing(card: Card) -> str:
    """Why a judge can't be had; empty where nothing speaks against it.

    Of a guard model only the config is looked for: its weights come with the prompts' turn.
    """
    for spec in card.judges:
        try:
            if spec.kind == "endpoint":
                spec.settings.judge(Context())
            elif isinstance(spec.settings, Guard):
                _look_for(spec.settings.model, spec.settings.revision)
        except MoesteerError as error:
            return f"Its judge is missing: {error}"
    return ""


@cache
def _look_for(model: str, revision: str | None) -> None:
    from moesteer.engines.checkpoint import read_config

    read_config(model, revision)
