"""SteerMoE's road: find experts on contrast pairs, steer them, and see what it does and costs.

Settings are the paper's (Fayyaz et al. 2025, arXiv 2509.09660): risk difference over target spans,
experts ranked over all layers by |Δ|, its own rule, greedy replies of up to 512 tokens, thinking
off, its judges; for its six models its numbers of experts. What goes beyond it: numbers for other
models are chosen on dev prompts and measured on others, and controls stand beside everything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moesteer.contrast import ContrastPair, read_pairs
from moesteer.detection.selecting import experts_table, ranked_experts, scores_by_expert
from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import Card
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Comparison
from moesteer.evaluation.evaluate import evaluate
from moesteer.evaluation.judge_check import check_judges, told
from moesteer.evaluation.search import BEST, BUDGET, SearchResult, detected_beside, search
from moesteer.profile import Expert, LayerShape, ModelFacts, Profile, Side
from moesteer.report.verdict import verdicts
from moesteer.reproduce import cells
from moesteer.reproduce.cells import NOTHING, number, text
from moesteer.reproduce.given import Tasks, bundled_tasks, given_tasks
from moesteer.reproduce.outcome import Claim, Entry, NotRun, Table
from moesteer.reproduce.papers import PaperModel, read_paper
from moesteer.reproduce.steps import Context, Made, Road, Step, listed

PAPER = read_paper("steermoe")
FALSE_DISCOVERIES = 0.05
FLUENT = 0.9
"""The least share of fluent replies where numbers of experts are chosen."""
CONTROL_SEARCHES = 1
FRACTIONS = (0.25, 0.5, 1.0)
"""Of all experts that can be activated: how many are activated, or deactivated, for fluency."""

FAITHFULNESS = (
    "mquake",
    "cf-triviaqa",
    "faitheval-counterfactual",
    "faitheval-unanswerable",
    "faitheval-inconsistent",
)
SAFETY = ("tdc2023", "maliciousinstruct", "advbench", "strongreject")
FOR_FAITHFULNESS = ("mctest", "harmless-100", "fluency")
FOR_SAFETY = ("harmless-100", "fluency")
PAIRS = {
    "document": "from lines of document and question (moesteer pairs document)",
    "refusal": "from lines of prompt and reply (moesteer pairs refusal)",
}


@dataclass(frozen=True)
class Aim:
    """Which way is steered: towards a side of a behaviour's pairs, measured on which tasks."""

    key: str
    title: str
    behaviour: str
    toward: Side
    targets: tuple[str, ...]
    prices: tuple[str, ...]

    @property
    def folder(self) -> str:
        return self.title.replace(" ", "-")


AIMS = (
    Aim("faithful", "towards faithful", "document", "a", FAITHFULNESS, FOR_FAITHFULNESS),
    Aim("safe", "towards safe", "refusal", "a", SAFETY, FOR_SAFETY),
    Aim("unsafe", "away from safe", "refusal", "b", SAFETY, FOR_SAFETY),
)
STAND_INS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "document": (("testbed-document",), ("testbed-copying", "testbed-benign", "testbed-fluency")),
    "refusal": (("testbed-restricted",), ("testbed-benign", "testbed-fluency")),
}
"""The testbed's tasks in place of the paper's, by behaviour: targets and prices."""


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each task, controls of each kind, and tries for numbers of experts."""

    limit: int | None = None
    seeds: int = 3
    budget: int = BUDGET


SMALL = Sizes(limit=24, seeds=2, budget=15)
"""For the bundled models."""


@dataclass(frozen=True)
class _Work:
    """What all steps share; `known` is the paper's model of this name, if it has one."""

    known: PaperModel | None
    bundled: bool
    sources: Mapping[str, str]
    pairs: Mapping[str, Sequence[ContrastPair]]
    tasks: Tasks
    sizes: Sizes
    aims: tuple[Aim, ...]

    def aim(self, key: str) -> Aim:
        return next(aim for aim in self.aims if aim.key == key)


