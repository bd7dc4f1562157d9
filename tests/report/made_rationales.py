"""Rationales made by hand, without a model: readings, and the folders of their runs."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesteer.rationale.faithfulness import SHARES
from moesteer.rationale.reading import Choice, Masked, Named, Reading
from moesteer.rationale.summary import summarise
from moesteer.runs import open_run

ABOUT = {"command": "moesteer rationale made", "versions": {"moesteer": "0"}, "date": "2026-01-01"}
LABELS = ("entailment", "neutral", "contradiction")
TEXTS = (
    ("A man in a blue shirt is playing an old guitar on the street.", "A man makes music."),
    ("Two children run after a small dog on the wet beach.", "The children are asleep."),
    ("A woman reads a long book in the park, near the fountain.", "A woman reads a novel."),
)
MARKED = {"playing", "guitar", "music", "run", "asleep", "reads", "book", "novel"}
SKILL = {
    "attention-mean": 0.3,
    "saliency-l2": 0.6,
    "input-x-gradient": 1.0,
    "integrated-gradients": 1.3,
    "occlusion": 2.0,
    "gate-x-gradient": 0.9,
}
"""By method: how far its scores rise on words that people marked, and so what masking does."""


def readings(
    items: int = 30,
    *,
    arms: Sequence[str] = ("unsteered",),
    right: float = 0.8,
    skill: float = 1.0,
    seed: int = 0,
) -> list[Reading]:
    """Instances of two texts each, labelled rightly as often as `right`; the first one rightly."""
    draw = random.Random(seed)
    return [
        _reading(item, arm, draw, right, skill * (1.4 if arm == "steered" else 1.0))
        for arm in arms
        for item in range(items)
    ]


def _reading(item: int, arm: str, draw: random.Random, right: float, skill: float) -> Reading:
    premise, hypothesis = TEXTS[item % len(TEXTS)]
    texts = {"premise": premise, "hypothesis": hypothesis}
    units = tuple(
        (name, found.start(), found.end())
        for name, text in texts.items()
        for found in re.finditer(r"\w+", text)
    )
    words = [texts[name][start:end] for name, start, end in units]
    human = tuple(number for number, word in enumerate(words) if word in MARKED)
    label = LABELS[item % 3]
    others = [other for other in LABELS if other != label]
    predicted = label if item == 0 or draw.random() < right else draw.choice(others)
    scores = {
        method: tuple(
            draw.gauss(0, 1) + skill * rise * (number in human) for number in range(len(units))
        )
        for method, rise in SKILL.items()
    }
    scores |= {f"random {number}": tuple(draw.random() for _ in units) for number in range(2)}

    def choice(chosen: Sequence[int], rise: float, share: float = 0.2) -> Choice:
        hit = len(set(chosen) & set(human)) / len(human)
        flipped = draw.random() < 0.1 + 0.25 * rise * hit + share / 2
        change = 0.05 + 0.2 * rise * hit + share / 2 + draw.gauss(0, 0.05)
        return Choice(tuple(sorted(chosen)), Masked(float(flipped), change, 0.6 - change))

    def first(method: str, count: int) -> list[int]:
        return sorted(range(len(units)), key=lambda unit: -scores[method][unit])[:count]

    rises = {method: skill * SKILL.get(method, 0.0) for method in scores}
    choices = {method: choice(first(method, len(human)), rise) for method, rise in rises.items()}
    said = [*human[: draw.randrange(len(human) + 1)], draw.randrange(len(units))]
    choices["unbound"] = choice(sorted(set(said)), 0.6)
    wrong = next(name for name in LABELS if name != predicted)
    opens = {1: wrong, 2: None}.get(item, predicted)
    named = Named("yes, by: …", len(said) + 1, ("sky",), 1, 0, cut=item == 3, label=opens)
    return Reading(
        item=item,
        source=f"made.jsonl:{item + 1}",
        arm=arm,
        label=label,
        predicted=predicted,
        probabilities={name: 0.7 if name == predicted else 0.15 for name in LABELS},
        mass=0.9,
        texts=texts,
        units=units,
        human=human,
        tokens=tuple(1 + (len(word) > 6) for word in words),
        scores=scores,
        choices=choices,
        curve={
            method: tuple(
                choice(first(method, max(1, round(share * len(units)))), rise, share).masked
                for share in SHARES
            )
            for method, rise in rises.items()
        },
        shares=SHARES,
        named={"unbound": named},
        controls={
            "unbound": tuple(
                choice(draw.sample(range(len(units)), len(set(said))), 0.0) for _ in range(2)
            )
        },
    )


def rationale_run(folder: Path, model_facts: dict[str, Any], **kind: Any) -> Path:
    """A finished run of `rationale`; `kind` is passed on to `readings`."""
    made = readings(**kind)
    settings = {"model_facts": model_facts, "masking": "delete", "unit": "word"}
    with open_run(folder, "rationale", settings, ABOUT) as run:
        run.add("readings", [asdict(reading) for reading in made])
        (folder / "summary.json").write_text(summarise(made).to_json(), encoding="utf-8")
    return folder


def finetune_run(folder: Path, model_facts: dict[str, Any], epochs: int = 3) -> Path:
    """A run of `rationale finetune` that gets better from epoch to epoch."""
    with open_run(folder, "rationale finetune", {"model_facts": model_facts}, ABOUT) as run:
        for epoch in range(epochs + 1):
            share = epoch / epochs
            made = readings(40, right=0.35 + 0.5 * share, skill=0.3 + share, seed=epoch)
            summary = json.loads(summarise(made).to_json())
            run.add("epochs", [{"epoch": epoch, "summary": summary}])
    return folder
