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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesteer.contrast import pairs_hash
from moesteer.detection.detect_to_file import detect_to_file
from moesteer.detection.selecting import ranked_experts, scores_by_expert
from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import Card
from moesteer.evaluation.comparison import Comparison
from moesteer.evaluation.controls import shuffled_ranking
from moesteer.evaluation.evaluate import (
    SUMMARY,
    about,
    check_numbers,
    check_tasks,
    evaluate,
    identity,
    prepare,
    with_prices,
)
from moesteer.evaluation.trials import (
    DOSES,
    Bench,
    Optimiser,
    Plan,
    Trial,
    best_of,
    best_or_error,
    chosen_by,
    key_of,
    measure,
    measure_unsteered,
    pareto_front,
    words,
)
from moesteer.files import write_text
from moesteer.model_facts import LayerShape
from moesteer.profile import Expert, Profile, Side
from moesteer.profile_fit import check_model, check_ungated
from moesteer.runs import open_run
from moesteer.summaries import as_json, from_json

if TYPE_CHECKING:
    from moesteer.contrast import ContrastPair
    from moesteer.engines.base import Engine

SEARCH_SCHEMA = 1
BUDGET = 48
"""Trials a search: a grid of 7 × 7 numbers without (0, 0)."""
MOST = 1 / 3
"""At most this share of all experts is deactivated."""
BEST = "best.safetensors"


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
    seeds: int
    seed: int
    unsteered: Trial
    best: Trial
    controls: tuple[Found, ...]
    dose: tuple[Trial, ...]
    front: tuple[Trial, ...]
    test: Comparison

    def to_json(self) -> str:
        """The result as one JSON object, with the schema's number."""
        return as_json(self, SEARCH_SCHEMA)

    @classmethod
    def from_json(cls, text: str, where: str | Path = SUMMARY) -> "SearchResult":
        """Read what `to_json` wrote; MoesteerError, beginning with `where`, for anything else."""
        return from_json(cls, text, where, SEARCH_SCHEMA, "a search")


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
    plan = Plan(
        toward, {c.name: least for c, least in prices}, max_kl, optimiser, budget, seeds, seed
    )
    cards = [target, *(card for card, _ in prices)]
    labelled = _labelled(rankings, engine)
    check_numbers(seeds=seeds, seed=seed, batch_size=batch_size)
    _check(cards, plan, len(labelled))
    options = dict(rankings[0].chat_options) | dict(chat_options or {})
    files = data or {}
    tested = with_prices(cards, files)
    check_tasks(tested, files)
    tasks = [
        prepare(engine, card, "dev", files.get(card.name), options, limit, max_new_tokens)
        for card in cards
    ]
    settings = {
        "model": engine.facts.id,
        "model_facts": asdict(engine.facts),
        "rankings": {label: _digest(ranking) for label, ranking in labelled.items()},
        "target": f"{target.name}={target.outcome}",
        "tasks": {task.card.name: identity(task) for task in tasks},
        **asdict(plan),
        "chat_options": options,
        "batch_size": batch_size,
        "max_new_tokens": [task.max_new_tokens for task in tasks],
    }
    with open_run(out, "search", settings, about(command)) as run:
        known = {key_of(trial): trial for trial in (Trial(**r) for r in run.lines("trials"))}
        told = _counter(progress, plan.trials)
        bench = Bench(engine, run, tasks, plan, batch_size, {}, known, told)
        if say is not None:
            say(_cost(bench))
        unsteered = measure_unsteered(bench)
        trials = search_ranking(bench, labelled)
        best = best_or_error(trials)
        profile = replace(chosen_by(labelled, best), chat_options=options, name=words(best))
        profile.made_by(command).save(run.folder / BEST)
        dose = _dose_curve(bench, labelled, best)
        found = {number: _control(bench, labelled, number) for number in range(seeds)}
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
            beside={f"search-matched {n}": pair[1] for n, pair in found.items() if pair},
            say=say,
            command=command,
        )
        result = SearchResult(
            model=engine.facts.id,
            target=target.name,
            outcome=target.outcome,
            **asdict(plan),
            unsteered=unsteered,
            best=best,
            controls=tuple(Found(n, pair and pair[0]) for n, pair in found.items()),
            dose=tuple(dose),
            front=tuple(pareto_front([unsteered, *trials])),
            test=test,
        )
        write_text(run.folder / SUMMARY, result.to_json() + "\n")
    return result


