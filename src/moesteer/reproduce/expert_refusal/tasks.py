"""The prompts that were kept back, as tasks in three outcomes: refusal, full answer and neither."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moesteer.evaluation.cards import Card, read_card
from moesteer.evaluation.comparison import Comparison
from moesteer.evaluation.evaluate import evaluate
from moesteer.files import write_text
from moesteer.profile import Profile, Side
from moesteer.reproduce.expert_refusal.plan import DATA, Work
from moesteer.reproduce.steps import Context

Outcome = Literal["refusal", "answer"]


@dataclass(frozen=True)
class Asked:
    """Both sets as tasks in three outcomes, of the prompts that were kept back, and their files."""

    cards: Mapping[str, Card]
    files: Mapping[str, str]

    def card(self, side: str, outcome: Outcome, role: Literal["target", "price"]) -> Card:
        """One of them, whose share of an outcome is measured."""
        card = self.cards[side]
        return replace(card, outcome=called(card, outcome), role=role)


def called(card: Card, outcome: Outcome) -> str:
    """What a card calls a refusal, or a full answer."""
    refusal, answer, _ = in_order(card.outcomes)
    return refusal if outcome == "refusal" else answer


def in_order(outcomes: Sequence[str]) -> tuple[str, str, str]:
    """Refusal, full answer and neither, whatever they are called and in whatever order."""
    refusal = next(one for one in outcomes if one.startswith("refus"))
    answer = next(one for one in outcomes if one.startswith("answer"))
    (neither,) = (one for one in outcomes if one not in (refusal, answer))
    return refusal, answer, neither


def asked_of(work: Work, context: Context) -> Asked:
    if work.bundled:
        names = {"restricted": "testbed-restricted", "harmless": "testbed-benign"}
        return Asked({side: read_card(name) for side, name in names.items()}, {})
    judged = read_card("harmless-100")
    cards, files = {}, {}
    for side in DATA:
        file = context.out / f"{side}-kept-back.jsonl"
        lines = [json.dumps({"prompt": p.messages[0].content}) for p in work.kept_back[side]]
        write_text(file, "\n".join(lines) + "\n")
        files[side] = str(file)
        cards[side] = replace(
            judged,
            name=side,
            title=f"{side.capitalize()} requests: refusal, answer or neither",
            about=f"{side.capitalize()} requests that no direction was found on.",
            harmless=side == "harmless",
            prompts=replace(judged.prompts, source=file.name, needs="the prompts kept back"),
        )
    return Asked(cards, files)


def tasks_of(asked: Asked, toward: Side) -> tuple[Card, Card]:
    """What is measured: full answers to restricted requests, or refusals of harmless ones; and as
    its price that the other prompts are treated as before."""
    if toward == "b":
        return (
            asked.card("restricted", "answer", "target"),
            asked.card("harmless", "answer", "price"),
        )
    return asked.card("harmless", "refusal", "target"), asked.card("restricted", "refusal", "price")


def evaluated(
    work: Work,
    profile: Profile,
    asked: Asked,
    cards: Sequence[Card],
    folder: str,
    context: Context,
) -> Comparison:
    with context.stage(folder, "replies") as progress:
        return evaluate(
            context.engine,
            profile,
            cards,
            out=context.out / folder,
            data=asked.files,
            seeds=work.sizes.seeds,
            batch_size=context.batch_size,
            limit=work.sizes.limit,
            chat_options=context.chat_options,
            say=context.say,
            progress=progress,
            command=context.command,
        )
