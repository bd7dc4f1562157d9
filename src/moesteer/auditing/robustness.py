"""The robustness curve: what is left of a behaviour when its k most important experts are lost.

Intuition: experts stand in for each other, so that small effects alone may hide a large one
together. The experts are lost in the order of their importance, which was measured on other texts,
and at each number k the replies to held-out prompts are judged. What falls may be the behaviour or
the whole model; so beside the curve stand the price at the same k, as many random experts of the
same layers, and as many of those whose loss moved the decision least.

    k50    the smallest number measured at which the share is at most half of the intact model's;
           interval: percentiles over resampled prompts, open where the share doesn't fall so far
    area   mean over k of the share with random experts lost minus that with the important ones
           (trapezoids between the numbers, divided by the largest): from −1 to 1; interval: paired
           bootstrap over prompts

Random sets are nested as the important ones are: a seed's set for k + 1 holds its set for k. What
is claimed at a number follows the rules of every evaluation, for which the intact model is the
unsteered arm and the loss of the important experts the steered one.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

from moesteer.auditing.importance import Importance
from moesteer.detection.significance import RESAMPLES
from moesteer.evaluation.comparison import (
    STEERED,
    UNSTEERED,
    Comparison,
)
from moesteer.evaluation.controls import room_down, that_fit
from moesteer.model_facts import LayerShape
from moesteer.profile import Expert, Profile
from moesteer.statistics.intervals import mean_interval, percentile_interval, resampled

INTACT = "intact"


@dataclass(frozen=True)
class Point:
    """The `lost` most important experts are lost: beside the intact model ("unsteered"), as many
    random ones of the same layers, and as many of the least important."""

    lost: int
    comparison: Comparison


@dataclass(frozen=True)
class Halved:
    """At which number the share has fallen by half; None: at none that was measured."""

    value: int | None
    low: int | None
    high: int | None


@dataclass(frozen=True)
class Area:
    """The area between the curves of random and of important experts, up to `most` lost."""

    most: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Losses:
    """Who is lost, in what order: the important experts, random ones by seed, the least important.

    A list ends where no layer can lose more; `notes` say so.
    """

    important: tuple[Expert, ...]
    randomly: tuple[tuple[Expert, ...], ...]
    least: tuple[Expert, ...]
    notes: tuple[str, ...]


def numbers_up_to(most: int, *more: int) -> list[int]:
    """1, 2, 3, 5, 8, … up to `most`, which is one of them, as are those of `more` that are not
    above it."""
    numbers, a, b = {n for n in (most, *more) if 1 <= n <= most}, 1, 2
    while a <= most:
        numbers.add(a)
        a, b = b, a + b
    return sorted(numbers)


def losses(importance: Importance, layers: tuple[LayerShape, ...], most: int, seeds: int) -> Losses:
    """The order in which experts are lost, each at most `most` of them.

    Experts whose loss takes nothing away are not important; a layer always keeps k.
    """
    ranked = [expert.place for expert in importance.experts if expert.effect > 0]
    important = that_fit(ranked, layers, room_down, most)
    notes = []
    reached = ranked[: ranked.index(important[-1])] if important else []
    if passed := [place for place in reached if place not in important]:
        where = ", ".join(str(layer) for layer in sorted({layer for layer, _ in passed}))
        notes.append(
            f"{'; '.join(map(str, passed))}: kept, and the next taken, as layers {where} can't lose"
            " more: a token selects k of a layer's experts."
        )
    if len(important) < most:
        notes.append(
            f"the curve ends at {len(important)} lost experts: no other is left whose loss takes"
            " anything away."
        )
    by_size = sorted(importance.experts, key=lambda e: (abs(e.effect), e.place))
    rest = [expert.place for expert in by_size if expert.place not in important]
    randomly = tuple(others_alike(important, layers, important, seed) for seed in range(seeds))
    if randomly and len(randomly[0]) < len(important):
        notes.append(
            f"beyond {len(randomly[0])} lost experts there are no random ones beside them: their"
            " layers have too few others."
        )
    least = that_fit(rest, layers, room_down, len(important))
    return Losses(tuple(important), randomly, tuple(least), tuple(notes))


def others_alike(
    experts: Sequence[Expert],
    layers: tuple[LayerShape, ...],
    taken: Sequence[Expert],
    seed: int,
) -> tuple[Expert, ...]:
    """For each expert in turn a random one of its layer, none of them `taken`; up to the first
    whose layer has no other left."""
    generator = random.Random(seed)
    waiting = {}
    for shape in layers:
        others = sorted({(shape.layer, e) for e in range(shape.experts)} - {*taken})
        waiting[shape.layer] = generator.sample(others, len(others))
    found = []
    for layer, _ in experts:
        if not waiting[layer]:
            break
        found.append(waiting[layer].pop())
    return tuple(found)


def arms_of_losses(
    order: Losses, numbers: Sequence[int]
) -> dict[int, dict[str, tuple[str, Profile | None]]]:
    """By number lost: which role (unsteered, steered, random 0, …) is which arm of the run, by name
    and profile; without those of whom there are too few."""
    found = {}
    for number in numbers:
        arms: dict[str, tuple[str, Profile | None]] = {UNSTEERED: (INTACT, None)}
        sets = {STEERED: (lost_words(number), order.important)}
        sets |= {
            f"random {seed}": (f"{number} random lost (seed {seed})", lost)
            for seed, lost in enumerate(order.randomly)
        }
        sets["bottom"] = (lost_words(number, "least"), order.least)
        for role, (name, lost) in sets.items():
            if len(lost) >= number:
                arms[role] = (name, losing(lost[:number], name))
        found[number] = arms
    return found


def losing(experts: Sequence[Expert], name: str) -> Profile:
    """The profile under which these experts are lost."""
    return Profile(deactivated=tuple(sorted(experts)), toward="b", name=name)


def lost_words(number: int, end: Literal["most", "least"] = "most") -> str:
    """Whose loss it is, in words."""
    if number == 1:
        return f"the {end} important expert lost"
    return f"the {number} {end} important experts lost"


# -- the curve in numbers ------------------------------------------------------------------------


def halved(
    intact: Bool[np.ndarray, " prompt"],
    lost: Mapping[int, Bool[np.ndarray, " prompt"]],
    *,
    seed: int = 0,
) -> Halved:
    """k50 of the outcomes on the same prompts, intact and by number lost; see the file's head."""
    numbers = np.array([*sorted(lost), np.inf])
    hits = np.stack([intact, *(lost[int(n)] for n in numbers[:-1])]).astype(np.int64)
    prompts = len(intact)
    if not prompts or not intact.any():
        return Halved(None, None, None)

    def first(counts: np.ndarray) -> np.ndarray:
        """The number of each column of counts, of which the first row is the intact model's."""
        fallen = (2 * counts[1:] <= counts[:1]) & (counts[:1] > 0)
        last = np.ones((1, counts.shape[1]), dtype=bool)
        return numbers[np.concatenate([fallen, last]).argmax(0)]

    draws = resampled(prompts, RESAMPLES, np.random.default_rng(seed))
    low, high = percentile_interval(first(hits @ draws.T), method="inverted_cdf")
    value = first(hits.sum(1, keepdims=True))[0]
    return Halved(*(int(n) if math.isfinite(n) else None for n in (value, low, high)))


def area_between(
    important: Mapping[int, Bool[np.ndarray, " prompt"]],
    randomly: Mapping[int, Bool[np.ndarray, "seed prompt"]],
    *,
    seed: int = 0,
) -> Area | None:
    """The area between the curves over the same prompts, by number lost; None without random ones.

    Where nothing is lost the curves meet.
    """
    numbers = sorted(important.keys() & randomly.keys())
    if not numbers or not randomly[numbers[0]].size:
        return None
    gaps = [randomly[n].mean(0) - important[n] for n in numbers]
    heights = np.stack([np.zeros_like(gaps[0]), *gaps])
    by_prompt = np.asarray(np.trapezoid(heights, [0, *numbers], axis=0) / numbers[-1])
    low, high = mean_interval(by_prompt, seed=seed)
    return Area(numbers[-1], float(by_prompt.mean()), low, high)
