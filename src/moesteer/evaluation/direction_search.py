"""Which direction, where and how strongly: found on dev in two stages, measured on test.

There are many choices, position × layer × coefficient of the residual stream or position × expert ×
coefficient, and judged replies are dear. So all choices are tried by what a prompt's last token
tells, and only the best are let to speak:

    stage 1   the mean refusal score of the target's prompts; from the best downwards, those that
              leave the next token of other prompts within a KL, until there are `budget` of them
    stage 2   of these, the one with the largest share of the target's outcome among judged replies
              (25 prompts, 25 tokens), within limits on the price
    test      that one, once, beside its controls

Of experts, those are tried whose routing differs between the sides: one at a time (method one), and
all of a layer together (method two). Looking at many choices finds something in noise, too. So the
same search, with as many tries, goes over experts below the routing threshold, of the same layers,
or over random vectors of the same norms where the direction is of the residual stream: the
search-matched control (Marbut, Olson, Wheeler 2026, arXiv 2606.04160).
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moesteer.direction import Candidates, Kind
from moesteer.directions.aiming import Aim, aimed
from moesteer.directions.prompts import AskedPrompt
from moesteer.directions.refusal import refusal_scores
from moesteer.directions.selection import mean_kl
from moesteer.directions.writers import refusal_tokens_of
from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import Card
from moesteer.evaluation.comparison import Comparison, from_json
from moesteer.evaluation.direction_controls import below_threshold, over_threshold, random_vector
from moesteer.evaluation.evaluate import (
    SUMMARY,
    Asked,
    check_numbers,
    check_tasks,
    evaluate,
    identity,
    prepare,
    with_prices,
)
from moesteer.evaluation.judging import judge_replies
from moesteer.files import write_text
from moesteer.profile import Expert, Profile, Side, check_model
from moesteer.provenance import about
from moesteer.runs import Run, open_run

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

KIND = "direction search"
SEARCH_SCHEMA = 1
BEST = "best.safetensors"
BUDGET = 8
"""Choices of one search whose replies are judged."""
PROMPTS, TOKENS = 25, 25
"""Of each task on dev: so many prompts, and replies no longer than this."""
MAX_KL = 1.0
OTHERS = 10
"""Experts below the routing threshold in a search-matched control."""
RESIDUAL = (0.25, 0.5, 1.0, 2.0, 4.0)
WEIGHTED = (1.0, 2.4, 5.5, 13.0, 31.0, 72.0, 170.0, 400.0)
"""Coefficients of a vector of the residual stream, and of one weighted by a router's probability,
which is small."""
TOGETHER = 64
"""Choices whose scores are read, and written, together."""

Method = Literal["one", "two"]


@dataclass(frozen=True)
class Choice:
    """A candidate with its coefficient; `experts`: none, one, or all that are kept of a layer.

    `control` is the seed of the search-matched control that it belongs to.
    """

    control: int | None
    layer: int
    position: int
    experts: tuple[int, ...]
    coefficient: float

    @property
    def words(self) -> str:
        """What it is, in a few words."""
        whose = f"layer {self.layer}"
        if self.experts:
            many = "experts" if len(self.experts) > 1 else "expert"
            whose = f"{many} {', '.join(map(str, self.experts))} of {whose}"
        where = f"position {self.position}" if self.position else "mean over positions"
        return f"{self.coefficient:+g}× {whose}, {where}"


@dataclass(frozen=True)
class DirectionTrial:
    """A choice and what is known of it; None: the unsteered model.

    `score` is the mean refusal score of the target's prompts, `kl` the mean divergence from the
    unsteered model of the token after the prices' prompts (without any, the target's), None where
    it was not measured. `outcomes` counts the judged replies by task and outcome, empty before
    stage 2. `objective` is the target's share there, or, where a limit is broken, by how much,
    negative; None before.
    """

    choice: Choice | None
    score: float
    kl: float | None = None
    outcomes: dict[str, dict[str, int]] | None = None
    allowed: bool = True
    objective: float | None = None


@dataclass(frozen=True)
class Control:
    """What a search-matched control tried and found; no `best`: nothing kept to the limits.

    `experts` are those it searched, none where it searched random vectors; `tried` its choices.
    """

    seed: int
    experts: tuple[Expert, ...]
    tried: int
    best: DirectionTrial | None


@dataclass(frozen=True)
class DirectionPlan:
    """What decides a search: the side, the least share of each price, the largest KL of stage 1,
    what is tried, how many are judged, and the controls."""

    toward: Side
    prices: dict[str, float]
    max_kl: float
    coefficients: tuple[float, ...]
    methods: tuple[Method, ...]
    budget: int
    others: int
    seeds: int


@dataclass(frozen=True)
class DirectionResult:
    """What `summary.json` of a direction search holds.

    `tried` counts the choices of stage 1, `judged` are those of stage 2, the best score first.
    """

    model: str
    kind: Kind
    target: str
    outcome: str
    toward: Side
    prices: dict[str, float]
    max_kl: float
    coefficients: tuple[float, ...]
    methods: tuple[Method, ...]
    budget: int
    others: int
    seeds: int
    tried: int
    unsteered: DirectionTrial
    best: DirectionTrial
    judged: tuple[DirectionTrial, ...]
    controls: tuple[Control, ...]
    test: Comparison

    def to_json(self) -> str:
        """The result as one JSON object, with the schema's number."""
        return json.dumps({"schema": SEARCH_SCHEMA, **asdict(self)}, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str | Path = SUMMARY) -> "DirectionResult":
        """Read what `to_json` wrote; MoesteerError, beginning with `where`, for anything else."""
        return from_json(cls, text, where, SEARCH_SCHEMA, "a direction search")