def road(
    model: str,
    *,
    bundled: bool,
    pairs: Mapping[str, str] | None = None,
    data: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Road:
    """The steps for a model, with what was brought: contrast pairs by behaviour, prompts by task.

    Raises MoesteerError for names that are none, and for data that can't be read.
    """
    sources = dict(pairs or {})
    known = None if bundled else PAPER.model_of(model)
    if wrong := [name for name in sources if name not in PAIRS]:
        raise MoesteerError(f"--pairs: {wrong[0]} is none of {', '.join(PAIRS)}.")
    if bundled:
        sources = {behaviour: f"testbed:{behaviour}" for behaviour in PAIRS}
        aims = tuple(
            replace(aim, targets=targets, prices=prices)
            for aim in AIMS
            for targets, prices in [STAND_INS[aim.behaviour]]
        )
        tasks, sizes = bundled_tasks(_names(aims)), SMALL
    else:
        aims = AIMS
        splits = ("test",) if known else ("dev", "test")
        tasks, sizes = given_tasks(_names(aims), data or {}, splits), Sizes()
    work = _Work(
        known,
        bundled,
        sources,
        {behaviour: read_pairs(source) for behaviour, source in sources.items()},
        tasks,
        replace(sizes, limit=limit or sizes.limit),
        aims,
    )
    return Road(
        PAPER,
        model,
        bundled,
        work.sizes.limit,
        _settings(work),
        (
            _judging(work),
            *(_detection(work, behaviour) for behaviour in PAIRS),
            _numbers(work),
            *(_steering(work, aim) for aim in aims),
            _ablation(work),
            _fluency(work),
        ),
        tuple(_absent(work)),
        {} if bundled else {f"pairs {name}": file for name, file in sources.items()} | tasks.files,
    )


def _names(aims: Sequence[Aim]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for aim in aims for name in (*aim.targets, *aim.prices)))


def _settings(work: _Work) -> tuple[str, ...]:
    sizes = work.sizes
    tokens = PAPER.number("max_new_tokens")
    known = work.known
    return (
        "detector: risk difference over the target spans, ranked over all layers by its size",
        "rule: the paper's, on the log-softmax of the router's logits, ε = 0.01",
        "numbers of experts: "
        + (f"the paper's for {known.name}" if known else "chosen on dev prompts, as below"),
        "replies: greedy, "
        + ("up to 16 tokens, as the testbed's tasks say" if work.bundled else f"{tokens} tokens"),
        "prompts: the test split of each task"
        + (f", the first {sizes.limit} of it" if sizes.limit else ""),
        f"controls: reversed, bottom-ranked, and {sizes.seeds} each of random and matched experts",
    )


def _absent(work: _Work) -> Iterator[NotRun]:
    """Each task that is not here, once, with the steps that would ask it."""
    for name, missing in work.tasks.missing.items():
        steps = [aim.title for aim in work.aims if name in (*aim.targets, *aim.prices)]
        steps += ["activation against deactivation"] * (name == "fluency")
        yield NotRun(f"{name} ({', '.join(steps)})", missing)
    if "strongreject" not in work.tasks.own:
        yield NotRun(
            "through a prompt template (away from safe)",
            "none is shipped: copy the card (moesteer tasks strongreject), write yours as its"
            " template, and give --data MY_CARD.toml=FILE.",
        )


def _lacks(work: _Work, behaviour: str, targets: Sequence[str] = ()) -> str:
    """What a step lacks: pairs, or any of the targets; empty where all is here."""
    if behaviour not in work.sources:
        return f"contrast pairs: --pairs {behaviour}=FILE, {PAIRS[behaviour]}."
    if targets and not any(name in work.tasks.cards for name in targets):
        return f"prompts of a task: --data TASK=FILE, of {', '.join(targets)}."
    return ""


# -- can the judges be believed? -----------------------------------------------------------------


def _judging(work: _Work) -> Step:
    names = tuple(work.tasks.cards) if work.bundled else ()
    return Step(
        "judges",
        f"what their judges see of controlled changes: {', '.join(names)}",
        partial(_judge, work),
        ""
        if work.bundled
        else "replies of known outcome, for each task: moesteer judge check TASK"
        " --gold FILE --out OUT/judge-TASK; what it finds then stands beside the numbers.",
        tuple(f"judge-{name}" for name in names),
    )


