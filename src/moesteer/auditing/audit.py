"""`moesteer audit`: how robust a behaviour is against the loss of experts, kept in a folder.

    importance   every expert switched off alone, on contrast pairs: who carries it
    curve        replies to the test prompts with the k most important experts lost
    restoring    with those lost that halve the share, and all that were named: does activating
                 others bring it back? Both numbers are chosen on the dev prompts, and measured on
                 the test prompts: a loss that was chosen for its low share would rise by itself

The folder holds the effects (importance.safetensors) and, for each loss that was to be restored,
the profile of the loss and of what restores it (lost-K.safetensors, restored-K.safetensors), beside
all records; what was asked on dev is in folders of its own. Done again with the same settings it
goes on from where it was.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moesteer.auditing.importance import (
    ChatOptions,
    Decisions,
    Importance,
    fit_and_dev,
    measure_importance,
    read_decisions,
)
from moesteer.auditing.restoring import (
    Restored,
    Tried,
    activating,
    arms_of_restoring,
    best_of,
    restoring,
)
from moesteer.auditing.robustness import (
    INTACT,
    Area,
    Halved,
    Point,
    area_between,
    arms_of_losses,
    halved,
    losing,
    losses,
    lost_words,
    numbers_up_to,
)
from moesteer.contrast import pairs_hash
from moesteer.detection.comparing import drawn
from moesteer.detection.knocking import layers_to_enter
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.evaluation.cards import Card
from moesteer.evaluation.comparison import STEERED, Comparison, TaskFacts, compare, pool_of
from moesteer.evaluation.evaluate import (
    BOOTSTRAP_SEED,
    FIRED,
    GATES,
    SUMMARY,
    Asked,
    arm_facts,
    ask_all,
    check_numbers,
    check_tasks,
    identity,
    prepare,
    replies_of,
    task_facts,
    with_prices,
)
from moesteer.files import write_text
from moesteer.profile import Expert, Profile
from moesteer.provenance import about
from moesteer.runs import Run, open_run
from moesteer.summaries import as_json, from_json

if TYPE_CHECKING:
    from moesteer.contrast import ContrastPair
    from moesteer.engines.base import Engine

AUDIT_SCHEMA = 1
IMPORTANCE = "importance.safetensors"
PAIRS_USED = 64
MOST = 8
"""So many pairs of each split, and so many lost experts, unless the caller says otherwise."""

Stage = Callable[[str, str], AbstractContextManager[Callable[[int, int], None]]]
"""Called with the name of a stage and its unit; gives what is told how far the stage is."""


@dataclass(frozen=True)
class Audit:
    """What `summary.json` of an audit holds.

    `target`'s share of `outcome` is what is lost and restored. Comparisons of one number lost have
    p adjusted over their tasks, not over the numbers. `halved` is read off the test prompts;
    `halved_on_dev` chose which loss to restore: so many lost, None where nothing halves it there.
    """

    model: str
    target: str
    outcome: str
    importance: Importance
    curve: tuple[Point, ...]
    halved: Halved
    area: Area | None
    halved_on_dev: int | None
    restored: tuple[Restored, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """The audit as one JSON object, with the schema's number."""
        return as_json(self, AUDIT_SCHEMA)

    @classmethod
    def from_json(cls, text: str, where: str | Path = SUMMARY) -> "Audit":
        """Read what `to_json` wrote; MoesteerError, beginning with `where`, for anything else."""
        return from_json(cls, text, where, AUDIT_SCHEMA, "an audit")


