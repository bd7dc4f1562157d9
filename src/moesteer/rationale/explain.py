"""The whole road of rationales: instances → labels → rationales → masking → readings → summary.

    run.json          which model, which instances, which settings
    readings.jsonl    a line an instance and arm: label, rationales, what masking them does
    summary.json      accuracy first; then how far people agree, and whether it is faithful

Each instance is read untouched and, where there is a profile, under it and under its controls.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from moesteer.chat import NO_OPTIONS
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.evaluation.comparison import STEERED, UNSTEERED
from moesteer.evaluation.controls import random_control
from moesteer.files import write_text
from moesteer.generate import check_steers
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile
from moesteer.profile_fit import check_model, check_ungated
from moesteer.provenance import about
from moesteer.rationale.attribution import (
    METHODS,
    Pool,
    attribute,
    check_methods,
    random_scores,
    top,
)
from moesteer.rationale.faithfulness import SHARES, Question, counts, measure
from moesteer.rationale.instances import Instance, instances_hash
from moesteer.rationale.labels import Decision, calibration, decide, score_labels
from moesteer.rationale.layout import Laid, UnitKind, lay_out
from moesteer.rationale.masking import Mask, Masking, mask_of
from moesteer.rationale.methods.integrated_gradients import gap_note
from moesteer.rationale.prompting import NEW_TOKENS, PROMPTED, ask_rationales, check_askable
from moesteer.rationale.reading import Choice, Reading
from moesteer.rationale.summary import Summary, summarise
from moesteer.runs import Run, open_run
from moesteer.tally import tally

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

KIND = "rationale"
READINGS = "readings"
SUMMARY = "summary.json"
SAVED = 32
"""Instances that are kept at a time."""


@dataclass(frozen=True)
class Settings:
    """How rationales are made and measured; all of it decides the results.

    methods: names of `METHODS` and `PROMPTED`. seeds: how many random rationales. masking, neutral:
    see `mask_of`. calibrated: labels against what they score without the texts. plain: without a
    chat template. max_new_tokens: of a reply that names words.
    """

    methods: tuple[str, ...]
    unit: UnitKind = "word"
    pool: Pool = "sum"
    masking: Masking = "delete"
    neutral: str = "_"
    calibrated: bool = False
    seeds: int = 3
    shares: tuple[float, ...] = SHARES
    plain: bool = False
    checkpointing: bool = False
    max_new_tokens: int = NEW_TOKENS
    seed: int = 0

    @property
    def attributed(self) -> tuple[str, ...]:
        return tuple(method for method in self.methods if method in METHODS)

    @property
    def prompted(self) -> tuple[str, ...]:
        return tuple(method for method in self.methods if method in PROMPTED)


def explain(
    engine: "Engine",
    instances: Sequence[Instance],
    settings: Settings,
    *,
    out: str | Path,
    arms: Mapping[str, Profile | None] | None = None,
    behaviour: Profile | None = None,
    chat_options: Mapping[str, object] = NO_OPTIONS,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Rationales of every instance in every arm, and what they are worth, kept in the folder `out`.

    `arms`: the profile of each arm by its name, None for the model untouched, which is the only one
    by default. `behaviour`: a profile with scores, for behaviour-routing. An interrupted run is
    taken up. `progress` is told how many instances are read, of how many. Raises MoesteerError
    where an instance, a profile or a method doesn't fit the model.
    """
    arms = {UNSTEERED: None} if arms is None else arms
    for profile in arms.values():  # a text without some of its words might open a gate or not
        check_ungated(profile, "rationale")
    for profile in (*arms.values(), behaviour):
        if profile is not None:
            check_model(profile, engine.facts)
    methods_of(engine, settings.methods, behaviour)
    laid = lay_out(
        instances,
        engine.tokenizer,
        unit=settings.unit,
        plain=settings.plain,
        chat_options=chat_options,
        max_tokens=engine.max_tokens,
    )
    check_askable(
        engine,
        laid,
        settings.prompted,
        chat_options=chat_options,
        plain=settings.plain,
        max_new_tokens=settings.max_new_tokens,
    )
    mask = mask_of(settings.masking, engine.tokenizer, settings.neutral)
    identity = {
        "model": engine.facts.id,
        "model_facts": asdict(engine.facts),
        "instances": instances_hash(instances),
        **asdict(settings),
        "arms": {name: _as_json(profile) for name, profile in arms.items()},
        "behaviour": _as_json(behaviour),
        "chat_options": dict(chat_options),
    }
    with open_run(out, KIND, identity, about(command)) as run:
        readings = {(r.arm, r.item): r for r in readings_of(run)}
        told = tally(progress, len(arms) * len(laid), len(readings))
        told(0)
        for name, profile in arms.items():
            waiting = [n for n in range(len(laid)) if (name, n) not in readings]
            if not waiting:
                continue
            arm = _Arm(name, profile, engine, settings, mask, behaviour, chat_options)
            offsets = _offsets(arm, laid)
            for start in range(0, len(waiting), SAVED):
                numbers = waiting[start : start + SAVED]
                made = _readings(arm, {n: laid[n] for n in numbers}, offsets)
                run.add(READINGS, [asdict(reading) for reading in made])
                readings |= {(name, reading.item): reading for reading in made}
                told(len(numbers))
        ordered = [readings[name, n] for name in arms for n in range(len(laid))]
        for note in _flat(ordered):
            warnings.warn(note, MoesteerWarning, stacklevel=2)
        if note := gap_note([r.source for r in ordered], [r.gap for r in ordered]):
            warnings.warn(note, MoesteerWarning, stacklevel=2)
        result = summarise(ordered, settings.seed)
        write_text(run.folder / SUMMARY, result.to_json() + "\n")
    return result