def _judge(work: _Work, context: Context) -> Iterator[Made]:
    rows = []
    for name, card in work.tasks.cards.items():
        with context.stage(f"judge of {name}", "replies") as progress:
            check = check_judges(
                card,
                context.engine,
                out=str(context.out / f"judge-{name}"),
                chat_options=context.chat_options,
                command=context.command,
                progress=progress,
            )
        rows.append((text(name), text(check.judge), text(told(check))))
    yield Table(
        "Judges",
        "On replies of known outcome, as they are and changed one way at a time.",
        ("task", "judge", "what it sees"),
        tuple(rows),
    )


# -- which experts -------------------------------------------------------------------------------


def _detection(work: _Work, behaviour: str) -> Step:
    return Step(
        f"experts of {behaviour}",
        f"risk difference of every expert on contrast pairs of {behaviour}",
        partial(_detect, work, behaviour),
        _lacks(work, behaviour),
    )


def _detect(work: _Work, behaviour: str, context: Context) -> Iterator[Made]:
    scores = _scores(work, behaviour, "risk-difference", context)
    seen = scores.evidence
    assert seen is not None
    value, q = scores_by_expert(scores), experts_table(scores, "q")
    differ = sum(one < FALSE_DISCOVERIES for one in q.values()) / len(q)
    sides = sorted((seen.tokens_a, seen.tokens_b))
    longer = sides[1] / max(sides[0], 1)
    strongest = ranked_experts(scores)[0]
    rows = {
        "contrast pairs": number(seen.pairs),
        "target tokens of A": number(seen.tokens_a),
        "target tokens of B": number(seen.tokens_b),
        "the longer side's tokens, for one of the shorter's": number(longer, ".1f"),
        "experts": number(len(value)),
        "share that differ between the sides (q < 0.05, by pair)": number(differ, ".0%"),
        f"largest |Δ|: layer {strongest[0]}, expert {strongest[1]}": number(
            abs(value[strongest]), ".3f"
        ),
        "rank correlation of split halves": number(seen.stability, ".2f"),
    }
    yield Table(
        f"Experts of {behaviour}",
        f"From {seen.source}. Pairs are resampled, never tokens.",
        ("", "measured"),
        tuple((text(name), entry) for name, entry in rows.items()),
        f"{behaviour}.risk-difference.safetensors",
    )
    if behaviour == "refusal":
        yield Claim("spans", f"{longer:.1f}×, of {seen.pairs} pairs")
        yield Claim("significant", f"{differ:.0%} by pair (q < 0.05)")


def _scores(work: _Work, behaviour: str, detector: str, context: Context) -> Profile:
    """All experts' scores, detected once, under the paper's rule."""
    with context.stage("detect", "tokens") as progress:
        found = detected_beside(
            context.engine,
            work.pairs[behaviour],
            detector,
            out=context.out / behaviour,
            source=work.sources[behaviour],
            chat_options=context.chat_options,
            command=context.command,
            progress=progress,
        )
    return replace(found, rule="paper")


# -- how many ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Experts by the paper's way of choosing; `left_out` had no room in their layer, `short` is
    how many more were asked for than have a score of that sign."""

    profile: Profile
    left_out: tuple[Expert, ...]
    short: int


def as_published(scores: Profile, activate: int, deactivate: int, toward: Side) -> Chosen:
    """The strongest experts of either sign, as many as the paper says, of all layers together.

    A layer can't activate more than k experts, nor deactivate more than all but k. Of a surplus the
    weakest are left out, where the authors' code drops them without a word.
    """
    assert scores.model is not None
    sign = 1 if toward == "a" else -1
    value = scores_by_expert(scores)
    ranked = ranked_experts(scores)
    wanted_up = [e for e in ranked if sign * value[e] > 0][:activate]
    wanted_down = [e for e in ranked if sign * value[e] < 0][:deactivate]
    up = _with_room(wanted_up, scores.model.layers, lambda shape: shape.top_k)
    down = _with_room(wanted_down, scores.model.layers, lambda s: s.experts - s.top_k)
    wanted = (*wanted_up, *wanted_down)
    profile = replace(
        scores,
        activated=tuple(up),
        deactivated=tuple(down),
        toward=toward,
        name=f"{len(up)} activated, {len(down)} deactivated",
    )
    left_out = tuple(expert for expert in wanted if expert not in {*up, *down})
    return Chosen(profile, left_out, activate + deactivate - len(wanted))


def _with_room(
    ranked: Sequence[Expert], layers: Sequence[LayerShape], room: Callable[[LayerShape], int]
) -> list[Expert]:
    """The first of each layer, as many as it has room for, in the order given."""
    left = {shape.layer: room(shape) for shape in layers}
    kept = []
    for layer, expert in ranked:
        if left[layer]:
            left[layer] -= 1
            kept.append((layer, expert))
    return kept


def is_of_the_paper(known: PaperModel | None, facts: ModelFacts) -> bool:
    """Whether a model of the paper's name also has the shape that the paper gives it."""
    if known is None:
        return False
    shapes = {(shape.experts, shape.top_k) for shape in facts.layers}
    return (len(facts.layers), shapes) == (known.layers, {(known.experts, known.top_k)})