# -- what is tried -------------------------------------------------------------------------------


def search_ranking(
    bench: Bench, rankings: Mapping[str, Profile], control: int | None = None
) -> list[Trial]:
    """All trials of one search over rankings by label, as the plan proposes them."""
    plan = bench.plan
    most = {label: most_experts(ranking, plan.toward) for label, ranking in rankings.items()}

    def measured(label: str, activate: int, deactivate: int) -> Trial:
        return measure(bench, rankings[label], label, (activate, deactivate), "search", control)

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
    """`steps` whole numbers from 1 to `most`, or all of them, growing geometrically.

    Where rounding makes some of them equal, the smallest numbers that are missing take their place:
    every ranking, a control's too, gets as many tries.
    """
    if not most:
        return []
    rungs = {round(n) for n in np.geomspace(1, most, steps)}
    spare = [n for n in range(1, most + 1) if n not in rungs]
    return sorted({*rungs, *spare[: min(steps, most) - len(rungs)]})


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
    bench: Bench, rankings: Mapping[str, Profile], number: int
) -> tuple[Trial, Profile] | None:
    """What the same search finds among randomly ranked experts; None where nothing is allowed."""
    shuffled = {label: shuffled_ranking(ranking, number) for label, ranking in rankings.items()}
    best = best_of(search_ranking(bench, shuffled, control=number))
    if best is None:
        return None
    return best, replace(chosen_by(shuffled, best), name=f"{words(best)}, ranked at random")


def _dose_curve(bench: Bench, rankings: Mapping[str, Profile], best: Trial) -> list[Trial]:
    """The best choice with fewer and with more experts, as far as there are any."""
    ranking = rankings[best.detector]
    up, down = most_experts(ranking, bench.plan.toward)
    numbers = {
        (min(round(best.activate * dose), up), min(round(best.deactivate * dose), down))
        for dose in DOSES
    }
    return [
        measure(bench, ranking, best.detector, pair, "dose", None)
        for pair in sorted(numbers)
        if any(pair)
    ]


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
        if ranking.directions:
            raise MoesteerError(
                f"{ranking.name} uses directions, too, which every choice of experts would; give a"
                " ranking without them."
            )
        check_ungated(ranking, "a search")
        check_model(ranking, engine.facts)
        if ranking.chat_options != rankings[0].chat_options:
            raise MoesteerError(
                f"{ranking.name} and {rankings[0].name} were made with different chat options:"
                f" {ranking.chat_options} and {rankings[0].chat_options}."
            )
    return labelled


def _check(cards: Sequence[Card], plan: Plan, rankings: int) -> None:
    names = [card.name for card in cards]
    if twice := [name for name in names if names.count(name) > 1]:
        raise MoesteerError(f"the task {twice[0]} is named twice among --target and --prices.")
    if plan.budget < 3 * rankings:
        raise MoesteerError(
            f"--budget is {plan.budget}; it must be at least 3 trials a ranking, here"
            f" {3 * rankings}."
        )
    if plan.max_kl is not None and not 0 <= plan.max_kl < float("inf"):
        raise MoesteerError(f"--max-kl is {plan.max_kl}; it must be at least 0, and finite.")


def _digest(ranking: Profile) -> str:
    scores = sorted(scores_by_expert(ranking).items())
    text = repr((scores, ranking.rule, ranking.dose))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cost(bench: Bench) -> str:
    trials = bench.plan.trials
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