def readings_of(run: Run) -> list[Reading]:
    """What a run has read so far; MoesteerError, with its place, for a line that is none."""
    from pydantic import TypeAdapter, ValidationError

    form = TypeAdapter(Reading)
    found: dict[tuple[str, int], Reading] = {}
    for number, record in enumerate(run.lines(READINGS), start=1):
        where = f"{run.folder / READINGS}.jsonl:{number}"
        try:
            reading = form.validate_python(record)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise MoesteerError(f"{where}: {place}: {first['msg']}; delete the line.") from None
        if not _whole(reading):
            raise MoesteerError(
                f"{where}: it does not fit its {len(reading.units)} units; delete the line."
            )
        if (reading.arm, reading.item) in found:
            raise MoesteerError(
                f"{where}: instance {reading.item} of the arm {reading.arm} stands there already;"
                " delete the line."
            )
        found[reading.arm, reading.item] = reading
    return list(found.values())


def _whole(reading: Reading) -> bool:
    """Whether it has a number for each unit, and names no others."""
    numbers = (reading.tokens, *reading.scores.values())
    choices = chain(reading.choices.values(), *reading.controls.values())
    named = chain(reading.human, *(choice.units for choice in choices))
    count = len(reading.units)
    return all(len(of) == count for of in numbers) and all(0 <= unit < count for unit in named)


# -- what is asked for ---------------------------------------------------------------------------


def methods_of(
    engine: "Engine", named: Sequence[str] | None, behaviour: Profile | None
) -> tuple[str, ...]:
    """The methods that were named or, without names, all that the model allows but integrated
    gradients, which take a hundred passes where others take one."""
    if named is None:
        left_out = {"integrated-gradients"}
        left_out |= set() if behaviour is not None else {"behaviour-routing"}
        if not engine.facts.layers:
            left_out |= {"gate-x-gradient", "behaviour-routing"}
        return tuple(method for method in (*METHODS, *PROMPTED) if method not in left_out)
    for method in named:
        if method not in METHODS and method not in PROMPTED:
            raise MoesteerError(
                f"there is no method {method!r}; choose from {', '.join((*METHODS, *PROMPTED))}."
            )
    if not named:
        raise MoesteerError("no method is named; leave --methods out to have all.")
    attributed = [method for method in named if method in METHODS]
    check_methods(attributed, bool(engine.facts.layers), behaviour)
    return tuple(dict.fromkeys(named))


def arms_with(
    profile: Profile | None, layers: tuple[LayerShape, ...], controls: int
) -> dict[str, Profile | None]:
    """The model untouched, under the profile, and under so many controls: as many random experts
    of the same layers, or random directions of the same norms."""
    arms: dict[str, Profile | None] = {UNSTEERED: None}
    if profile is not None:
        check_steers(profile)
        arms[STEERED] = profile
        for seed in range(controls):
            arms[f"random {seed}"] = random_control(profile, layers, seed)
    return arms


def _flat(readings: Sequence[Reading]) -> Iterator[str]:
    """A sentence for each method that makes as much of every unit of some instances."""
    for method in dict.fromkeys(method for reading in readings for method in reading.scores):
        of = [reading.scores[method] for reading in readings if method in reading.scores]
        flat = sum(len(scores) > 1 and len(set(scores)) == 1 for scores in of)
        if flat:
            yield (
                f"{method} makes as much of every word in {flat} of {len(of)} readings: its"
                " rationale there is their first words."
            )


def _as_json(profile: Profile | None) -> Any:
    return None if profile is None else json.loads(profile.to_json())


# -- one arm -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arm:
    """What stays the same for all instances of an arm."""

    name: str
    profile: Profile | None
    engine: "Engine"
    settings: Settings
    mask: Mask
    behaviour: Profile | None
    chat_options: Mapping[str, object]