@contextmanager
def _untold(_title: str, _unit: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def audit(
    engine: "Engine",
    pairs: str,
    target: Card,
    *,
    out: str | Path,
    prices: Sequence[Card] = (),
    data: Mapping[str, str] | None = None,
    pairs_used: int = PAIRS_USED,
    layers: int | None = None,
    most: int = MOST,
    seeds: int = 3,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    chat_options: ChatOptions | None = None,
    say: Callable[[str], None] | None = None,
    stage: Stage = _untold,
    command: str = "",
) -> Audit:
    """Audit a behaviour: who carries it, what is left without them, and what brings it back.

    `pairs` names contrast pairs whose A shows what the share of `target`'s outcome measures (see
    `fit_and_dev`), of which at most `pairs_used` of each split are drawn; `layers` are gone into
    after screening (see `knock`). At most `most` experts are lost, beside `seeds` random sets.
    `prices` are tasks that the loss should leave alone; without them, those of `with_prices`.
    `data` names the file of a task's prompts, of which at most `limit` are asked.

    `out` is the run's folder; an interrupted audit is taken up. `say` is told what it costs before
    it starts. Raises MoesteerError where pairs or prompts are missing, and where the replies of a
    pair don't part.
    """
    check_numbers(pairs_used=pairs_used, most=most, seeds=seeds, batch_size=batch_size, limit=limit)
    layers_to_enter(engine.facts.layers, layers)
    files, options = dict(data or {}), dict(chat_options or {})
    cards = [replace(target, role="target"), *(replace(card, role="price") for card in prices)]
    cards = with_prices(cards, files)
    check_tasks(cards, files)

    def asked(card: Card, split: str) -> Asked:
        return prepare(engine, card, split, files.get(card.name), options, limit, max_new_tokens)

    tasks, dev = [asked(card, "test") for card in cards], asked(cards[0], "dev")
    fit, held_out = (drawn(some, pairs_used) for some in fit_and_dev(pairs))
    decisions = read_decisions(engine, pairs, fit, held_out, options)
    notes = met_before(
        target.name,
        _prompts_of(fit),
        _prompts_of(held_out),
        [item.prompt for item in tasks[0].items],
        [item.prompt for item in dev.items],
    )
    settings = {
        "model": engine.facts.id,
        "model_facts": asdict(engine.facts),
        "pairs": pairs,
        "pairs_hash": [pairs_hash(fit), pairs_hash(held_out)],
        "layers": layers,
        "target": f"{target.name}={target.outcome}",
        "tasks": {task.card.name: identity(task) for task in (*tasks, dev)},
        "dev": identity(dev),
        "most": most,
        "seeds": seeds,
        "chat_options": options,
        "batch_size": batch_size,
        "max_new_tokens": {task.card.name: task.max_new_tokens for task in tasks},
    }
    for note in notes:
        warnings.warn(note, MoesteerWarning, stacklevel=2)
    with open_run(out, "audit", settings, about(command)) as run:
        if say is not None:
            say(decisions.cost(engine, layers))
        bench = _Bench(engine, run, tasks, dev, batch_size, say, stage)
        importance, effects = _importance(bench, decisions, layers, options, command)
        effects.save(run.folder / IMPORTANCE)
        order = losses(importance, engine.facts.layers, most, seeds)
        arms = arms_of_losses(order, numbers_up_to(len(order.important), len(importance.named)))
        _ask(bench, list(arms.values()))
        judged = _judged(bench)
        curve = [Point(number, _compared(bench, judged, roles)) for number, roles in arms.items()]
        found, area = _read_off(bench, arms)
        to_restore = _halved_on_dev(bench, arms)
        restored = tuple(
            _restored(bench, judged, importance, order.important[:number], effects)
            for number in sorted({to_restore or 0, len(importance.named)} & arms.keys())
            if to_restore is not None
        )
        result = Audit(
            model=engine.facts.id,
            target=target.name,
            outcome=target.outcome,
            importance=importance,
            curve=tuple(curve),
            halved=found,
            area=area,
            halved_on_dev=to_restore,
            restored=restored,
            notes=(*notes, *order.notes),
        )
        write_text(run.folder / SUMMARY, result.to_json() + "\n")
    return result


@dataclass(frozen=True)
class _Bench:
    """What replies are asked with: the tasks on test, the target first, and the target on dev."""

    engine: "Engine"
    run: Run
    tasks: Sequence[Asked]
    dev: Asked
    batch_size: int
    say: Callable[[str], None] | None
    stage: Stage


def _importance(
    bench: _Bench, decisions: Decisions, layers: int | None, options: ChatOptions, command: str
) -> tuple[Importance, Profile]:
    with bench.stage("switch experts", "texts") as progress:
        return measure_importance(
            bench.engine,
            decisions,
            into=layers,
            run=bench.run,
            chat_options=options,
            command=command,
            progress=progress,
        )


# -- the curve -----------------------------------------------------------------------------------

Roles = Mapping[str, tuple[str, Profile | None]]
"""By role (unsteered, steered, random 0, …) the arm of the run: its name and its profile."""


def _ask(bench: _Bench, arms: Sequence[Roles]) -> None:
    """Ask every arm the test prompts, each once."""
    by_name = {name: profile for roles in arms for name, profile in roles.values()}
    if by_name:
        with bench.stage("ask", "replies") as progress:
            ask_all(
                bench.run,
                bench.engine,
                bench.tasks,
                by_name,
                bench.batch_size,
                bench.say,
                progress,
            )


Judged = tuple[list[TaskFacts], list[str]]
"""The tasks with the checks of their judges, and what speaks against trusting one."""


def _judged(bench: _Bench) -> Judged:
    """Once for all comparisons: a judge that is checked on the spot takes its time."""
    found = task_facts(bench.engine, bench.tasks, bench.run.folder.parent, replies_of(bench.run))
    for note in found[1]:
        warnings.warn(note, MoesteerWarning, stacklevel=3)
    return found


def _compared(bench: _Bench, judged: Judged, roles: Roles) -> Comparison:
    """Arms in their roles, from what the run holds."""
    facts, doubted = judged
    role_of = {name: role for role, (name, _) in roles.items()}
    mine = [r | {"arm": role_of[r["arm"]]} for r in replies_of(bench.run) if r["arm"] in role_of]
    fired, gates = bench.run.lines("fired", *FIRED), bench.run.lines("gates", *GATES)
    shares, differences = compare(facts, list(roles), mine, BOOTSTRAP_SEED)
    return Comparison(
        model=bench.engine.facts.id,
        profile=roles[STEERED][0],
        split="test",
        seed=BOOTSTRAP_SEED,
        tasks=tuple(facts),
        arms=tuple(
            replace(arm_facts(name, profile, fired, gates), name=role)
            for role, (name, profile) in roles.items()
        ),
        shares=tuple(shares),
        differences=tuple(differences),
        notes=tuple(doubted),
    )


def _read_off(bench: _Bench, arms: Mapping[int, Roles]) -> tuple[Halved, Area | None]:
    """k50 and the area, over the prompts whose replies could be judged in every arm."""
    task = bench.tasks[0]
    said = {
        (reply["arm"], reply["item"]): reply["outcome"]
        for reply in replies_of(bench.run)
        if reply["task"] == task.card.name
    }
    names = {name for roles in arms.values() for name, _ in roles.values()}
    items = [i for i in range(len(task.items)) if all(said[name, i] is not None for name in names)]
    if not arms or not items:
        return Halved(None, None, None), None

    def hits(arm: str) -> np.ndarray:
        return np.array([said[arm, item] == task.card.outcome for item in items], dtype=bool)

    lost = {number: hits(roles[STEERED][0]) for number, roles in arms.items()}
    randomly = {
        number: np.stack([hits(name) for name in pool])
        for number, roles in arms.items()
        if (pool := [arm for role, (arm, _) in roles.items() if pool_of(role) == "random"])
    }
    return halved(hits(INTACT), lost), area_between(lost, randomly)


# -- restoring -----------------------------------------------------------------------------------


def _halved_on_dev(bench: _Bench, arms: Mapping[int, Roles]) -> int | None:
    """The smallest number lost that halves the share on dev, over the prompts that were judged in
    every arm; None where none does."""
    if not arms:
        return None
    profiles = {INTACT: None} | dict(roles[STEERED] for roles in arms.values())
    said = _on_dev(bench, "dev-lost", profiles, {"lost": [*arms]})
    judged = [i for i in said[INTACT] if all(i in outcomes for outcomes in said.values())]
    hits = {
        arm: np.array([outcomes[i] == bench.dev.card.outcome for i in judged], dtype=bool)
        for arm, outcomes in said.items()
    }
    lost = {number: hits[roles[STEERED][0]] for number, roles in arms.items()}
    return halved(hits[INTACT], lost).value


def _on_dev(
    bench: _Bench, name: str, profiles: Mapping[str, Profile | None], settings: Mapping[str, object]
) -> dict[str, dict[int, str]]:
    """By arm and dev prompt the outcome, where it could be judged; kept in a run of its own."""
    folder = bench.run.folder / name
    with open_run(folder, "audit dev", {**bench.run.settings, **settings}, bench.run.about) as run:
        with bench.stage("try on dev", "replies") as progress:
            ask_all(run, bench.engine, [bench.dev], profiles, bench.batch_size, None, progress)
        replies = replies_of(run)
    said: dict[str, dict[int, str]] = {arm: {} for arm in profiles}
    for reply in replies:
        if reply["outcome"] is not None:
            said[reply["arm"]][reply["item"]] = reply["outcome"]
    return said


def _restored(
    bench: _Bench, judged: Judged, importance: Importance, lost: Sequence[Expert], effects: Profile
) -> Restored:
    """The number chosen on dev, and what it does on test; both profiles are saved."""
    layers, number = bench.engine.facts.layers, len(lost)
    settings = bench.run.settings
    order = activating(importance, layers, lost, settings["most"])
    tried = _tried(bench, lost, order)
    best, test = best_of(tried), None
    files = {f"lost-{number}": losing(lost, lost_words(number))}
    if best.activated:
        arms = arms_of_restoring(lost, order[: best.activated], layers, settings["seeds"])
        _ask(bench, [arms])
        test = _compared(bench, judged, arms)
        files[f"restored-{number}"] = arms[STEERED][1]
    for name, profile in files.items():
        whole = replace(
            effects,
            activated=profile.activated,
            deactivated=profile.deactivated,
            toward=profile.toward,
            name=profile.name,
        )
        whole.save(bench.run.folder / f"{name}.safetensors")
    return Restored(number, tuple(tried), best, test)


def _tried(bench: _Bench, lost: Sequence[Expert], order: Sequence[Expert]) -> list[Tried]:
    """The share of the target's outcome on dev with 0, 1, 2, 3, 5, … experts activated."""
    numbers = [0, *numbers_up_to(len(order))]
    arms = {f"{n} activated": restoring(lost, order[:n], f"{n} activated") for n in numbers}
    name = f"dev-{len(lost)}"
    said = _on_dev(bench, name, arms, {"lost": [*lost], "activated": [*order]})
    if not all(said.values()):
        raise MoesteerError(
            f"none of the replies to {bench.dev.card.name} on dev could be judged; see"
            f" {bench.run.folder / name / 'replies.jsonl'}."
        )
    shares = [np.mean([o == bench.dev.card.outcome for o in said[arm].values()]) for arm in arms]
    return [Tried(n, float(share)) for n, share in zip(numbers, shares, strict=True)]


# -- notes ---------------------------------------------------------------------------------------


def _prompts_of(pairs: "Sequence[ContrastPair]") -> set[str]:
    return {pair.a.messages[-2].content for pair in pairs if len(pair.a.messages) > 1}


def met_before(
    task: str, fit: set[str], held_out: set[str], test: Sequence[str], dev: Sequence[str]
) -> list[str]:
    """Whether the target is asked prompts of the pairs, too.

    Held-out pairs choose nothing, so on dev they are no matter.
    """
    return [
        f"{both} of the {len(asked)} {which} of {task} are prompts of the {pairs}, too: {what}"
        " partly measured on what importance was measured on."
        for asked, which, prompts, pairs, what in (
            (test, "prompts", fit, "pairs", "the curve is"),
            (test, "prompts", held_out - fit, "held-out pairs", "the curve is"),
            (dev, "dev prompts", fit, "pairs", "what chooses the loss and what restores it is"),
        )
        if (both := sum(prompt in prompts for prompt in asked))
    ]