def _numbers(work: _Work) -> Step:
    ready = [aim for aim in work.aims if not _lacks(work, aim.behaviour, aim.targets)]
    return Step(
        "numbers of experts",
        f"the paper's numbers for {work.known.name}"
        if work.known
        else f"numbers chosen on dev prompts: {', '.join(aim.title for aim in ready)}",
        partial(_choose_all, work, ready),
        "" if ready else "pairs and prompts of a task that they are for, as said below.",
        tuple(f"{aim.folder}-numbers" for aim in ready),
    )


def _choose_all(work: _Work, aims: Sequence[Aim], context: Context) -> Iterator[Made]:
    of_paper = is_of_the_paper(work.known, context.engine.facts)
    rows, searches = [], []
    for aim in aims:
        scores = _scores(work, aim.behaviour, "risk-difference", context)
        try:
            if of_paper and work.known is not None:
                chosen = as_published(scores, *work.known.numbers[aim.key], aim.toward)
                how = f"the paper's for {work.known.name}"
            else:
                chosen, result = _searched(work, aim, scores, context)
                how = f"{result.budget} tries on dev prompts of {result.target}"
                searches.append(_search_row(aim, result))
        except MoesteerError as error:
            yield NotRun(f"numbers of experts, {aim.title}", str(error), failed=True)
            continue
        profile = replace(chosen.profile, chat_options=context.chat_options)
        profile.made_by(context.command).save(context.out / f"{aim.folder}.safetensors")
        rows.append(_numbers_row(work, aim, chosen, how, of_paper))
        if aim.key == "unsafe":
            yield Claim("weakest", f"|Δ| = {rows[-1][5].text}, {aim.title}")
    about = "Activated/deactivated. left out: a layer has no room for more than k activated experts"
    about += ", where the authors' code drops a surplus in silence."
    if work.known and not of_paper:
        about += (
            f" The model is called like the paper's {work.known.name} but has another shape, so the"
            " paper's numbers were not used."
        )
    elif not of_paper:
        about += (
            " Chosen on dev prompts of the first task, within a share of fluent replies of"
            f" {FLUENT:.0%} where fluency is measured; the paper chose on the task itself and"
            " describes no held-out prompts."
        )
    headings = ("steered", "activated/deactivated", "left out", "from", "largest |Δ|")
    headings = (*headings, "smallest |Δ|")
    yield Table(
        "Numbers of experts",
        about,
        headings if work.bundled else (*headings, "paper"),
        tuple(rows),
    )
    if searches:
        yield Table(
            "How the numbers were chosen",
            "On dev, and once on test prompts. Control: the same search among experts ranked at"
            " random.",
            (
                *("steered", "outcome", "unsteered, dev", "found, dev", "control, dev"),
                *("unsteered, test", "found, test", "control, test", "found − control, test"),
            ),
            tuple(searches),
        )


def _search_row(aim: Aim, result: SearchResult) -> tuple[Entry, ...]:
    """What a search and its control found, on dev and on test."""
    controls = [found.best for found in result.controls if found.best is not None]
    trials = [result.unsteered, result.best, *controls[:1]]
    dev = [number(trial.values[result.target], ".0%") for trial in trials]
    arms = (UNSTEERED, STEERED, "search-matched")
    test = [cells.pool(result.test, result.target, arm) for arm in arms]
    apart = cells.difference(result.test, result.target, STEERED, "search-matched")
    outcome = f"{result.outcome} on {result.target}"
    none = [NOTHING] * (3 - len(dev))
    return (text(aim.title), text(outcome), *dev, *none, *test, apart)