Offsets = Sequence[Float[np.ndarray, " label"] | None]
"""By instance, what is subtracted from its label scores."""
Rationales = dict[str, tuple[int, ...]]
"""By method, the units that it gives."""


def _offsets(arm: _Arm, laid: Sequence[Laid]) -> Offsets:
    if not arm.settings.calibrated:
        return [None] * len(laid)
    return calibration(
        arm.engine, laid, arm.profile, plain=arm.settings.plain, chat_options=arm.chat_options
    )


def _readings(arm: _Arm, laid: Mapping[int, Laid], offsets: Offsets) -> list[Reading]:
    """The readings of some instances, by number."""
    items, settings = list(laid.values()), arm.settings
    own = [offsets[number] for number in laid]
    scores = score_labels(arm.engine, [(one, one.ids) for one in items], arm.profile)
    decisions = [decide(*of) for of in zip(items, scores, own, strict=True)]
    attributed = attribute(
        arm.engine,
        items,
        decisions,
        settings.attributed,
        profile=arm.profile,
        pool=settings.pool,
        mask=arm.mask,
        behaviour=arm.behaviour,
        checkpointing=settings.checkpointing,
    )
    named = ask_rationales(
        arm.engine,
        items,
        decisions,
        settings.prompted,
        profile=arm.profile,
        chat_options=arm.chat_options,
        plain=settings.plain,
        max_new_tokens=settings.max_new_tokens,
    )
    wanted = [
        _rationales(one, of, {way: units for way, (units, _) in said.items()}, settings)
        for one, of, said in zip(items, attributed.scores, named, strict=True)
    ]
    keys = [(at, units) for at, of in enumerate(wanted) for units in of.every()]
    questions = [
        Question(items[at], decisions[at], tuple(sorted(units)), own[at]) for at, units in keys
    ]
    masked = dict(zip(keys, measure(arm.engine, questions, arm.mask, arm.profile), strict=True))
    made = []
    for at, number in enumerate(laid):
        replies = {way: reply for way, (_, reply) in named[at].items()}

        def chosen(units: tuple[int, ...], at: int = at) -> Choice:
            return Choice(units, masked[at, frozenset(units)])

        of = wanted[at]
        made.append(
            Reading(
                **_facts(number, arm, items[at], decisions[at], float(np.exp(scores[at]).sum())),
                scores=of.scores,
                choices={method: chosen(units) for method, units in of.choices.items()},
                curve={
                    method: tuple(chosen(units).masked for units in points)
                    for method, points in of.curve.items()
                },
                shares=settings.shares,
                named=replies,
                controls={way: tuple(map(chosen, drawn)) for way, drawn in of.controls.items()},
                gap=attributed.gaps[at],
            )
        )
    return made


@dataclass(frozen=True)
class _Rationales:
    """The units to be masked in one instance: see `Reading`."""

    scores: dict[str, tuple[float, ...]]
    choices: dict[str, tuple[int, ...]]
    curve: dict[str, list[tuple[int, ...]]]
    controls: dict[str, list[tuple[int, ...]]]

    def every(self) -> list[frozenset[int]]:
        """Each set of units once."""
        several = (*self.curve.values(), *self.controls.values())
        found = [*self.choices.values(), *(units for points in several for units in points)]
        return list(dict.fromkeys(map(frozenset, found)))


def _rationales(
    laid: Laid,
    scores: Mapping[str, tuple[float, ...]],
    named: Mapping[str, tuple[int, ...]],
    settings: Settings,
) -> _Rationales:
    """What an instance's scores and named words come to: the best of each size, random beside."""
    drawn = {f"random {n}": random_scores(laid, settings.seed + n) for n in range(settings.seeds)}
    scored = {**scores, **drawn}
    tokens = [len(unit.tokens) for unit in laid.units]

    def size(units: Sequence[int]) -> int:
        return sum(tokens[unit] for unit in units)

    marked, sizes = size(laid.human), counts(sum(tokens), settings.shares)
    return _Rationales(
        scored,
        {method: top(of, tokens, marked) for method, of in scored.items()} | dict(named),
        {method: [top(of, tokens, of_all) for of_all in sizes] for method, of in scored.items()},
        {
            way: [top(of, tokens, size(units)) for of in drawn.values()]
            for way, units in named.items()
        },
    )


def _facts(number: int, arm: _Arm, laid: Laid, decision: Decision, mass: float) -> dict[str, Any]:
    """What a reading says of its instance and of the model's label."""
    instance = laid.instance
    return {
        "item": number,
        "source": instance.source,
        "arm": arm.name,
        "label": instance.label,
        "predicted": decision.label,
        "probabilities": decision.probabilities,
        "mass": mass,
        "texts": instance.texts,
        "units": tuple((unit.text, unit.start, unit.end) for unit in laid.units),
        "human": laid.human,
        "tokens": tuple(len(unit.tokens) for unit in laid.units),
    }
