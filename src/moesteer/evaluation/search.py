"""How many experts to steer, and ranked by which detector: chosen on dev, measured on test.

The more experts are steered, the further a behaviour moves, and the more everything else does. The
search tries numbers of activated and deactivated experts on the dev prompts, keeps to limits on the
price, and takes the choice that moves the target furthest; of equal ones that with the fewest
experts. What it found is measured once on the test prompts.

Looking at many choices finds something in noise, too. So randomly ranked experts are put through
the very same search with the same budget, and what that finds is measured beside it: the
search-matched control (Marbut, Olson, Wheeler 2026, arXiv 2606.04160, do it with 10 experts).
"""

import hashlib
import importlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moesteer.chat import TokenisedConversation
from moesteer.contrast import pairs_hash
from moesteer.detection.detect_to_file import detect_to_file
from moesteer.detection.selecting import ranked_experts, scores_by_expert, select_experts
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.evaluation.cards import Card
from moesteer.evaluation.comparison import Comparison, from_json
from moesteer.evaluation.controls import shuffled_ranking
from moesteer.evaluation.drift import as_conversations, divergence
from moesteer.evaluation.evaluate import SUMMARY, Asked, about, evaluate, identity, prepare
from moesteer.evaluation.judging import judge_replies
from moesteer.files import write_text
from moesteer.profile import Expert, LayerShape, Profile, Side, check_model
from moesteer.runs import Run, open_run

if TYPE_CHECKING:
    from moesteer.contrast import ContrastPair
    from moesteer.engines.base import Engine

SEARCH_SCHEMA = 1
BUDGET = 48
"""Trials a search: a grid of 7 × 7 numbers without (0, 0)."""
DOSES = (0.25, 0.5, 0.75, 1, 1.5, 2)
"""Points of the dose curve, in multiples of the numbers found."""
MOST = 1 / 3
"""At most this share of all experts is deactivated."""
BEST = "best.safetensors"

Optimiser = Literal["grid", "optuna"]


@dataclass(frozen=True)
class Trial:
    """One choice of experts, measured on the dev prompts.

    `stage` is "unsteered", "search" or "dose"; `control` is "random" in the search-matched control
    of `seed`, else None. `values` are the shares of the target's and the prices' outcomes, `kl` the
    mean divergence from the unsteered model on the prices' prompts (without any, on the target's).
    `objective`: the target's share, or, where a limit is broken, by how much, negative.
    """

    stage: str
    control: str | None
    seed: int
    detector: str
    activate: int
    deactivate: int
    toward: Side
    values: dict[str, float]
    kl: float
    allowed: bool
    objective: float


@dataclass(frozen=True)
class Found:
    """What a search-matched control found: None where no choice kept to the limits."""

    seed: int
    best: Trial | None


@dataclass(frozen=True)
class SearchResult:
    """What `summary.json` of a search holds; all trials are in `trials.jsonl`.

    `prices` are the least shares allowed. `dose` is the best choice with fewer and more experts,
    `front` the trials that no other beats in the target and all prices at once.
    """

    model: str
    target: str
    outcome: str
    toward: Side
    prices: dict[str, float]
    max_kl: float | None
    optimiser: Optimiser
    budget: int
    seed: int
    unsteered: Trial
    best: Trial
    controls: tuple[Found, ...]
    dose: tuple[Trial, ...]
    front: tuple[Trial, ...]
    test: Comparison

    def to_json(self) -> str:
        """The result as one JSON object, with the schema's number."""
        return json.dumps({"schema": SEARCH_SCHEMA, **asdict(self)}, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str | Path = SUMMARY) -> "SearchResult":
        """Read what `to_json` wrote; MoesteerError, beginning with `where`, for anything else."""
        return from_json(cls, text, where, SEARCH_SCHEMA, "a search")


