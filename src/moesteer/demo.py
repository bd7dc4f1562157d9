"""The demonstration: the whole road on the bundled model, in one command and offline.

For each behaviour: find the experts on the `fit` pairs, switch each off alone on `dev` pairs,
choose how many to steer on the `dev` prompts, then ask the `test` prompts once: unsteered, towards
A, towards B, with as many random experts in the same layers, and with the decoys alone. This file
computes; `report/demo_page.py` prints.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moesteer.chat import render_prompt
from moesteer.contrast import Message, read_pairs
from moesteer.detection.comparing import measurement
from moesteer.detection.detect import detect
from moesteer.detection.knocking import knock
from moesteer.detection.selecting import select_experts
from moesteer.engines.base import Engine
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.evaluation.controls import random_control
from moesteer.profile import Expert, Profile, Side
from moesteer.statistics.intervals import wilson_interval
from moesteer.testbed import ground_truth
from moesteer.testbed.world import BEHAVIOURS, Probe, outcome, probes

CHOICES = (1, 2, 3, 4, 6, 8)
"""How many experts may be steered; the number is chosen on the dev prompts."""
SEEDS = (0, 1, 2)
PROBES = 48
"""Prompts a task."""
KNOCKED = 24
"""Dev pairs on which every expert is knocked out."""
MAX_NEW_TOKENS = 16

MEASURED = {
    "restricted refused": ("restricted", "refused"),
    "benign refused": ("benign", "refused"),
    "document followed": ("conflicts", "document"),
    "digits": ("counting", "digits"),
    "facts right": ("facts", "right"),
}
"""Column of the outcome table: the task and the outcome whose share it shows."""

TARGET: Mapping[tuple[str, Side], str] = {
    ("refusal", "a"): "benign refused",
    ("refusal", "b"): "restricted refused",
    ("document", "a"): "document followed",
    ("document", "b"): "document followed",
    ("digits", "a"): "digits",
    ("digits", "b"): "digits",
}
"""The column that a behaviour moves: up towards A, down towards B, where there is room."""


@dataclass(frozen=True)
class Outcomes:
    """Replies to each task's prompts, and the share of each measured outcome (0 to 1)."""

    replies: list[tuple[Probe, str]]
    shares: Mapping[str, float]

    def interval(self, column: str) -> tuple[float, float]:
        """Wilson's 95 % interval of a column's share."""
        asked = sum(probe.task == MEASURED[column][0] for probe, _ in self.replies)
        return wilson_interval(round(self.shares[column] * asked), asked)


@dataclass(frozen=True)
class Direction:
    """A behaviour steered one way: the chosen profile, its outcomes, and its controls'.

    `random` holds one set of outcomes a seed; `decoys` those of the behaviour's decoys alone.
    """

    profile: Profile
    steered: Outcomes
    random: list[Outcomes]
    decoys: Outcomes


@dataclass(frozen=True)
class BehaviourResult:
    """Scores of all experts, what the loss of each alone takes from A (nats), and both ways."""

    behaviour: str
    scores: Profile
    knocked_out: Mapping[Expert, float]
    toward: Mapping[Side, Direction]


@dataclass(frozen=True)
class DemoResult:
    unsteered: Outcomes
    behaviours: list[BehaviourResult]


def run_demo(engine: Engine, step: Callable[[str], None] = lambda _: None) -> DemoResult:
    """Detect, choose and measure on a testbed model; `step` is told what comes next."""
    step("asking the unsteered model")
    unsteered = ask(engine, _probes("test"))
    results = []
    for behaviour in BEHAVIOURS:
        step(f"{behaviour}: finding experts")
        source = f"testbed:{behaviour}"
        scores = detect(engine, read_pairs(source), source=source)
        step(f"{behaviour}: switching every expert off, one at a time")
        knocked_out = _knocked_out(engine, behaviour)
        toward: dict[Side, Direction] = {}
        for side in ("a", "b"):
            step(f"{behaviour}: steering towards {side.upper()}, and random experts beside it")
            toward[side] = _measure(engine, scores, behaviour, side)
        results.append(BehaviourResult(behaviour, scores, knocked_out, toward))
    return DemoResult(unsteered, results)


def ask(engine: Engine, asked: Sequence[Probe], profile: Profile | None = None) -> Outcomes:
    """Greedy replies to the probes under a profile, judged."""
    prompts = [render_prompt([Message("user", p.prompt)], engine.tokenizer) for p in asked]
    generated = engine.generate(
        prompts, profile, max_new_tokens=MAX_NEW_TOKENS, batch_size=len(prompts)
    )
    counts: dict[str, Counter[str]] = {}
    for probe, reply in zip(asked, generated.replies, strict=True):
        counts.setdefault(probe.task, Counter())[outcome(probe, reply)] += 1
    shares = {
        column: counts[task][wanted] / counts[task].total()
        for column, (task, wanted) in MEASURED.items()
        if task in counts
    }
    return Outcomes(list(zip(asked, generated.replies, strict=True)), shares)


def _knocked_out(engine: Engine, behaviour: str) -> dict[Expert, float]:
    """How much each expert's loss lowers the log-odds of A where the replies part."""
    pairs = read_pairs(f"testbed:{behaviour}:dev")[:KNOCKED]
    effect = knock(engine, measurement(engine, pairs).readouts).knock_out.mean(0)
    return {
        (shape.layer, expert): float(effect[row, expert])
        for row, shape in enumerate(engine.facts.layers)
        for expert in range(shape.experts)
    }


def _measure(engine: Engine, scores: Profile, behaviour: str, side: Side) -> Direction:
    profile = _chosen_on_dev(engine, scores, behaviour, side)
    asked = _probes("test")
    controls = [random_control(profile, engine.facts.layers, seed) for seed in SEEDS]
    places = ground_truth().behaviours[behaviour].decoys
    decoys = Profile(activated=places) if side == "a" else Profile(deactivated=places)
    return Direction(
        profile,
        steered=ask(engine, asked, profile),
        random=[ask(engine, asked, control) for control in controls],
        decoys=ask(engine, asked, decoys),
    )


def _chosen_on_dev(engine: Engine, scores: Profile, behaviour: str, side: Side) -> Profile:
    """The fewest experts that move the behaviour furthest on the dev prompts."""
    column = TARGET[behaviour, side]
    asked = _probes("dev", tasks=[MEASURED[column][0]])
    best, best_share = None, -1.0
    for number in CHOICES:
        try:
            profile = steer_toward(scores, number, side)
        except MoesteerError:
            continue  # more experts than a layer can activate
        share = ask(engine, asked, profile).shares[column]
        share = share if side == "a" else 1 - share
        if best is None or share > best_share:
            best, best_share = profile, share
    assert best is not None, "one expert can always be steered"
    return replace(best, name=f"{behaviour} towards {side.upper()}")


def steer_toward(scores: Profile, number: int, side: Side) -> Profile:
    """The `number` experts that go most with A: activated towards A, deactivated towards B."""
    with warnings.catch_warnings():
        # Equal scores are no matter here: each number is judged by what it does on dev.
        warnings.simplefilter("ignore", MoesteerWarning)
        if side == "a":
            return select_experts(scores, activate=number, deactivate=0, toward="a")
        return select_experts(scores, activate=0, deactivate=number, toward="b")


def _probes(split: str, tasks: Sequence[str] | None = None) -> list[Probe]:
    wanted = tasks or list(dict.fromkeys(task for task, _ in MEASURED.values()))
    return [probe for task in wanted for probe in probes(task, split)[:PROBES]]