def direction_search(
    engine: "Engine",
    source: Profile,
    target: Card,
    *,
    toward: Side,
    out: str | Path,
    prices: Sequence[tuple[Card, float]] = (),
    max_kl: float = MAX_KL,
    coefficients: Sequence[float] | None = None,
    methods: Sequence[Method] | None = None,
    budget: int = BUDGET,
    others: int = OTHERS,
    seeds: int = 3,
    data: Mapping[str, str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    chat_options: Mapping[str, bool | int | float | str] | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    command: str = "",
) -> DirectionResult:
    """Find the direction that moves `target` furthest within limits, and test it once.

    `source` holds the candidates (`moesteer direction`); towards A they are added, towards B taken
    away. `prices` are tasks with the least share allowed of their outcome. `limit` and
    `max_new_tokens` hold on dev and test alike; without them, dev has `PROMPTS` and `TOKENS`.

    `out` is the run's folder: scores.jsonl, kl.jsonl and judged.jsonl, best.safetensors,
    summary.json, and the evaluation on the test prompts as a run of its own in `test`. An
    interrupted run is taken up. Raises MoesteerError where the unsteered model breaks the limits,
    or every choice does.
    """
    candidates = _candidates(source, engine)
    weighted = candidates.kind != "residual"
    plan = DirectionPlan(
        toward,
        {card.name: least for card, least in prices},
        max_kl,
        tuple(coefficients or (WEIGHTED if weighted else RESIDUAL)),
        tuple(methods or ("one", "two")) if weighted else (),
        budget,
        others,
        seeds,
    )
    check_numbers(seeds=seeds, batch_size=batch_size, budget=budget, others=others)
    check_numbers(limit=limit, max_new_tokens=max_new_tokens)
    cards = [target, *(card for card, _ in prices)]
    _check(cards, plan, bool(methods), weighted)
    options = dict(source.chat_options) | dict(chat_options or {})
    files = data or {}
    tested = with_prices(cards, files)
    check_tasks(tested, files)
    tasks = [
        prepare(
            engine,
            card,
            "dev",
            files.get(card.name),
            options,
            limit or PROMPTS,
            max_new_tokens or min(TOKENS, card.max_new_tokens),
        )
        for card in cards
    ]
    mine = choices(candidates, plan)
    settings = {
        "model": engine.facts.id,
        "model_facts": asdict(engine.facts),
        "candidates": _digest(candidates),
        "target": f"{target.name}={target.outcome}",
        "tasks": {task.card.name: identity(task) for task in tasks},
        **asdict(plan),
        "refusal_token_ids": refusal_tokens_of(source),
        "chat_options": options,
        "batch_size": batch_size,
        "max_new_tokens": [task.max_new_tokens for task in tasks],
    }
    with open_run(out, KIND, settings, about(command)) as run:
        told = _counter(progress, (len(mine) + budget) * (1 + seeds))
        bench = _Bench(engine, run, tasks, source, plan, batch_size, told)
        if say is not None:
            say(_cost(bench, mine))
        unsteered = _unsteered(bench)
        judged = _search(bench, mine)
        best = _best_or_error(bench, mine, judged)
        assert best.choice is not None
        profile = replace(steered_by(source, best.choice), chat_options=options)
        profile.made_by(command).save(run.folder / BEST)
        controls = [_control(bench, mine, seed) for seed in range(seeds)]
        test = evaluate(
            engine,
            profile,
            tested,
            out=run.folder / "test",
            data=data,
            seeds=seeds,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            limit=limit,
            checks=Path(out).parent,
            beside={
                f"search-matched {found.seed}": steered_by(source, found.best.choice)
                for found in controls
                if found.best is not None and found.best.choice is not None
            },
            say=say,
            command=command,
        )
        result = DirectionResult(
            model=engine.facts.id,
            kind=candidates.kind,
            target=target.name,
            outcome=target.outcome,
            **vars(plan),
            tried=len(mine),
            unsteered=unsteered,
            best=best,
            judged=tuple(judged),
            controls=tuple(controls),
            test=test,
        )
        write_text(run.folder / SUMMARY, result.to_json() + "\n")
    return result


# -- what is tried -------------------------------------------------------------------------------


def choices(candidates: Candidates, plan: DirectionPlan) -> list[Choice]:
    """Every choice of one search, layer by layer."""
    if candidates.kind == "residual":
        found = [
            Choice(None, layer, position, (), coefficient)
            for layer, position, _ in sorted(_measured(candidates))
            for coefficient in _signed(plan)
        ]
    else:
        kept = over_threshold(candidates)
        if not kept:
            raise MoesteerError(
                "the routing of no expert is over the threshold, so there is none to search among;"
                " find the directions with a lower --threshold."
            )
        found = _weighted(candidates, plan, kept, None)
    if not found:
        raise MoesteerError("there are no candidates to search among.")
    return found


def control_choices(
    candidates: Candidates, plan: DirectionPlan, mine: Sequence[Choice], seed: int
) -> list[Choice]:
    """What a search-matched control tries, no more choices than the search itself.

    Of the residual stream the same places, whose vectors are then random. Of experts others, spread
    over the layers as the kept ones are; for method two as many of a layer as are kept there.
    """
    if candidates.kind == "residual":
        return [replace(choice, control=seed) for choice in mine]
    kept = over_threshold(candidates)
    generator = random.Random(seed)
    waiting = {
        layer: generator.sample(below := below_threshold(candidates, layer), len(below))
        for layer in dict.fromkeys(layer for layer, _ in kept)
    }
    together = [
        (layer, expert)
        for layer, others in waiting.items()
        for expert in others[: sum(where == layer for where, _ in kept)]
    ]
    order = [layer for layer, _ in generator.sample(kept, len(kept))]
    drawn: list[Expert] = []
    number = min(max(plan.others, len(kept)), sum(map(len, waiting.values())))
    while len(drawn) < number:
        for layer in order:
            if waiting[layer] and len(drawn) < number:
                drawn.append((layer, waiting[layer].pop()))
    single = [c for c in mine if len(c.experts) == 1]
    one = [
        choice
        for choice in _weighted(candidates, replace(plan, methods=("one",)), drawn, seed)
        if single
    ]
    one = generator.sample(one, min(len(one), len(single)))
    two = [
        choice
        for choice in _weighted(candidates, replace(plan, methods=("two",)), together, seed)
        if len(choice.experts) > 1
    ]
    two = two[: len(mine) - len(single)]
    return sorted([*one, *two], key=lambda c: (c.layer, c.experts, c.position, c.coefficient))


def _weighted(
    candidates: Candidates, plan: DirectionPlan, experts: Sequence[Expert], control: int | None
) -> list[Choice]:
    """Each expert alone, and those of a layer together, at every position and coefficient."""
    measured = _measured(candidates)
    layers = sorted({layer for layer, _ in experts})
    sets: list[tuple[int, tuple[int, ...]]] = []
    for layer in layers:
        here = sorted(expert for where, expert in experts if where == layer)
        alone = [(layer, (expert,)) for expert in here]
        sets += alone if "one" in plan.methods else []
        # Of a single expert both methods are the same.
        if "two" in plan.methods and (len(here) > 1 or "one" not in plan.methods):
            sets.append((layer, tuple(here)))
    return [
        Choice(control, layer, position, chosen, coefficient)
        for layer, chosen in sets
        for position in _positions(measured, layer, chosen)
        for coefficient in _signed(plan)
    ]


def _signed(plan: DirectionPlan) -> list[float]:
    sign = 1 if plan.toward == "a" else -1
    return [sign * coefficient for coefficient in plan.coefficients]


def _measured(candidates: Candidates) -> set[tuple[int, int, int]]:
    """Layer, position and expert (−1: none) of every vector that has a length."""
    there = candidates.vector.any(axis=1)
    columns = (candidates.layer, candidates.position, candidates.expert)
    return set(zip(*(column[there].tolist() for column in columns), strict=True))


def _positions(
    measured: AbstractSet[tuple[int, int, int]], layer: int, experts: Sequence[int]
) -> list[int]:
    """The positions at which each of these experts of a layer has a vector."""
    return [
        position
        for position in sorted({position for where, position, _ in measured if where == layer})
        if all((layer, position, expert) in measured for expert in experts)
    ]


# -- the stages ----------------------------------------------------------------------------------


class _Bench:
    """What every choice is measured on, and what the run knows already.

    The target is the first of the tasks; KL is measured on the others, or else on it.
    """

    def __init__(
        self,
        engine: "Engine",
        run: Run,
        tasks: Sequence[Asked],
        source: Profile,
        plan: DirectionPlan,
        batch_size: int,
        told: Callable[[int], None],
    ) -> None:
        self.engine, self.run, self.tasks, self.source = engine, run, tasks, source
        self.plan, self.batch_size, self.told = plan, batch_size, told
        self.tokens = refusal_tokens_of(source)
        self.prompts = _prompts(engine, tasks[0])
        self.beside = [prompt for task in tasks[1:] for prompt in _prompts(engine, task)]
        self.scores, self.kl, self.judged = (_known(run, name) for name in FILES)


FILES = {"scores": "score", "kl": "kl", "judged": "outcomes"}
"""The run's files, and the key in a line of each that is not the choice's."""


def _search(bench: _Bench, tried: Sequence[Choice]) -> list[DirectionTrial]:
    """Both stages; the judged trials, the best score first."""
    _read_scores(bench, tried)
    sign = 1 if bench.plan.toward == "a" else -1
    ranked = sorted(tried, key=lambda choice: -sign * bench.scores[choice])
    found = []
    for choice in ranked:
        if len(found) == bench.plan.budget:
            break
        if _kl(bench, choice) <= bench.plan.max_kl:
            found.append(_judge(bench, choice))
            bench.told(1)
    bench.told(bench.plan.budget - len(found))
    return found


def _read_scores(bench: _Bench, tried: Sequence[Choice]) -> None:
    """Stage 1 for what the run does not hold, some choices at a time."""
    for start in range(0, len(tried), TOGETHER):
        some = tried[start : start + TOGETHER]
        missing = [choice for choice in some if choice not in bench.scores]
        if missing:
            profiles = [steered_by(bench.source, choice) for choice in some]
            read = refusal_scores(bench.engine, bench.prompts, bench.tokens, profiles).mean(-1)
            by_choice = dict(zip(some, map(float, read), strict=True))
            _add(bench.run, "scores", {choice: by_choice[choice] for choice in missing})
            bench.scores |= {choice: by_choice[choice] for choice in missing}
        bench.told(len(some))


def _kl(bench: _Bench, choice: Choice) -> float:
    if choice not in bench.kl:
        found = mean_kl(
            bench.engine, bench.beside or bench.prompts, steered_by(bench.source, choice)
        )
        _add(bench.run, "kl", {choice: found})
        bench.kl[choice] = found
    return bench.kl[choice]


def _judge(bench: _Bench, choice: Choice | None) -> DirectionTrial:
    """Stage 2: the judged replies to all tasks; of None, those of the unsteered model."""
    if choice not in bench.judged:
        profile = None if choice is None else steered_by(bench.source, choice)
        outcomes = {task.card.name: _outcomes(bench, task, profile) for task in bench.tasks}
        _add(bench.run, "judged", {choice: outcomes})
        bench.judged[choice] = outcomes
    outcomes = bench.judged[choice]
    target = bench.tasks[0].card
    broken = sum(
        max(0.0, least - share_of(outcomes[task.card.name], task.card.outcome))
        for task in bench.tasks[1:]
        for least in [bench.plan.prices[task.card.name]]
    )
    share = share_of(outcomes[target.name], target.outcome)
    kl = 0.0 if choice is None else bench.kl[choice]
    objective = -broken if broken else share
    return DirectionTrial(choice, bench.scores[choice], kl, outcomes, not broken, objective)


def _outcomes(bench: _Bench, task: Asked, profile: Profile | None) -> dict[str, int]:
    """How many replies have which outcome, all of the card's first; unjudged ones are left out."""
    replies = bench.engine.generate(
        task.prompts,
        profile,
        max_new_tokens=task.max_new_tokens,
        batch_size=bench.batch_size,
    ).replies
    judged = judge_replies(task.card, task.judges, task.items, replies)
    counted = Counter(one.outcome for one in judged if one.outcome is not None)
    if not counted:
        why = judged[0].verdicts[0].note if judged else "there are none"
        raise MoesteerError(f"none of the replies to {task.card.name} could be judged: {why}")
    return {name: counted[name] for name in dict.fromkeys((*task.card.outcomes, *counted))}


def share_of(outcomes: Mapping[str, int], outcome: str) -> float:
    return outcomes.get(outcome, 0) / sum(outcomes.values())


def _unsteered(bench: _Bench) -> DirectionTrial:
    """The unsteered model on the same prompts; MoesteerError where it breaks the limits itself."""
    if None not in bench.scores:
        score = float(refusal_scores(bench.engine, bench.prompts, bench.tokens).mean())
        _add(bench.run, "scores", {None: score})
        bench.scores[None] = score
    trial = _judge(bench, None)
    for task in bench.tasks[1:]:
        name, least = task.card.name, bench.plan.prices[task.card.name]
        share = share_of(bench.judged[None][name], task.card.outcome)
        if share < least:
            raise MoesteerError(
                f"the unsteered model itself has {share:.3f} on {name}, and at least {least:g} is"
                " asked for. Lower --prices, with another --out."
            )
    return trial


def _control(bench: _Bench, mine: Sequence[Choice], seed: int) -> Control:
    assert bench.source.candidates is not None
    tried = control_choices(bench.source.candidates, bench.plan, mine, seed)
    judged = _search(bench, tried)
    bench.told(len(mine) - len(tried))
    experts = sorted({(choice.layer, expert) for choice in tried for expert in choice.experts})
    return Control(seed, tuple(experts), len(tried), best_of(judged))


def best_of(judged: Sequence[DirectionTrial]) -> DirectionTrial | None:
    """The allowed trial with the largest target share; of equal ones that of the smallest KL."""
    allowed = [trial for trial in judged if trial.allowed]
    return max(allowed, key=lambda t: (t.objective or 0.0, -(t.kl or 0.0)), default=None)


def _best_or_error(
    bench: _Bench, tried: Sequence[Choice], judged: Sequence[DirectionTrial]
) -> DirectionTrial:
    best = best_of(judged)
    if best is not None:
        return best
    if not judged:
        nearest = min(tried, key=lambda choice: bench.kl[choice])
        raise MoesteerError(
            f"none of {len(tried)} choices keeps KL at {bench.plan.max_kl:g} or less; the nearest"
            f" ({nearest.words}) has {bench.kl[nearest]:.3g}. Raise --max-kl, or give smaller"
            " --coefficients, with another --out."
        )
    nearest = max(judged, key=lambda trial: trial.objective or 0.0)
    assert nearest.choice is not None
    raise MoesteerError(
        f"none of the {len(judged)} judged choices keeps to the limits; the nearest"
        f" ({nearest.choice.words}) gives {nearest.outcomes}. Loosen --prices, judge more"
        " (--budget), or give smaller --coefficients, with another --out."
    )


def steered_by(source: Profile, choice: Choice) -> Profile:
    """The profile that steers by a choice: added at what enters the layer, or weighted by experts.

    In a control of the residual stream, a random vector of the candidate's norm, always the same.
    """
    candidates = source.candidates
    assert candidates is not None
    whose = choice.experts or (-1,)
    numbers = [candidates.find(choice.layer, choice.position, expert) for expert in whose]
    profile = aimed(source, numbers, Aim(coefficient=choice.coefficient))
    if choice.control is None:
        return replace(profile, name=choice.words)
    what = "of experts below the threshold" if choice.experts else "of random vectors"
    profile = replace(profile, evidence=None, scores=None, candidates=None)
    profile = replace(profile, name=f"{choice.words}, {what}")
    if choice.experts:
        return profile
    (direction,) = profile.directions
    # Not [seed, 0], which is drawn from as the seed alone: those are the random controls' vectors.
    generator = np.random.default_rng([choice.control, *numbers, 1])
    vector = random_vector(len(direction.vector), direction.norm, generator)
    return replace(profile, directions=(replace(direction, vector=vector),))


def widest(source: Profile) -> Profile:
    """The source with as many directions at once as a search among its candidates may use."""
    kept = [] if source.candidates is None else over_threshold(source.candidates)
    if not kept or source.candidates is None:
        return source
    layers = [layer for layer, _ in kept]
    layer = max(layers, key=layers.count)
    experts = tuple(expert for where, expert in kept if where == layer)
    positions = _positions(_measured(source.candidates), layer, experts)
    if not positions:
        return source
    return steered_by(source, Choice(None, layer, positions[0], experts, 1.0))


# -- the run -------------------------------------------------------------------------------------


def trials_of(run: Run) -> list[DirectionTrial]:
    """All that a run holds of its choices, those of its controls too."""
    scores, kl, judged = (_known(run, name) for name in FILES)
    return [DirectionTrial(c, s, kl.get(c), judged.get(c)) for c, s in scores.items()]


def _known(run: Run, name: str) -> dict[Any, Any]:
    """What a file of the run holds, by choice; None stands for the unsteered model."""
    found: dict[Choice | None, Any] = {}
    for record in run.lines(name, "choice", FILES[name]):
        told = record["choice"]
        try:
            choice = told and Choice(**{**told, "experts": tuple(told["experts"])})
        except (KeyError, TypeError) as error:
            raise MoesteerError(f"{run.folder}: {name}.jsonl: {error}.") from None
        found[choice] = record[FILES[name]]
    return found


def _add(run: Run, name: str, found: Mapping[Any, Any]) -> None:
    run.add(name, [{"choice": c and asdict(c), FILES[name]: value} for c, value in found.items()])


def _candidates(source: Profile, engine: "Engine") -> Candidates:
    found = source.candidates
    if found is None:
        raise MoesteerError(
            f"{source.name} holds no candidates to search among; give a file that `moesteer"
            " direction` wrote."
        )
    check_model(source, engine.facts)
    if engine.facts.hidden and found.vector.shape[1] != engine.facts.hidden:
        raise MoesteerError(
            f"{source.name}: its directions have {found.vector.shape[1]} numbers, but the hidden"
            f" states of {engine.facts.id} have {engine.facts.hidden}."
        )
    return found


def _check(cards: Sequence[Card], plan: DirectionPlan, methods: bool, weighted: bool) -> None:
    names = [card.name for card in cards]
    if twice := [name for name in names if names.count(name) > 1]:
        raise MoesteerError(f"the task {twice[0]} is named twice among --target and --prices.")
    if methods and not weighted:
        raise MoesteerError("--methods is for directions of experts; these are residual ones.")
    if not 0 <= plan.max_kl < float("inf"):
        raise MoesteerError(f"--max-kl is {plan.max_kl}; it must be at least 0, and finite.")
    for coefficient in plan.coefficients:
        if not 0 < coefficient < float("inf"):
            raise MoesteerError(
                f"--coefficients has {coefficient:g}; they are above 0, and --toward gives the"
                " sign."
            )
    if len(set(plan.coefficients)) < len(plan.coefficients):
        raise MoesteerError("--coefficients names one twice.")


def _digest(candidates: Candidates) -> str:
    text = hashlib.sha256(candidates.kind.encode())
    arrays = (candidates.layer, candidates.position, candidates.expert, candidates.vector)
    for array in (*arrays, *(candidates.scores[name] for name in sorted(candidates.scores))):
        text.update(np.ascontiguousarray(array).tobytes())
    return text.hexdigest()[:16]


def _prompts(engine: "Engine", task: Asked) -> list[AskedPrompt]:
    encoded = [engine.tokenizer(p, add_special_tokens=False)["input_ids"] for p in task.prompts]
    return [
        AskedPrompt(prompt, tuple(ids), 0, item.source)
        for prompt, ids, item in zip(task.prompts, encoded, task.items, strict=True)
    ]


def _cost(bench: _Bench, mine: Sequence[Choice]) -> str:
    prompts = sum(len(task.items) for task in bench.tasks)
    there = f" ({len(bench.scores):,} scores are there)" if bench.scores else ""
    return (
        f"{1 + bench.plan.seeds} searches of {len(mine):,} choices on {len(bench.prompts):,}"
        f" prompts{there}; the best {bench.plan.budget} of each are judged on {prompts:,} prompts;"
        " then the test prompts"
    )


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """A function that counts choices and tells the progress."""
    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return told