@dataclass(frozen=True)
class Limits:
    """The least share of each price, and the largest KL."""

    prices: Mapping[str, float]
    max_kl: float | None

    def broken(self, values: Mapping[str, float], kl: float) -> float:
        """By how much the limits are broken, added up; 0: not at all."""
        short = sum(max(0.0, least - values[task]) for task, least in self.prices.items())
        over = 0.0 if self.max_kl is None else max(0.0, kl - self.max_kl)
        return short + over


@dataclass(frozen=True)
class Bench:
    """What every trial is measured on: the tasks, the target first, and within which limits.

    `unsteered` holds, by task, the unsteered model's replies that KL is measured on, `known` the
    trials that the run has already; `told` is called at each trial.
    """

    engine: "Engine"
    run: Run
    tasks: Sequence[Asked]
    limits: Limits
    toward: Side
    batch_size: int
    unsteered: dict[str, list[TokenisedConversation]]
    known: dict[tuple, Trial]
    told: Callable[[], None]


def search(
    engine: "Engine",
    rankings: Sequence[Profile],
    target: Card,
    *,
    toward: Side,
    out: str | Path,
    prices: Sequence[tuple[Card, float]] = (),
    max_kl: float | None = None,
    budget: int = BUDGET,
    optimiser: Optimiser = "grid",
    seeds: int = 3,
    seed: int = 0,
    data: Mapping[str, str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    chat_options: Mapping[str, bool | int | float | str] | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    command: str = "",
) -> SearchResult:
    """Find the experts that move `target` furthest within limits, and test them once.

    `rankings` are profiles with scores, one a detector; `toward` is the side of their pairs to
    steer towards; the share of the target's `outcome` is to grow (`replace(card, outcome=…)` for
    another). `prices` are tasks with the least share allowed of their outcome, `budget` the number
    of trials of one search, `seeds` the number of search-matched controls, `seed` the optimiser's.

    `out` is the run's folder: trials.jsonl, best.safetensors, summary.json, and the evaluation on
    the test prompts as a run of its own in `test`. An interrupted run is taken up. Raises
    MoesteerError where the unsteered model breaks the limits, or every choice does.
    """
    labelled = _labelled(rankings, engine)
    cards = [target, *(card for card, _ in prices)]
    _check(cards, budget, len(labelled))
    options = dict(rankings[0].chat_options) | dict(chat_options or {})
    files = data or {}
    tasks = [
        prepare(engine, card, "dev", files.get(card.name), options, limit, max_new_tokens)
        for card in cards
    ]
    limits = Limits({card.name: least for card, least in prices}, max_kl)
    settings = {
        "model": engine.facts.id,
        "model_facts": asdict(engine.facts),
        "rankings": {label: _digest(ranking) for label, ranking in labelled.items()},
        "target": f"{target.name}={target.outcome}",
        "tasks": {task.card.name: identity(task) for task in tasks},
        "toward": toward,
        "prices": dict(limits.prices),
        "max_kl": max_kl,
        "budget": budget,
        "optimiser": optimiser,
        "seeds": seeds,
        "seed": seed,
        "chat_options": options,
        "batch_size": batch_size,
        "max_new_tokens": [task.max_new_tokens for task in tasks],
    }
    with open_run(out, "search", settings, about(command)) as run:
        bench = Bench(
            engine=engine,
            run=run,
            tasks=tasks,
            limits=limits,
            toward=toward,
            batch_size=batch_size,
            unsteered={},
            known={_key(trial): trial for trial in map(_trial, run.lines("trials"))},
            told=_counter(progress, budget * (1 + seeds) + len(DOSES) + 1),
        )
        if say is not None:
            say(_cost(bench, budget * (1 + seeds) + len(DOSES) + 1))
        unsteered = _measure_unsteered(bench)
        plan = Plan(optimiser, budget, seed)
        trials = search_ranking(bench, labelled, plan)
        best = _best_or_error(trials)
        profile = _chosen(labelled, best).made_by(command)
        replace(profile, chat_options=options, name=BEST).save(run.folder / BEST)
        dose = _dose_curve(bench, labelled, best)
        controls = {number: _control(bench, labelled, plan, number) for number in range(seeds)}
        found = {n: pair for n, pair in controls.items() if pair is not None}
        test = evaluate(
            engine,
            replace(profile, chat_options=options, name=_words(best)),
            cards,
            out=run.folder / "test",
            data=data,
            seeds=seeds,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            limit=limit,
            checks=Path(out).parent,
            beside={f"search-matched {n}": control for n, (_, control) in found.items()},
            say=say,
            command=command,
        )
        result = SearchResult(
            model=engine.facts.id,
            target=target.name,
            outcome=target.outcome,
            toward=toward,
            prices=dict(limits.prices),
            max_kl=max_kl,
            optimiser=optimiser,
            budget=budget,
            seed=seed,
            unsteered=unsteered,
            best=best,
            controls=tuple(Found(n, found[n][0] if n in found else None) for n in controls),
            dose=tuple(dose),
            front=tuple(pareto_front([unsteered, *trials])),
            test=test,
        )
        write_text(run.folder / SUMMARY, result.to_json() + "\n")
    return result


# -- what is tried -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How choices are proposed, how many, and from which seed."""

    optimiser: Optimiser
    budget: int
    seed: int


def search_ranking(
    bench: Bench, rankings: Mapping[str, Profile], plan: Plan, control: int | None = None
) -> list[Trial]:
    """All trials of one search over rankings by label, as the plan proposes them."""
    most = {label: most_experts(ranking, bench.toward) for label, ranking in rankings.items()}

    def measured(label: str, activate: int, deactivate: int) -> Trial:
        return _measure(bench, rankings[label], label, (activate, deactivate), "search", control)

    if plan.optimiser == "grid":
        return [measured(*choice) for choice in grid(most, plan.budget)]
    return list(_by_optuna(measured, most, plan))


def most_experts(ranking: Profile, toward: Side) -> tuple[int, int]:
    """How many experts can be activated and deactivated towards a side, by rank.

    Up to the first that its layer has no room for, and of the deactivated ones at most a third of
    all experts: beyond, hardly a model is left.
    """
    assert ranking.model is not None
    value, sign = scores_by_expert(ranking), 1 if toward == "a" else -1
    shapes = {shape.layer: shape for shape in ranking.model.layers}
    ranked = ranked_experts(ranking)

    def fit(experts: list[Expert], room: Callable[[LayerShape], int]) -> int:
        taken: Counter[int] = Counter()
        for number, (layer, _) in enumerate(experts):
            taken[layer] += 1
            if taken[layer] > room(shapes[layer]):
                return number
        return len(experts)

    up = fit([e for e in ranked if sign * value[e] > 0], lambda shape: shape.top_k)
    down = fit([e for e in ranked if sign * value[e] < 0], lambda s: s.experts - s.top_k)
    return up, min(down, int(MOST * len(value)))


def grid(most: Mapping[str, tuple[int, int]], budget: int) -> list[tuple[str, int, int]]:
    """As fine a grid over the numbers to activate and deactivate as the budget allows.

    The budget is shared among the rankings; numbers grow geometrically from 1 to the most, and 0 is
    one of them.
    """
    share = budget // len(most)
    steps = int((share + 1) ** 0.5) - 1
    choices = []
    for label, ends in most.items():
        up, down = ([0, *_ladder(end, steps)] for end in ends)
        choices += [(label, a, d) for a in up for d in down if a or d]
    return choices


def _ladder(most: int, steps: int) -> list[int]:
    """At most `steps` whole numbers from 1 to `most`, growing geometrically."""
    return sorted({round(n) for n in np.geomspace(1, most, steps)}) if most else []


def _by_optuna(
    measured: Callable[[str, int, int], Trial], most: Mapping[str, tuple[int, int]], plan: Plan
) -> Iterator[Trial]:
    """Choices proposed by optuna's TPE sampler (Bergstra et al. 2011); as good a start is a grid.

    What the run holds already is told again, so an interrupted search goes the same way.
    """
    try:
        # An optional package: a plain import would trouble type checkers where it is absent.
        optuna: Any = importlib.import_module("optuna")
    except ImportError:
        raise MoesteerError(
            'the package `optuna` is missing: pip install "moesteer[search]", or take the grid.'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=plan.seed)
    )
    for _ in range(plan.budget):
        asked = study.ask()
        label = asked.suggest_categorical("ranking", list(most))
        up, down = most[label]
        activate = min(asked.suggest_int("activate", 0, max(a for a, _ in most.values())), up)
        deactivate = min(asked.suggest_int("deactivate", 0, max(d for _, d in most.values())), down)
        if not (activate or deactivate):
            activate, deactivate = (1, 0) if up else (0, 1)
        trial = measured(label, activate, deactivate)
        study.tell(asked, trial.objective)
        yield trial


