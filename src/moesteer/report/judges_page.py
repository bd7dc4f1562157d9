"""What `moesteer tasks` and `moesteer judge check` print."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.evaluation.cards import Card
from moesteer.evaluation.changes import CHANGES
from moesteer.evaluation.judge_check import UNCHANGED, UNJUDGED, JudgeCheck


def tasks_page(cards: Sequence[Card]) -> RenderableType:
    """The tasks there are, a line each."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("task", "value: share of", "role", "judges", "data", "there?"):
        table.add_column(heading, overflow="fold")
    for card in cards:
        table.add_row(
            card.name,
            card.outcome,
            card.role,
            ", ".join(spec.kind for spec in card.judges),
            card.prompts.source,
            Text(data_state(card)),
        )
    ending = "moesteer tasks NAME shows a card, and what its data must hold."
    return Group(table, Text(""), Text(ending))


def data_state(card: Card) -> str:
    """Whether a task's prompts are there, and else what is missing."""
    source = card.prompts.source
    if card.testbed is not None or Path(source).is_file():
        return "yes"
    if "/" not in source or source.endswith((".jsonl", ".csv")):
        return "no such file here"
    if importlib.util.find_spec("datasets") is None:
        return "no: needs moesteer[data]"
    return "data set"


def card_page(card: Card) -> RenderableType:
    """A card, whole."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")

    def row(key: str, value: object) -> None:
        table.add_row(key, Text(str(value)))

    row("name", card.name)
    row("title", card.title)
    row("about", card.about)
    row("outcome", f"{card.outcome} (of {', '.join(card.outcomes)})")
    row("role", card.role)
    row("harmless", "yes" if card.harmless else "no: reports show no replies unless asked")
    row("behaviour", card.behaviour or "–")
    row("reply", f"up to {card.max_new_tokens} tokens")
    row("prompts", f"{card.prompts.source} ({data_state(card)})")
    row("columns", ", ".join(card.prompts.columns.get(name, name) for name in card.columns))
    if card.prompts.system is not None:
        row("system", card.prompts.system)
    row("template", card.prompts.template)
    row("needs", card.prompts.needs)
    for number, spec in enumerate(card.judges, start=1):
        settings = spec.settings.model_dump(exclude_defaults=True)
        row(f"judge {number}", "\n".join([spec.kind, *(f"{k} = {v}" for k, v in settings.items())]))
    if len(card.judges) > 1:
        row("combine", card.combine)
    for change in card.changes:
        becomes = "the outcome stays" if change.to is None else f"becomes {change.to}"
        depends = "; the task depends on it" if change.mode in card.depends_on else ""
        row("change", f"{change.mode} (of {', '.join(change.of)}): {becomes}{depends}")
    return table


def check_page(card: Card, check: JudgeCheck) -> RenderableType:
    """What the judges see, by failure mode, and which outcome they gave where which was due."""
    modes = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("change", "seen", "of", "share", "95 % interval", "", "what it is"):
        modes.add_column(heading, justify="right" if heading in ("seen", "of", "share") else "left")
    for name, mode in check.modes.items():
        modes.add_row(
            name,
            str(mode.seen),
            str(mode.n),
            f"{mode.share:.0%}",
            f"{mode.low:.0%} … {mode.high:.0%}",
            "depends on it" if name in card.depends_on else "",
            "the reply as it was" if name == UNCHANGED else CHANGES[name].about,
        )
    confusion = Table(box=None, header_style="bold", pad_edge=False)
    given = [*card.outcomes, UNJUDGED]
    confusion.add_column("due \\ given")
    for outcome in given:
        confusion.add_column(outcome, justify="right")
    for due, counts in check.confusion.items():
        confusion.add_row(due, *(str(counts[outcome]) for outcome in given))
    cost = f"{check.seconds:.1f} s"
    if check.calls:
        cost += f", {check.calls:,} calls, {check.tokens:,} tokens"
    head = f"{card.name}: {check.judge}, on gold {check.gold}; {cost}"
    return Group(Text(head, style="bold"), modes, Text(""), confusion)
