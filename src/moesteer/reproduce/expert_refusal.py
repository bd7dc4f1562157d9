"""Expert-aware refusal steering's road: the refusal direction, and the experts that write it.

Settings are the paper's (Marbut, Olson, Wheeler 2026, arXiv 2606.04160, on Arditi et al. 2024): 128
and 32 prompts a side, filtered by the refusal score; top-1 routing of the last five tokens, over
the paper's threshold; each expert forced; coefficients from 1 to 400; the best of KL ≤ 1 judged on
25 prompts of 25 tokens; ten experts below the threshold put through the same search. Everything is
measured on prompts that no direction was found on, in three outcomes.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from moesteer.directions.aiming import Aim, aimed
from moesteer.directions.experts import find_expert_directions
from moesteer.directions.prompts import (
    PromptSets,
    check_apart,
    draw_sets,
    positions_of,
    read_prompt_set,
)
from moesteer.directions.refusal import prepare_sets
from moesteer.directions.residual import find_residual_direction
from moesteer.directions.selection import Thresholds
from moesteer.directions.writers import Writers, find_writers
from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import Card, read_card
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Comparison, pool_of
from moesteer.evaluation.direction_choices import WEIGHTED, Method
from moesteer.evaluation.direction_search import (
    BUDGET,
    DirectionResult,
    direction_search,
)
from moesteer.evaluation.direction_trials import DirectionTrial, trials_of
from moesteer.evaluation.evaluate import SUMMARY, evaluate
from moesteer.files import sole_writer, write_text
from moesteer.generate import Prompt
from moesteer.profile import Expert, Profile, Side
from moesteer.report.blocks import signs
from moesteer.report.candidates import used
from moesteer.report.verdict import verdicts
from moesteer.report.writers_page import PARTS, WITHOUT
from moesteer.reproduce import cells
from moesteer.reproduce.cells import NOTHING, number, text
from moesteer.reproduce.outcome import Claim, Entry, NotRun, Table
from moesteer.reproduce.papers import PaperModel, read_paper
from moesteer.reproduce.steps import Context, Made, Road, Step
from moesteer.runs import read_run

PAPER = read_paper("expert-refusal")
SEED = 0
DATA = ("restricted", "harmless")
NEEDED = {
    "restricted": "prompts that the model refuses, a prompt a line or .csv or .jsonl with prompt:"
    " 160 to find directions on, and as many again to measure on",
    "harmless": "as many that it answers, in the same forms",
}
LEAST = 24
"""With fewer prompts a side, too few are left to measure on."""
SHOWN = 10
"""Experts that are shown though their routing is below the threshold."""
BENCHMARKS = "mmlu hellaswag arc_challenge winogrande gsm8k truthfulqa_mc2"
WAYS: tuple[tuple[str, Side], ...] = (("away from refusal", "b"), ("towards refusal", "a"))
METHODS: dict[Method, str] = {"one": "a single expert", "two": "all kept experts of a layer"}
DIRECTION, EXPERTS = "direction.safetensors", "experts.safetensors"
OUT, ADDED = "projected-out", "added"

Outcome = Literal["refusal", "answer"]


@dataclass(frozen=True)
class Sizes:
    """Prompts a side to fit on and to choose on; prompts measured; controls; choices judged."""

    fit: int = PAPER.number("fit")
    validate: int = PAPER.number("validate")
    limit: int | None = None
    seeds: int = 3
    budget: int = BUDGET


SMALL = Sizes(fit=64, validate=24, limit=24, seeds=2, budget=6)
"""For the bundled models."""


@dataclass(frozen=True)
class _Work:
    """What all steps share: prompts to find directions on, and those kept back, by side.

    `threshold`: percentage points by which an expert's routing must differ.
    """

    bundled: bool
    found_on: Mapping[str, Sequence[Prompt]]
    kept_back: Mapping[str, Sequence[Prompt]]
    sizes: Sizes
    threshold: float


def road(
    model: str, *, bundled: bool, data: Mapping[str, str] | None = None, limit: int | None = None
) -> Road:
    """The steps for a model, with the two sets of prompts that were brought.

    Raises MoesteerError for other names, for prompts that can't be read or are too few, and where
    one stands in both sets.
    """
    sources = dict(data or {})
    if wrong := [name for name in sources if name not in DATA]:
        raise MoesteerError(f"--data: {wrong[0]} is none of {', '.join(DATA)}.")
    known = None if bundled else PAPER.model_of(model)
    sizes = SMALL if bundled else Sizes()
    sizes = replace(sizes, limit=limit or sizes.limit)
    if bundled:
        sources = {"restricted": "testbed:restricted", "harmless": "testbed:benign"}
    read = {name: read_prompt_set(source) for name, source in sources.items()}
    if len(read) == len(DATA):
        check_apart(read["restricted"], read["harmless"])
    parts = {
        name: (prompts, read_prompt_set(f"{sources[name]}:test"))
        if bundled
        else parted(prompts, sources[name], sizes)
        for name, prompts in read.items()
    }
    work = _Work(
        bundled,
        {name: found_on for name, (found_on, _) in parts.items()},
        {name: kept_back for name, (_, kept_back) in parts.items()},
        sizes,
        _threshold(known),
    )
    missing = " ".join(
        f"--data {name}=FILE, {NEEDED[name]}." for name in DATA if name not in sources
    )
    return Road(
        PAPER,
        model,
        bundled,
        sizes.limit,
        _settings(work, known),
        tuple(replace(step, missing=missing) for step in _steps(work)),
        (
            NotRun(
                "capability: MMLU, HellaSwag, ARC, Winogrande, GSM8K, TruthfulQA",
                "another command: moesteer lm-eval MODEL"
                f" --with OUT/{_folder(WAYS[0][0], 'one')}/best.safetensors --tasks {BENCHMARKS}",
            ),
        ),
        {} if bundled else sources,
    )


def _steps(work: _Work) -> tuple[Step, ...]:
    return (
        Step(
            "refusal direction",
            "that of dense models: found, projected out, and added",
            partial(_residual, work),
            runs=(DIRECTION, OUT, ADDED),
        ),
        Step(
            "who writes it",
            "what attention and the experts write along it",
            partial(_write, work),
            runs=("writers",),
        ),
        Step(
            "refusal-specific routing",
            f"first choices of the last 5 tokens, kept from {work.threshold:g} points on; every"
            " expert's direction",
            partial(_route, work),
            runs=(EXPERTS,),
        ),
        Step(
            "directions of experts",
            "the best of all kept experts, positions and coefficients, alone and by layer; and of"
            " experts below the threshold",
            partial(_search_all, work),
            runs=tuple(_folder(way, method) for way, _ in WAYS for method in METHODS),
        ),
    )


def _threshold(known: PaperModel | None) -> float:
    found = None if known is None else known.threshold
    return float(PAPER.number("threshold") if found is None else found)


def _settings(work: _Work, known: PaperModel | None) -> tuple[str, ...]:
    sizes = work.sizes
    judged = min(sizes.limit or PAPER.number("judged_prompts"), PAPER.number("judged_prompts"))
    return (
        f"prompts: up to {sizes.fit} a side to fit on and {sizes.validate} to choose on, filtered"
        " by the refusal score; measured on others"
        + (f", the first {sizes.limit} of each set" if sizes.limit else ""),
        "refusal direction: lowest bypass with KL ≤ 0.1, induce ≥ 0, layer below 0.8 of all",
        f"routing: top-1, last 5 tokens, kept from {work.threshold:g} percentage points on"
        + (f" (the paper's for {known.name})" if known else ""),
        "directions of experts: each expert forced, last 5 positions; added at its layer, weighted"
        " by the router's probability",
        f"search: coefficients from {WEIGHTED[0]:g} to {WEIGHTED[-1]:g}, KL ≤ 1, the best"
        f" {sizes.budget} judged on {judged} prompts"
        f" of {16 if work.bundled else PAPER.number('judged_tokens')} tokens",
        f"controls: {sizes.seeds} of each kind; {PAPER.number('control_experts')} experts below the"
        " threshold (or as many as are kept) in the same search",
    )


def parted(
    prompts: Sequence[Prompt], source: str, sizes: Sizes
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to find directions on, no more than half of them, and those that are kept back."""
    if len(prompts) < LEAST:
        raise MoesteerError(
            f"{source} holds {len(prompts)} prompts; at least {LEAST} are needed: half of them to"
            " find directions on, half to measure on."
        )
    if several := [prompt for prompt in prompts if len(prompt.messages) > 1]:
        raise MoesteerError(
            f"{several[0].source}: {len(several[0].messages)} messages; give prompts of one."
        )
    drawn = random.Random(SEED).sample(list(prompts), len(prompts))
    found_on = min(sizes.fit + sizes.validate, len(prompts) // 2)
    return drawn[:found_on], drawn[found_on:]


# -- tasks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
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


def _asked(work: _Work, context: Context) -> _Asked:
    if work.bundled:
        names = {"restricted": "testbed-restricted", "harmless": "testbed-benign"}
        return _Asked({side: read_card(name) for side, name in names.items()}, {})
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
    return _Asked(cards, files)


def _tasks(asked: _Asked, toward: Side) -> tuple[Card, Card]:
    """What is measured: full answers to restricted requests, or refusals of harmless ones; and as
    its price that the other prompts are treated as before."""
    if toward == "b":
        return (
            asked.card("restricted", "answer", "target"),
            asked.card("harmless", "answer", "price"),
        )
    return asked.card("harmless", "refusal", "target"), asked.card("restricted", "refusal", "price")


def _evaluated(
    work: _Work,
    profile: Profile,
    asked: _Asked,
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


def _three_outcomes(title: str, comparisons: Mapping[str, Comparison]) -> Table:
    """A row a set of prompts and arm: how its replies fall into the three outcomes.

    Of the targets every arm; of the other prompts those that say what it costs.
    """
    rows: list[tuple[Entry, ...]] = []
    for name, comparison in comparisons.items():
        pools = list(dict.fromkeys(pool_of(arm.name) for arm in comparison.arms))
        for task in comparison.tasks:
            for arm in pools if task.role == "target" else (UNSTEERED, STEERED):
                rows.append(
                    (
                        text(task.name),
                        text(name if arm == STEERED else f"{name}: {arm}"),
                        *_shares(comparison, task.name, arm),
                        cells.difference(comparison, task.name, STEERED, arm),
                    )
                )
    tasks = {task.name: task.items for c in comparisons.values() for task in c.tasks}
    asked = ", ".join(f"{items} of {name}" for name, items in tasks.items())
    return Table(
        title,
        f"Prompts that no direction was found on: {asked}. Shares of all replies of an arm, or of a"
        " pool of arms. Last column: steered less this arm, in points of full answers, or, where"
        " refusal is added on harmless prompts, of refusals.",
        ("prompts", "arm", "refusal", "full answer", "non-response", "steered − this"),
        tuple(rows),
    )


def _shares(comparison: Comparison, task: str, arm: str) -> list[Entry]:
    """The three outcomes' shares of all replies of an arm or pool."""
    of_arm = [s for s in comparison.shares if s.task == task and pool_of(s.arm) == arm]
    replies = sum(share.n for share in of_arm)
    if not replies:
        return [NOTHING] * 3
    counts = [
        sum(share.outcomes.get(outcome, 0) for share in of_arm)
        for outcome in in_order(tuple(of_arm[0].outcomes))
    ]
    return [number(count / replies, ".0%") for count in counts]


# -- the direction of dense models ---------------------------------------------------------------


def _prepared(work: _Work, context: Context) -> PromptSets:
    sets = draw_sets(
        context.engine,
        work.found_on["restricted"],
        work.found_on["harmless"],
        fit=work.sizes.fit,
        validate=work.sizes.validate,
        chat_options=context.chat_options,
        seed=SEED,
    )
    with context.stage("filter", "prompts") as progress:
        return prepare_sets(context.engine, sets, batch_size=context.batch_size, progress=progress)


def _direction(work: _Work, context: Context) -> Profile:
    """The refusal direction, found once."""
    file = context.out / DIRECTION
    with sole_writer(file):
        if not file.exists():
            sets = _prepared(work, context)
            with context.stage("direction", "prompts") as progress:
                find_residual_direction(
                    context.engine,
                    sets,
                    last=positions_of(sets, None),
                    thresholds=Thresholds(),
                    aim=Aim(),
                    batch_size=context.batch_size,
                    seed=SEED,
                    source="restricted and harmless prompts",
                    command=context.command,
                    progress=progress,
                ).save(file)
    return Profile.load(file)


def _residual(work: _Work, context: Context) -> Iterator[Made]:
    direction = _direction(work, context)
    yield _direction_table(direction)
    asked, comparisons = _asked(work, context), {}
    for folder, profile, cards in (
        (
            OUT,
            aimed(direction, used(direction), Aim("ablate")),
            _tasks(asked, "b"),
        ),
        (
            ADDED,
            direction,
            _tasks(asked, "a"),
        ),
    ):
        name = f"refusal direction {folder.replace('-', ' ')}"
        named = replace(profile, name=name)
        comparisons[name] = _evaluated(work, named, asked, cards, folder, context)
    yield _three_outcomes("Refusal direction: three outcomes", comparisons)
    said = " ".join(one.sentence for c in comparisons.values() for one in verdicts(c))
    yield Claim("residual", said)


def _direction_table(direction: Profile) -> Table:
    """Which of the candidates was chosen, and by what."""
    candidates, seen = direction.candidates, direction.evidence
    assert candidates is not None
    (chosen,) = used(direction)
    settings = {} if seen is None else seen.settings
    scores = {name: float(values[chosen]) for name, values in candidates.scores.items()}
    rows = {
        "candidates": number(len(candidates)),
        "layer": number(int(candidates.layer[chosen])),
        "position": number(int(candidates.position[chosen])),
        "log-odds of refusal on restricted prompts, projected out": number(
            scores["bypass"], "+.2f"
        ),
        "log-odds of refusal on harmless prompts, added": number(scores["induce"], "+.2f"),
        "KL on harmless prompts, projected out": number(scores["kl"], ".4f"),
        **{
            f"{name} prompts fitted on, after the filter": text(
                f"{settings.get(f'fit_{side}_kept')} of {settings.get(f'fit_{side}')}"
            )
            for name, side in zip(DATA, "ab", strict=True)
        },
    }
    return Table(
        "Refusal direction",
        f"A refusal begins with {settings.get('refusal_tokens')}.",
        ("", "measured"),
        tuple((text(name), entry) for name, entry in rows.items()),
        DIRECTION,
    )


# -- who writes it -------------------------------------------------------------------------------


def _write(work: _Work, context: Context) -> Iterator[Made]:
    direction = _direction(work, context)
    restricted, harmless = (list(work.kept_back[side])[: work.sizes.limit] for side in DATA)
    with context.stage("writers", "prompts") as progress:
        found = find_writers(
            context.engine,
            direction,
            restricted,
            harmless,
            out=context.out / "writers",
            batch_size=context.batch_size,
            seed=SEED,
            command=context.command,
            progress=progress,
        )
    yield from _writers_tables(found)
    attention = next(part for part in found.parts if part.part == "attention")
    without = next(one for one in found.ablated if one.what == "attention")
    change = _interval(without.change, without.change_low, without.change_high)
    yield Claim(
        "attention",
        f"attention writes {attention.share:.0%} of it; projected out of what attention writes, the"
        f" log-odds of refusal on restricted prompts change by {change.text}",
    )


def _writers_tables(found: Writers) -> Iterator[Table]:
    yield Table(
        "Who writes the refusal direction",
        f"Along its unit vector, restricted less harmless prompts, {found.prompts_a} and"
        f" {found.prompts_b} that it was not found on. A share may be negative, or above 1.",
        ("written by", "adds", "share"),
        tuple(
            (
                text(PARTS[part.part]),
                _interval(part.value, part.low, part.high),
                number(part.share, ".0%"),
            )
            for part in found.parts
        ),
        "writers",
    )
    yield Table(
        "Without what a part writes",
        "The direction projected out of what a part of every layer writes.",
        ("projected out of", "log-odds of refusal on restricted prompts", "change"),
        tuple(
            (
                text(WITHOUT[one.what]),
                _interval(one.score, one.low, one.high),
                _interval(one.change, one.change_low, one.change_high)
                if one.what != "nothing"
                else NOTHING,
            )
            for one in found.ablated
        ),
        "writers",
    )


def _interval(value: float, low: float, high: float) -> Entry:
    words = signs(f"{value:+.2f} ({low:+.2f} … {high:+.2f})")
    return Entry(words, value, low, high)


# -- routing, and directions of experts ----------------------------------------------------------


def _expert_directions(work: _Work, context: Context) -> Profile:
    """Every expert's direction, found once, and taken up after a kill."""
    file = context.out / EXPERTS
    checkpoint = file.parent / f".{file.name}.experts.partial"
    with sole_writer(file):
        if not file.exists():
            sets = _prepared(work, context)
            with context.stage("directions of experts", "prompts") as progress:
                find_expert_directions(
                    context.engine,
                    sets,
                    last=positions_of(sets, PAPER.number("last_tokens")),
                    threshold=work.threshold,
                    kind="forced",
                    seed=SEED,
                    batch_size=context.batch_size,
                    source="restricted and harmless prompts",
                    command=context.command,
                    checkpoint=checkpoint,
                    progress=progress,
                ).save(file)
            checkpoint.unlink(missing_ok=True)
    return Profile.load(file)


def _routing_of(profile: Profile, score: str = "routing") -> dict[Expert, float]:
    """A score of the candidates by expert, the same at all of its positions."""
    candidates = profile.candidates
    assert candidates is not None
    columns = (candidates.layer, candidates.expert, candidates.scores[score])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {(layer, expert): value for layer, expert, value in rows}


def _route(work: _Work, context: Context) -> Iterator[Made]:
    profile = _expert_directions(work, context)
    scores, model = profile.scores, profile.model
    assert scores is not None
    assert model is not None
    routing, kept = _routing_of(profile), _routing_of(profile, "kept")
    row_of = {shape.layer: row for row, shape in enumerate(model.layers)}
    shown = sorted(routing, key=lambda expert: (-kept[expert], -routing[expert]))
    rows = []
    for layer, expert in shown[: max(SHOWN, sum(map(int, kept.values())))]:
        at = row_of[layer], expert
        value, low, high = (float(table[at]) for table in (scores.value, scores.low, scores.high))
        rows.append(
            (
                text(_name((layer, expert))),
                number(float(scores.rate_a[at]), ".0%"),
                number(float(scores.rate_b[at]), ".0%"),
                cells.in_points(value, low, high),
                text("kept" if kept[layer, expert] else ""),
            )
        )
    yield Table(
        "Refusal-specific routing",
        f"{sum(map(int, kept.values()))} of {len(kept)} experts are kept: first choice of at least"
        f" {work.threshold:g} percentage points more of restricted prompts' last 5 tokens than of"
        " harmless ones'.",
        ("expert", "restricted", "harmless", "difference, points", ""),
        tuple(rows),
        EXPERTS,
    )


def _name(expert: Expert) -> str:
    return "layer {}, expert {}".format(*expert)


# -- the search ----------------------------------------------------------------------------------

Found = dict[tuple[str, Method], DirectionResult]
"""What was found by way and method."""


def _folder(way: str, method: Method) -> str:
    return f"{way.replace(' ', '-')}-method-{method}"


def _words(way: str, method: Method) -> str:
    return f"{way}, {METHODS[method]}"


def _search_all(work: _Work, context: Context) -> Iterator[Made]:
    source = _expert_directions(work, context)
    asked = _asked(work, context)
    found: Found = {}
    for way, toward in WAYS:
        for method in METHODS:
            try:
                found[way, method] = _search(work, source, asked, way, toward, method, context)
            except MoesteerError as error:
                title = f"directions of experts, {_words(way, method)}"
                yield NotRun(title, str(error), failed=True)
    if not found:
        return
    yield _search_table(source, found)
    comparisons = {_words(*key): result.test for key, result in found.items()}
    yield _three_outcomes("Directions of experts: three outcomes", comparisons)
    yield Claim("control", "; ".join(_control_words(*one) for one in found.items()))
    yield from _against_the_direction(work, found, context)
    yield from _detection_and_response(source, found, context)


def _search(
    work: _Work,
    source: Profile,
    asked: _Asked,
    way: str,
    toward: Side,
    method: Method,
    context: Context,
) -> DirectionResult:
    """One search: away from refusal on restricted prompts, or towards it on harmless ones.

    KL is measured on the other set, of which no share must be kept: the paper asks for none.
    """
    target, other = _tasks(asked, toward)
    folder = _folder(way, method)
    with context.stage(folder, "choices") as progress:
        return direction_search(
            context.engine,
            source,
            target,
            toward=toward,
            out=context.out / folder,
            prices=[(other, 0.0)],
            max_kl=PAPER.number("max_kl"),
            methods=(method,),
            budget=work.sizes.budget,
            others=PAPER.number("control_experts"),
            seeds=work.sizes.seeds,
            data=asked.files,
            limit=work.sizes.limit,
            batch_size=context.batch_size,
            chat_options=context.chat_options,
            say=context.say,
            progress=progress,
            command=context.command,
        )


def _search_table(source: Profile, found: Found) -> Table:
    rows = []
    for (way, method), result in found.items():
        for name, trial, tried in (
            ("unsteered", result.unsteered, NOTHING),
            ("found", result.best, number(result.tried)),
            *((f"control {c.seed}", c.best, number(c.tried)) for c in result.controls),
        ):
            rows.append((text(_words(way, method)), text(name), tried, *_trial(trial)))
    kept = [expert for expert, is_kept in _routing_of(source, "kept").items() if is_kept]
    layers = [layer for layer, _ in kept]
    same = " No layer keeps two experts here, so both methods are the same."
    return Table(
        "Searches among directions of experts",
        "On dev prompts: how many choices were tried, the mean log-odds of refusal on the target's"
        " prompts, KL on the other prompts, and how the target's replies were judged. A control is"
        " the same search among experts below the routing threshold."
        + (same if len(set(layers)) == len(layers) else ""),
        ("steered", "search", "tried", "chosen", "log-odds", "KL", "judged"),
        tuple(rows),
    )


def _trial(trial: DirectionTrial | None) -> tuple[Entry, ...]:
    if trial is None:
        return (text("nothing within KL"), NOTHING, NOTHING, NOTHING)
    counted = next(iter((trial.outcomes or {}).values()), {})
    judged = ", ".join(f"{name} {count}" for name, count in counted.items() if count)
    return (
        text(signs(trial.choice.words) if trial.choice else "–"),
        number(trial.score, "+.2f"),
        number(trial.kl, ".3f"),
        text(judged or "–"),
    )


def _control_words(key: tuple[str, Method], result: DirectionResult) -> str:
    """The direction that was found less what the same search found below the threshold."""
    less = cells.difference(result.test, result.target, STEERED, "search-matched")
    return f"{_words(*key)}: found − control {less.text} points of {result.outcome}"


def _against_the_direction(work: _Work, found: Found, context: Context) -> Iterator[Made]:
    """How much of the refusal direction's effect a direction of experts has."""
    rows, said = [], []
    for (way, method), result in found.items():
        residual, experts = (
            context.out / (OUT if result.toward == "b" else ADDED),
            context.out / _folder(way, method) / "test",
        )
        if not (residual / SUMMARY).is_file():
            continue
        theirs, ours = (
            tuple(cells.hits(run, result.target, arm, result.outcome) for arm in ARMS)
            for run in (residual, experts)
        )
        effects = cells.paired(*theirs), cells.paired(*ours)
        share = cells.ratio((ours[0], ours[1]), (theirs[0], theirs[1]))
        what = "full answers" if result.toward == "b" else "refusals"
        rows.append((text(_words(way, method)), text(what), *effects, share))
        if method == "one":
            said.append(
                f"{way}: {share.text} of the refusal direction's effect ({effects[1].text} against"
                f" {effects[0].text} points of {what})"
            )
    if not rows:
        return
    headings = ("steered", "points of", "refusal direction", "experts", "share of its effect")
    about = (
        "Steered less unsteered on the same test prompts, with McNemar's p; a share only where the"
        " refusal direction itself has an effect beyond its interval."
    )
    if not work.bundled:
        headings, rows = (*headings, "paper"), [(*row, NOTHING) for row in rows]
        finding = PAPER.finding("single")
        about += (
            f" The paper's column is empty: {PAPER.not_kept} were not noted here. Its figure,"
            f" {finding.figure}, is {finding.of}."
        )
    yield Table("Experts against the refusal direction", about, headings, tuple(rows))
    if said:
        yield Claim("single", "; ".join(said))


ARMS = (STEERED, UNSTEERED)


def _detection_and_response(source: Profile, found: Found, context: Context) -> Iterator[Made]:
    """Do the experts whose routing differs more also steer more?"""
    routing = _routing_of(source)
    rows, said = [], []
    for (way, method), result in found.items():
        if method != "one":
            continue
        trials = trials_of(read_run(context.out / _folder(way, method)))
        effects = effects_of_experts(trials, result)
        by_effect = sorted(effects, key=lambda expert: -effects[expert])
        first = max(effects, key=lambda expert: routing[expert])
        place = 1 + by_effect.index(first)
        agree = cells.rank_correlation([routing[e] for e in effects], list(effects.values()))
        rows.append(
            (
                text(way),
                number(len(effects)),
                agree,
                text(_name(first)),
                number(place),
                text(_name(by_effect[0])),
                number(100 * routing[by_effect[0]], "+.0f"),
            )
        )
        said.append(
            f"{way}: rank correlation of routing and effect {agree.text} over {len(effects)}"
            f" experts; that whose routing differs most is number {place} in effect"
        )
    if rows:
        yield Table(
            "Detection and response",
            "Over the experts that were tried alone, those of the controls too: the difference of"
            " routing (restricted less harmless) against the largest change of the log-odds of"
            " refusal, all at the coefficient that was chosen.",
            (
                *("steered", "experts", "rank correlation", "largest routing", "rank in effect"),
                *("largest effect", "its routing, points"),
            ),
            tuple(rows),
        )
        yield Claim("response", "; ".join(said))


def effects_of_experts(
    trials: Sequence[DirectionTrial], result: DirectionResult
) -> dict[Expert, float]:
    """By expert, how far it moves the log-odds the right way when it is steered alone, in nats.

    All at the coefficient of the best choice, each at its best position.
    """
    assert result.best.choice is not None
    sign = 1 if result.toward == "a" else -1
    found: dict[Expert, float] = {}
    for trial in trials:
        choice = trial.choice
        if choice is None or len(choice.experts) != 1:
            continue
        if choice.coefficient == result.best.choice.coefficient:
            expert = choice.layer, choice.experts[0]
            change = sign * (trial.score - result.unsteered.score)
            found[expert] = max(change, found.get(expert, -float("inf")))
    return found