def _control(
    bench: Bench, rankings: Mapping[str, Profile], plan: Plan, number: int
) -> tuple[Trial, Profile] | None:
    """What the same search finds among randomly ranked experts; None where nothing is allowed."""
    shuffled = {label: shuffled_ranking(ranking, number) for label, ranking in rankings.items()}
    best = best_of(search_ranking(bench, shuffled, plan, control=number))
    if best is None:
        return None
    return best, replace(_chosen(shuffled, best), name=f"{_words(best)}, ranked at random")


def _dose_curve(bench: Bench, rankings: Mapping[str, Profile], best: Trial) -> list[Trial]:
    """The best choice with fewer and with more experts, as far as there are any."""
    ranking = rankings[best.detector]
    up, down = most_experts(ranking, bench.toward)
    numbers = {
        (min(round(best.activate * dose), up), min(round(best.deactivate * dose), down))
        for dose in DOSES
    }
    return [
        _measure(bench, ranking, best.detector, pair, "dose", None)
        for pair in sorted(numbers)
        if any(pair)
    ]


# -- measuring -----------------------------------------------------------------------------------


def _measure_unsteered(bench: Bench) -> Trial:
    """The unsteered model on the same prompts; MoesteerError where it breaks the limits itself."""
    there = {(r["task"], r["item"]): r["reply"] for r in bench.run.lines("unsteered")}
    for task in bench.tasks:
        name = task.card.name
        missing = [(name, i) for i in range(len(task.items)) if (name, i) not in there]
        if missing:
            replies = _replies(bench, task, None)
            bench.run.add(
                "unsteered",
                [{"task": name, "item": i, "reply": replies[i]} for _, i in missing],
            )
            there |= {(name, i): replies[i] for _, i in missing}
    replies = {
        task.card.name: [there[task.card.name, i] for i in range(len(task.items))]
        for task in bench.tasks
    }
    values = {task.card.name: _share(task, replies[task.card.name]) for task in bench.tasks}
    for task in bench.tasks[1:] or bench.tasks[:1]:
        bench.unsteered[task.card.name] = as_conversations(
            bench.engine.tokenizer, task.prompts, replies[task.card.name]
        )
    broken = {
        name: share for name, share in values.items() if share < bench.limits.prices.get(name, 0)
    }
    for name, share in broken.items():
        raise MoesteerError(
            f"the unsteered model itself has {share:.3f} on {name}, and at least"
            f" {bench.limits.prices[name]:g} is asked for. Lower --prices."
        )
    target = bench.tasks[0].card.name
    return _kept(
        bench,
        Trial("unsteered", None, 0, "", 0, 0, bench.toward, values, 0.0, True, values[target]),
    )


