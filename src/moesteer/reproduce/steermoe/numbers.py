"""How many experts: the paper's numbers for its models, for others what dev prompts choose."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moesteer.detection.selecting import ranked_experts, scores_by_expert
from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import Card
from moesteer.evaluation.search import BEST, SearchResult, search
from moesteer.model_facts import LayerShape, ModelFacts
from moesteer.profile import Expert, Profile, Side
from moesteer.reproduce.outcome import NotRun
from moesteer.reproduce.papers import PaperModel
from moesteer.reproduce.steermoe.detection import scores_of
from moesteer.reproduce.steermoe.plan import Aim, Work, lacks
from moesteer.reproduce.steps import SUMMARY, Context, Step

FLUENT = 0.9
"""The least share of fluent replies where numbers of experts are chosen."""
CONTROL_SEARCHES = 1


@dataclass(frozen=True)
class Chosen:
    """Experts by the paper's way of choosing; `left_out` had no room in their layer, `short` is
    how many more were asked for than have a score of that sign."""

    profile: Profile
    left_out: tuple[Expert, ...]
    short: int


@dataclass(frozen=True)
class Numbered:
    """The experts of an aim; `searched` is None where their numbers are the paper's."""

    aim: Aim
    chosen: Chosen
    searched: SearchResult | None


@dataclass(frozen=True)
class Numbers:
    """The experts of all aims. `known` is the paper's model of this name, `of_paper` says whether
    it has the paper's shape as well, so that the paper's numbers were used."""

    of_aims: tuple[Numbered, ...]
    known: PaperModel | None
    of_paper: bool


def numbers(work: Work) -> Step:
    ready = [aim for aim in work.aims if not lacks(work, aim.behaviour, aim.targets)]
    return Step(
        "numbers of experts",
        f"the paper's numbers for {work.known.name}"
        if work.known
        else f"numbers chosen on dev prompts: {', '.join(aim.title for aim in ready)}",
        partial(_choose_all, work, ready),
        "" if ready else "pairs and prompts of a task that they are for, as said below.",
        tuple(f"{aim.folder}-numbers" for aim in ready),
    )


def _choose_all(work: Work, aims: Sequence[Aim], context: Context) -> Iterator[object]:
    of_paper = is_of_the_paper(work.known, context.engine.facts)
    found = []
    for aim in aims:
        scores = scores_of(work, aim.behaviour, "risk-difference", context)
        result = None
        try:
            if of_paper and work.known is not None:
                chosen = as_published(scores, *work.known.numbers[aim.key], aim.toward)
            else:
                chosen, result = _searched(work, aim, scores, context)
        except MoesteerError as error:
            yield NotRun(f"numbers of experts, {aim.title}", str(error), failed=True)
            continue
        profile = replace(chosen.profile, chat_options=context.chat_options)
        profile.made_by(context.command).save(context.out / f"{aim.folder}.safetensors")
        found.append(Numbered(aim, chosen, result))
    yield Numbers(tuple(found), work.known, of_paper)


def _searched(
    work: Work, aim: Aim, scores: Profile, context: Context
) -> tuple[Chosen, SearchResult]:
    """The numbers that move the first target furthest on dev; once chosen, they stay.

    A folder is of one model, one set of pairs and one limit, and so is the choice in it. With more
    prompts brought since, another would be made, under which all that was measured would not stand.
    """
    folder = context.out / f"{aim.folder}-numbers"
    if (file := folder / SUMMARY).is_file():
        result = SearchResult.from_json(file.read_text(encoding="utf-8"), file)
        return _best(folder, scores), result
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
            out=folder,
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
    return _best(folder, scores), result


def _best(folder: Path, scores: Profile) -> Chosen:
    return Chosen(replace(Profile.load(folder / BEST), scores=scores.scores), (), 0)


def _other(card: Card) -> str:
    """The outcome that grows as the card's own falls."""
    return next(outcome for outcome in card.outcomes if outcome != card.outcome)


# -- as the paper chooses ------------------------------------------------------------------------


def is_of_the_paper(known: PaperModel | None, facts: ModelFacts) -> bool:
    """Whether a model of the paper's name also has the shape that the paper gives it."""
    if known is None:
        return False
    shapes = {(shape.experts, shape.top_k) for shape in facts.layers}
    return (len(facts.layers), shapes) == (known.layers, {(known.experts, known.top_k)})


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