def _numbers_row(
    work: _Work, aim: Aim, chosen: Chosen, how: str, of_paper: bool
) -> tuple[Entry, ...]:
    profile, value = chosen.profile, scores_by_expert(chosen.profile)
    sizes = [abs(value[e]) for e in (*profile.activated, *profile.deactivated)]
    left = f"{len(chosen.left_out)}"
    if chosen.short:
        left += f", and {chosen.short} that have no score of that sign"
    row = (
        text(aim.title),
        text(f"{len(profile.activated)}/{len(profile.deactivated)}"),
        text(left),
        text(how),
        number(max(sizes, default=None), ".3f"),
        number(min(sizes, default=None), ".3f"),
    )
    if work.bundled:
        return row
    if not (of_paper and work.known):
        return (*row, NOTHING)
    return (*row, text("{}/{}".format(*work.known.numbers[aim.key])))


def _searched(
    work: _Work, aim: Aim, scores: Profile, context: Context
) -> tuple[Chosen, SearchResult]:
    """The numbers that move the first target furthest on dev."""
    target = work.tasks.of(aim.targets, "target")[0]
    if aim.toward == "b":
        target = replace(target, outcome=_other(target))
    fluency = [card for card in work.tasks.of(aim.prices, "price") if "fluency" in card.name]
    with context.stage(f"search {aim.title}", "trials") as progress:
        result = search(
            context.engine,
            [scores],
            target,
            toward=aim.toward,
            out=context.out / f"{aim.folder}-numbers",
            prices=[(card, FLUENT) for card in fluency],
            budget=work.sizes.budget,
            seeds=CONTROL_SEARCHES,
            data=work.tasks.data_of([target, *fluency]),
            limit=work.sizes.limit,
            batch_size=context.batch_size,
            chat_options=context.chat_options,
            say=context.say,
            progress=progress,
            command=context.command,
        )
    best = Profile.load(context.out / f"{aim.folder}-numbers" / BEST)
    return Chosen(replace(best, scores=scores.scores), (), 0), result


def _other(card: Card) -> str:
    """The outcome that grows as the card's own falls."""
    return next(outcome for outcome in card.outcomes if outcome != card.outcome)


# -- what it does, and what it costs -------------------------------------------------------------


def _steering(work: _Work, aim: Aim) -> Step:
    here = [card.name for card in work.tasks.of((*aim.targets, *aim.prices), "target")]
    return Step(
        aim.title,
        f"{', '.join(here)}: steered, unsteered and under controls",
        partial(_steer, work, aim),
        _lacks(work, aim.behaviour, aim.targets),
        (aim.folder,),
    )


def _steer(work: _Work, aim: Aim, context: Context) -> Iterator[Made]:
    file = context.out / f"{aim.folder}.safetensors"
    if not file.is_file():
        raise MoesteerError("no numbers of experts were found to steer by.")
    cards = work.tasks.of(aim.targets, "target") + work.tasks.of(aim.prices, "price")
    folder, profile = context.out / aim.folder, Profile.load(file)
    numbers = f"{len(profile.activated)} activated, {len(profile.deactivated)} deactivated"
    comparison = _evaluated(work, replace(profile, name=numbers), cards, folder, context)
    yield _outcomes(work, aim, comparison, folder)
    yield Claim(aim.key, verdict_words(comparison))
    if aim.key == "safe":
        yield from _benign(aim, comparison)


def _evaluated(
    work: _Work,
    profile: Profile,
    cards: Sequence[Card],
    folder: Path,
    context: Context,
    beside: Mapping[str, Profile] | None = None,
    seeds: int | None = None,
) -> Comparison:
    with context.stage(folder.name, "replies") as progress:
        return evaluate(
            context.engine,
            profile,
            cards,
            out=folder,
            data=work.tasks.data_of(cards),
            seeds=work.sizes.seeds if seeds is None else seeds,
            batch_size=context.batch_size,
            limit=work.sizes.limit,
            chat_options=context.chat_options,
            beside=beside,
            say=context.say,
            progress=progress,
            command=context.command,
        )