def _measure(
    bench: Bench,
    ranking: Profile,
    label: str,
    numbers: tuple[int, int],
    stage: Literal["search", "dose"],
    control: int | None,
) -> Trial:
    """One choice on the dev prompts; taken from the run where it is there."""
    activate, deactivate = numbers
    kind = None if control is None else "random"
    blank = Trial(
        stage, kind, control or 0, label, activate, deactivate, bench.toward, {}, 0.0, True, 0.0
    )
    found = bench.known.get(_key(blank))
    if found is None:
        profile = _select(ranking, numbers, bench.toward)
        values = {
            task.card.name: _share(task, _replies(bench, task, profile)) for task in bench.tasks
        }
        kl = _kl(bench, profile)
        broken = bench.limits.broken(values, kl)
        target = values[bench.tasks[0].card.name]
        found = replace(
            blank, values=values, kl=kl, allowed=not broken, objective=-broken if broken else target
        )
    return _kept(bench, replace(found, stage=stage))


def _kept(bench: Bench, trial: Trial) -> Trial:
    """The trial, written to the run unless it is there."""
    if _key(trial) not in bench.known:
        bench.known[_key(trial)] = trial
        bench.run.add("trials", [asdict(trial)])
    bench.told()
    return trial


def _replies(bench: Bench, task: Asked, profile: Profile | None) -> list[str]:
    return bench.engine.generate(
        task.prompts,
        profile,
        max_new_tokens=task.max_new_tokens,
        batch_size=bench.batch_size,
    ).replies


