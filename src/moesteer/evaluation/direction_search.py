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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moesteer.direction import Candidates, Kind
from moesteer.directions.refusal import refusal_tokens_of
from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import Card
from moesteer.evaluation.comparison import Comparison
from moesteer.evaluation.direction_choices import (
    RESIDUAL,
    WEIGHTED,
    Choice,
    DirectionPlan,
    Method,
    choices,
    control_choices,
    steered_by,
)
from moesteer.evaluation.direction_trials import (
    Bench,
    DirectionTrial,
    best_of,
    best_or_error,
    measure_unsteered,
    search_among,
)
from moesteer.evaluation.evaluate import (
    SUMMARY,
    check_numbers,
    check_tasks,
    evaluate,
    identity,
    prepare,
    with_prices,
)
from moesteer.files import write_text
from moesteer.profile import Expert, Profile, Side
from moesteer.profile_fit import check_model, check_ungated
from moesteer.provenance import about
from moesteer.runs import open_run
from moesteer.summaries import as_json, from_json
from moesteer.tally import tally

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
        return as_json(self, SEARCH_SCHEMA)

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
        told = tally(progress, (len(mine) + budget) * (1 + seeds))
        bench = Bench(engine, run, tasks, source, plan, batch_size, told)
        if say is not None:
            say(_cost(bench, mine))
        unsteered = measure_unsteered(bench)
        judged = search_among(bench, mine)
        best = best_or_error(bench, mine, judged)
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


def _control(bench: Bench, mine: Sequence[Choice], seed: int) -> Control:
    assert bench.source.candidates is not None
    tried = control_choices(bench.source.candidates, bench.plan, mine, seed)
    judged = search_among(bench, tried)
    bench.told(len(mine) - len(tried))
    experts = sorted({(choice.layer, expert) for choice in tried for expert in choice.experts})
    return Control(seed, tuple(experts), len(tried), best_of(judged))


# -- before and beside the work ------------------------------------------------------------------


def _candidates(source: Profile, engine: "Engine") -> Candidates:
    found = source.candidates
    if found is None:
        raise MoesteerError(
            f"{source.name} holds no candidates to search among; give a file that `moesteer"
            " direction` wrote."
        )
    check_ungated(source, "a search")
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


def _cost(bench: Bench, mine: Sequence[Choice]) -> str:
    prompts = sum(len(task.items) for task in bench.tasks)
    there = f" ({len(bench.scores):,} scores are there)" if bench.scores else ""
    return (
        f"{1 + bench.plan.seeds} searches of {len(mine):,} choices on {len(bench.prompts):,}"
        f" prompts{there}; the best {bench.plan.budget} of each are judged on {prompts:,} prompts;"
        " then the test prompts"
    )