ARMS = {"random": "random", "matched": "usage-matched", "bottom": "bottom-ranked"}
"""The pools of controls that stand in tables, by what they are called there."""


def _outcomes(work: _Work, aim: Aim, comparison: Comparison, folder: Path) -> Table:
    """A row a task: shares of all arms, and what steering changes, also beyond random experts."""
    headings = ["task", "outcome", UNSTEERED, STEERED, *ARMS.values()]
    headings += ["steered − unsteered", "steered − random"]
    rows = []
    for task in comparison.tasks:
        row = [text(task.name), text(f"{task.outcome} ({task.role})")]
        row += [cells.pool(comparison, task.name, arm) for arm in (UNSTEERED, STEERED, *ARMS)]
        row += [
            cells.difference(comparison, task.name, STEERED, arm) for arm in (UNSTEERED, "random")
        ]
        rows.append(row)
        if task.name == "fluency":  # on the paper's scale, too
            ratings = [cells.rating(folder, task.name, arm) for arm in (UNSTEERED, STEERED)]
            rest = [NOTHING] * (len(headings) - 4)
            rows.append([text(task.name), text("mean of (s − 1)/4"), *ratings, *rest])
    finding = PAPER.finding(aim.key)
    about = ""
    if not work.bundled:
        headings.append("paper")
        rows = [[*row, NOTHING] for row in rows]
        about = (
            f"The paper's column is empty: {PAPER.not_kept} were not noted here. Its figure,"
            f" {finding.figure}, is that of {finding.of}."
        )
    return Table(
        aim.title.capitalize(),
        " ".join([_about(comparison), about]).strip(),
        tuple(headings),
        tuple(map(tuple, rows)),
        aim.folder,
    )


def _about(comparison: Comparison) -> str:
    """How many prompts, what is steered, and what speaks against the numbers."""
    asked = listed([f"{task.items} of {task.name}" for task in comparison.tasks])
    notes = (f"Note: {note.rstrip('.')}." for note in comparison.notes)
    return " ".join([f"Prompts: {asked}. Steered: {comparison.profile}.", *notes])


def verdict_words(comparison: Comparison) -> str:
    """On how many targets an effect is claimed, and the sentence of the largest one.

    By the rules of `report/verdict.py`: beyond the unsteered model and beyond every control.
    """
    found = verdicts(comparison)
    size = {
        one.task: abs(comparison.difference(one.task, STEERED, UNSTEERED).difference or 0.0)
        for one in found
    }
    largest = max(found, key=lambda one: (one.claimed, size[one.task]))
    if len(found) == 1:
        return largest.sentence
    claimed = sum(one.claimed for one in found)
    return f"An effect beyond all controls on {claimed} of {len(found)} tasks. {largest.sentence}"


def _benign(aim: Aim, comparison: Comparison) -> Iterator[Claim]:
    """What becomes of harmless requests."""
    for task in comparison.tasks:
        if task.name in ("harmless-100", "testbed-benign"):
            before, after = (
                cells.pool(comparison, task.name, arm).text for arm in (UNSTEERED, STEERED)
            )
            yield Claim("price", f"{task.name}, {aim.title}: {before} unsteered, {after} steered")


# -- the detectors, the numbers and the experts that should not matter ---------------------------


def _ablation(work: _Work) -> Step:
    aim = work.aim("faithful")
    task = _first(work, aim)
    return Step(
        "detectors, counts and selection",
        f"{task}: risk difference against log-odds at four counts of deactivated experts, and"
        " random and bottom-ranked ones",
        partial(_ablate, work, aim),
        _lacks(work, aim.behaviour, aim.targets),
        ("detectors-and-counts",),
    )


def _first(work: _Work, aim: Aim) -> str:
    return next((name for name in aim.targets if name in work.tasks.cards), aim.targets[0])


def counts_for(facts: ModelFacts, of_paper: bool) -> tuple[int, ...]:
    """The paper's counts of deactivated experts; of other models the same shares of all experts."""
    ablation = PAPER.ablation
    assert ablation is not None
    if of_paper:
        return ablation.deactivated
    model = PAPER.model_of(ablation.model)
    assert model is not None
    assert model.layers is not None
    assert model.experts is not None
    every, of_theirs = sum(s.experts for s in facts.layers), model.layers * model.experts
    return tuple(sorted({max(1, round(n * every / of_theirs)) for n in ablation.deactivated}))