def _share(task: Asked, replies: Sequence[str]) -> float:
    """Share of the task's outcome among the replies that could be judged."""
    judged = judge_replies(task.card, task.judges, task.items, replies)
    outcomes = [one.outcome for one in judged if one.outcome is not None]
    if not outcomes:
        why = judged[0].verdicts[0].note if judged else "there are none"
        raise MoesteerError(f"none of the replies to {task.card.name} could be judged: {why}")
    return sum(outcome == task.card.outcome for outcome in outcomes) / len(outcomes)


def _kl(bench: Bench, profile: Profile) -> float:
    by_task = [
        divergence(bench.engine, conversations, profile, bench.batch_size)
        for conversations in bench.unsteered.values()
    ]
    return float(np.mean([kl for kl in by_task if kl is not None] or [0.0]))


# -- choosing ------------------------------------------------------------------------------------


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The allowed trial with the largest target share, of equal ones that with the fewest experts.

    None where no trial is allowed.
    """
    allowed = [trial for trial in trials if trial.allowed]
    return max(
        allowed,
        key=lambda t: (t.objective, -(t.activate + t.deactivate), -t.kl),
        default=None,
    )


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other equals in every task's share and beats in one.

    Of several with the same shares, the one with the fewest experts.
    """

    def beats(one: Trial, other: Trial) -> bool:
        pairs = [(share, other.values[task]) for task, share in one.values.items()]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    fewest: dict[tuple, Trial] = {}
    for trial in sorted(trials, key=lambda t: (t.activate + t.deactivate, t.kl)):
        fewest.setdefault(tuple(sorted(trial.values.items())), trial)
    left = list(fewest.values())
    return [trial for trial in left if not any(beats(other, trial) for other in left)]


def _best_or_error(trials: Sequence[Trial]) -> Trial:
    best = best_of(trials)
    if best is None:
        nearest = max(trials, key=lambda trial: trial.objective)
        raise MoesteerError(
            f"none of {len(trials)} choices keeps to the limits; the nearest ({_words(nearest)})"
            f" gives {nearest.values}, KL {nearest.kl:.3g}. Loosen --prices or --max-kl, or give"
            " another ranking."
        )
    return best


def _chosen(rankings: Mapping[str, Profile], trial: Trial) -> Profile:
    return _select(rankings[trial.detector], (trial.activate, trial.deactivate), trial.toward)