def _ablate(work: _Work, aim: Aim, context: Context) -> Iterator[Made]:
    ablation, facts = PAPER.ablation, context.engine.facts
    assert ablation is not None
    name = _first(work, aim)
    same_model = is_of_the_paper(work.known, facts)
    same_model &= work.known is not None and work.known.name == ablation.model
    counts = counts_for(facts, same_model)
    arms: dict[tuple[str, int], Profile] = {}
    # The testbed's experts were planted for A: losing them takes the behaviour away.
    toward = "b" if work.bundled else aim.toward
    for detector in ablation.shares:
        scores = _scores(work, aim.behaviour, detector, context)
        for count in counts:
            arms[detector, count] = as_published(scores, 0, count, toward).profile
    # The paper's own number of this model is the third.
    main = ("risk-difference", counts[min(2, len(counts) - 1)])
    cards = [*work.tasks.of([name], "target"), *work.tasks.of(aim.prices[:1], "price")]
    folder = context.out / "detectors-and-counts"
    comparison = _evaluated(
        work,
        arms[main],
        cards,
        folder,
        context,
        beside={_arm(*key): profile for key, profile in arms.items() if key != main},
    )
    outcome = cards[0].outcome
    names = {key: STEERED if key == main else _arm(*key) for key in arms}
    versus = {
        count: cells.paired(
            *(cells.hits(folder, name, names[d, count], outcome) for d in ablation.shares)
        )
        for count in counts
    }
    of_paper = same_model and name == ablation.task
    rows = [_ablation_row("unsteered", 0, comparison, name, UNSTEERED, NOTHING)]
    for (detector, count), arm in names.items():
        apart = versus[count] if detector == "risk-difference" else NOTHING
        rows.append(_ablation_row(detector, count, comparison, name, arm, apart))
    for arm, words in ARMS.items():
        rows.append(_ablation_row(words, main[1], comparison, name, arm, NOTHING))
    headings = ("ranked by", "deactivated", outcome, "− unsteered", "− log-odds of as many")
    if not work.bundled:
        headings = (*headings, "paper")
        rows = [(*row, _paper_share(row, of_paper)) for row in rows]
    yield Table(
        "Detectors, counts and selection",
        " ".join([_about(comparison), _ablation_words(work, same_model, of_paper)]),
        headings,
        tuple(rows),
        folder.name,
    )
    said = [
        f"{detector}: {listed([_bare(comparison, name, names[detector, n]) for n in counts])}"
        for detector in ablation.shares
    ]
    apart = "; ".join(f"{count}: {versus[count].text}" for count in counts)
    before = _bare(comparison, name, UNSTEERED)
    counted = f"{listed([str(count) for count in counts])} experts deactivated, from {before}"
    yield Claim("detectors", f"{counted}. {'; '.join(said)}. Difference, {apart}")
    controls = "; ".join(
        f"{words} − unsteered {cells.difference(comparison, name, arm, UNSTEERED).text}"
        for arm, words in ARMS.items()
    )
    yield Claim("control", f"{main[1]} experts deactivated on {name}: {controls}")


def _arm(detector: str, count: int) -> str:
    return f"{detector}, {count} deactivated"  # a name must not end in a number, as seeds do


def _bare(comparison: Comparison, task: str, arm: str) -> str:
    found = comparison.share(task, arm).share
    return "–" if found is None else f"{found:.0%}"


def _ablation_row(
    ranked_by: str, count: int, comparison: Comparison, task: str, arm: str, apart: Entry
) -> tuple[Entry, ...]:
    return (
        text(ranked_by),
        number(count),
        cells.pool(comparison, task, arm),
        cells.difference(comparison, task, arm, UNSTEERED),
        apart,
    )


def _paper_share(row: Sequence[Entry], of_paper: bool) -> Entry:
    """The paper's share in percent, of the same detector and count."""
    ablation = PAPER.ablation
    assert ablation is not None
    if not of_paper:
        return NOTHING
    count = int(row[1].value or 0)
    if row[0].text == "unsteered":
        return Entry(f"{ablation.baseline}%", ablation.baseline / 100)
    if row[0].text not in ablation.shares or count not in ablation.deactivated:
        return NOTHING
    share = ablation.shares[row[0].text][ablation.deactivated.index(count)]
    return Entry(f"{share}%", share / 100)