def _select(ranking: Profile, numbers: tuple[int, int], toward: Side) -> Profile:
    activate, deactivate = numbers
    with warnings.catch_warnings():
        # Equal or uncertain scores are no matter here: a choice is judged by what it does on dev.
        warnings.simplefilter("ignore", MoesteerWarning)
        return select_experts(ranking, activate=activate, deactivate=deactivate, toward=toward)


# -- rankings ----------------------------------------------------------------------------------


def detected_beside(
    engine: "Engine",
    pairs: "Sequence[ContrastPair]",
    detector: str,
    *,
    out: str | Path,
    source: str,
    chat_options: Mapping[str, bool | int | float | str],
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """The scores of a detector, kept beside the folder `out`, so that they are detected once.

    MoesteerError where the file there comes from other pairs, chat options or another detector.
    """
    path = Path(out).with_name(f"{Path(out).name}.{detector}.safetensors")
    if not path.exists():
        detect_to_file(
            engine,
            pairs,
            out=str(path),
            select=(0, 0, None),
            detector=detector,
            match_spans=False,
            chat_options=chat_options,
            source=source,
            seed=0,
            command=command,
            progress=progress,
        )
    found = Profile.load(path)
    seen = found.evidence
    same = seen is not None and (seen.data_hash, seen.detector) == (pairs_hash(pairs), detector)
    if not same or found.chat_options != dict(chat_options):
        raise MoesteerError(
            f"{path} was not made from these pairs with these chat options; delete it, give another"
            " --out, or search by it with --rankings."
        )
    return found


# -- the run -------------------------------------------------------------------------------------


def _labelled(rankings: Sequence[Profile], engine: "Engine") -> dict[str, Profile]:
    """The rankings by detector, by their own name where two have one detector."""
    if not rankings:
        raise MoesteerError("there is no ranking to choose experts by; give a profile with scores.")
    detectors = [r.evidence.detector if r.evidence is not None else r.name for r in rankings]
    labels = [
        name if detectors.count(name) == 1 else f"{name} ({ranking.name})"
        for name, ranking in zip(detectors, rankings, strict=True)
    ]
    labelled = dict(zip(labels, rankings, strict=True))
    if len(labelled) < len(rankings):
        raise MoesteerError(f"the ranking {rankings[-1].name} is given twice.")
    for ranking in rankings:
        if ranking.scores is None:
            raise MoesteerError(f"{ranking.name} holds no scores to rank experts by.")
        check_model(ranking, engine.facts)
    return labelled


def _check(cards: Sequence[Card], budget: int, rankings: int) -> None:
    names = [card.name for card in cards]
    if twice := [name for name in names if names.count(name) > 1]:
        raise MoesteerError(f"the task {twice[0]} is named twice among --target and --prices.")
    if budget < 3 * rankings:
        raise MoesteerError(
            f"--budget is {budget}; it must be at least 3 trials a ranking, here {3 * rankings}."
        )


def _digest(ranking: Profile) -> str:
    scores = sorted(scores_by_expert(ranking).items())
    text = repr((scores, ranking.rule, ranking.dose))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _trial(record: Mapping[str, Any]) -> Trial:
    return Trial(**record)


def _key(trial: Trial) -> tuple:
    """What decides a trial's values, whatever it was tried for."""
    chosen = (trial.control, trial.seed, trial.detector, trial.activate, trial.deactivate)
    return (trial.stage == "unsteered", *chosen)


def _words(trial: Trial) -> str:
    return f"{trial.activate} activated, {trial.deactivate} deactivated by {trial.detector}"


def _cost(bench: Bench, trials: int) -> str:
    prompts = sum(len(task.items) for task in bench.tasks)
    there = f" ({len(bench.known):,} trials are there)" if bench.known else ""
    return (
        f"at most {trials:,} trials of {prompts:,} prompts: {trials * prompts:,} replies on dev"
        f"{there}, then the test prompts"
    )


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    """A function that counts trials and tells the progress."""
    done = count(1)
    return lambda: progress(next(done), total) if progress is not None else None