def _ablation_words(work: _Work, same_model: bool, of_paper: bool) -> str:
    ablation = PAPER.ablation
    assert ablation is not None
    said = []
    if not same_model:
        said.append(
            "The counts are the same shares of all experts as the paper's"
            f" {', '.join(map(str, ablation.deactivated))} of {ablation.model}."
        )
    if not of_paper and not work.bundled:
        said.append(
            "The paper's column is empty: its figures are those of"
            f" {ablation.model} on {ablation.task}."
        )
    elif of_paper:
        said.append("The paper names no change with random or bottom-ranked experts.")
    if work.bundled:
        said.append(
            "Deactivated away from the document: the testbed's experts were planted for it."
        )
    return " ".join(said)


# -- fluency -------------------------------------------------------------------------------------


def _fluency(work: _Work) -> Step:
    aim = work.aim("faithful") if "document" in work.sources else work.aim("safe")
    fluent = [card.name for card in work.tasks.of(aim.prices, "price") if "fluency" in card.name]
    lacks = _lacks(work, aim.behaviour) or (
        "" if fluent else "prompts of the task fluency, as said below."
    )
    return Step(
        "activation against deactivation",
        f"{(fluent or ['fluency'])[0]}: as many experts activated as deactivated, three numbers",
        partial(_activate, work, aim),
        lacks,
        ("activation-and-deactivation",),
    )


def _activate(work: _Work, aim: Aim, context: Context) -> Iterator[Made]:
    (card,) = [c for c in work.tasks.of(aim.prices, "price") if "fluency" in c.name]
    scores = _scores(work, aim.behaviour, "risk-difference", context)
    every = sum(shape.experts for shape in context.engine.facts.layers)
    most = min(
        len(as_published(scores, every, 0, aim.toward).profile.activated),
        len(as_published(scores, 0, every, aim.toward).profile.deactivated),
    )
    numbers = sorted({max(1, round(share * most)) for share in FRACTIONS})
    arms: dict[tuple[str, int], Profile] = {}
    for count in numbers:
        up, down = (_first_fitting(scores, count, aim.toward, up=up) for up in (True, False))
        arms |= {("activated", count): up, ("deactivated", count): down}
    main = ("activated", numbers[-1])
    names = {key: STEERED if key == main else f"{key[1]} {key[0]}" for key in arms}
    folder = context.out / "activation-and-deactivation"
    comparison = _evaluated(
        work,
        arms[main],
        [card],
        folder,
        context,
        beside={names[key]: profile for key, profile in arms.items() if key != main},
        seeds=0,
    )
    rows = []
    for count in numbers:
        both = [names[how, count] for how in ("activated", "deactivated")]
        apart = cells.paired(*(cells.hits(folder, card.name, arm, card.outcome) for arm in both))
        rows.append(
            (number(count), *(cells.pool(comparison, card.name, arm) for arm in both), apart)
        )
    before = cells.pool(comparison, card.name, UNSTEERED).text
    yield Table(
        "Activation against deactivation",
        f"{_about(comparison)} {card.outcome.capitalize()} unsteered: {before}. The numbers are a"
        " quarter, half and all of those that layers have room to activate.",
        ("experts", f"{card.outcome}, activated", f"{card.outcome}, deactivated", "difference"),
        tuple(rows),
        folder.name,
    )
    said = "; ".join(f"{row[0].text}: {row[3].text}" for row in rows)
    yield Claim("fluency", f"Activated less deactivated, points of {card.outcome}. {said}")


def _first_fitting(scores: Profile, count: int, toward: Side, *, up: bool) -> Profile:
    """The strongest `count` experts that layers have room for."""
    every = sum(shape.experts for shape in scores.model.layers) if scores.model else 0
    numbers = (every, 0) if up else (0, every)
    fitting = as_published(scores, *numbers, toward).profile
    chosen = (fitting.activated or fitting.deactivated)[:count]
    return replace(
        fitting,
        activated=chosen if up else (),
        deactivated=() if up else chosen,
        name=f"{count} {'activated' if up else 'deactivated'}",
    )
