"""A profile beside its controls, on tasks: asked, judged, compared, and resumable.

Every arm (the unsteered model, the profile, its controls) answers the same prompts greedily. What
was said and judged stands in `replies.jsonl`, how far each arm moved from the unsteered model in
`drift.jsonl`, what the steering did in `fired.jsonl`, which prompts opened a gate in `gates.jsonl`,
and the comparison in `summary.json`.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesteer.chat import TokenisedConversation, render_prompt
from moesteer.engines.evidence import DirectionEvidence
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.evaluation.cards import Card, all_cards, make_judges, read_items
from moesteer.evaluation.comparison import (
    UNSTEERED,
    ArmFacts,
    Comparison,
    Drift,
    Gated,
    TaskFacts,
    compare,
)
from moesteer.evaluation.controls import arms as arms_of
from moesteer.evaluation.drift import (
    as_conversations,
    divergence,
    routing_drift,
    selections,
)
from moesteer.evaluation.judge_check import doubts, known_check, told
from moesteer.evaluation.judging import Judged, disagreement, judge_replies
from moesteer.evaluation.task import Item, Judge, Verdict
from moesteer.files import write_text
from moesteer.generate import GROUP, check_length, check_steers
from moesteer.profile_fit import check_model
from moesteer.provenance import about
from moesteer.runs import Run, open_run
from moesteer.statistics.intervals import wilson_interval
from moesteer.tally import tally

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.engines.evidence import LayerEvidence
    from moesteer.profile import Profile

SUMMARY = "summary.json"
BOOTSTRAP_SEED = 0
REPLY = ("task", "arm", "item", "prompt", "reply", "outcome", "verdicts")
DRIFT = ("task", "arm", "kl", "routing")
FIRED = ("task", "arm", "start", "layer", "tokens", "obeyed")
GATES = ("task", "arm", "item", "steered")
"""The keys of a line of `replies.jsonl`, `drift.jsonl`, `fired.jsonl` and `gates.jsonl`; what a
direction did has place, expert, operation, measured and expected beside them."""


@dataclass(frozen=True)
class Asked:
    """A task whose prompts are read and rendered, and whose judges are ready."""

    card: Card
    items: Sequence[Item]
    prompts: Sequence[str]
    judges: Sequence[Judge]
    max_new_tokens: int


def evaluate(
    engine: "Engine",
    profile: "Profile",
    cards: Sequence[Card],
    *,
    out: str | Path,
    split: str = "test",
    data: Mapping[str, str] | None = None,
    seeds: int = 3,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    chat_options: Mapping[str, bool | int | float | str] | None = None,
    beside: "Mapping[str, Profile] | None" = None,
    checks: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Comparison:
    """Measure what a profile does on tasks, beside the unsteered model and controls.

    `out` is the run's folder; an interrupted run is taken up, and more tasks may be added to one
    that is finished. `data` names the file of a task's
    prompts, `limit` asks only the first so many of each, `seeds` is how many controls of each kind
    there are, `beside` holds more arms by name, `chat_options` override the
    profile's. Checks of the judges are looked for in the folder `checks`, by default the one that
    holds `out`. `say` is told what it costs before it starts, `progress` how many replies there are
    of how many.

    Where all `cards` are targets, the price is measured beside them: see `with_prices`. Raises
    MoesteerError where the profile steers nothing or doesn't fit, where a task has no prompts, and
    where `out` holds anything else.
    """
    check_steers(profile)
    check_numbers(seeds=seeds, batch_size=batch_size)
    check_model(profile, engine.facts)
    check_tasks(cards)
    cards = with_prices(cards, data or {})
    check_tasks(cards, data or {})
    options = dict(profile.chat_options) | dict(chat_options or {})
    asked = [
        prepare(engine, card, split, (data or {}).get(card.name), options, limit, max_new_tokens)
        for card in cards
    ]
    controls, missing = arms_of(profile, engine.facts.layers, seeds)
    by_name = controls | dict(beside or {})
    for note in missing:  # before the work, not after it
        warnings.warn(note, MoesteerWarning, stacklevel=2)
    settings = {
        "model": engine.facts.id,
        "model_facts": asdict(engine.facts),
        "experts": f"activated {profile.activated}, deactivated {profile.deactivated}",
        "directions": [direction.words for direction in profile.directions],
        "profile": json.loads(profile.to_json()),
        "tasks": {a.card.name: identity(a) for a in asked},
        "split": split,
        "seeds": seeds,
        "beside": {name: json.loads(arm.to_json()) for name, arm in (beside or {}).items()},
        "chat_options": options,
        "batch_size": batch_size,
        "max_new_tokens": {a.card.name: a.max_new_tokens for a in asked},
    }
    with open_run(
        out, "evaluate", settings, about(command), growing=("tasks", "max_new_tokens")
    ) as run:
        ask_all(run, engine, asked, by_name, batch_size, say, progress)
        drifts = _drifts(run, engine, asked, by_name, batch_size)
        replies = replies_of(run)
        facts, doubted = task_facts(engine, asked, checks or Path(out).parent, replies)
        for note in doubted:
            warnings.warn(note, MoesteerWarning, stacklevel=2)
        shares, differences = compare(facts, list(by_name), replies, BOOTSTRAP_SEED)
        fired, gates = run.lines("fired", *FIRED), run.lines("gates", *GATES)
        comparison = Comparison(
            model=engine.facts.id,
            profile=profile.name,
            split=split,
            seed=BOOTSTRAP_SEED,
            tasks=tuple(facts),
            arms=tuple(arm_facts(name, arm, fired, gates) for name, arm in by_name.items()),
            shares=tuple(shares),
            differences=tuple(differences),
            drifts=tuple(drifts),
            notes=(*missing, *doubted),
            gates=tuple(_gates(facts, by_name, gates)),
        )
        write_text(run.folder / SUMMARY, comparison.to_json() + "\n")
    return comparison


def check_tasks(cards: Sequence[Card], data: Mapping[str, str] | None = None) -> None:
    """MoesteerError without a task, for two of one name, and for data of none of them.

    What a run holds is told apart by the tasks' names.
    """
    names = [card.name for card in cards]
    if not names:
        raise MoesteerError("there is no task to measure; give one with --tasks.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise MoesteerError(f"there are two tasks of the name {twice[0]}; give it once.")
    if lost := [name for name in data or {} if name not in names]:
        raise MoesteerError(
            f"--data names {lost[0]!r}, which is none of the tasks: {', '.join(names)}."
        )


def with_prices(cards: Sequence[Card], data: Mapping[str, str]) -> list[Card]:
    """The cards, and where all of them are targets, those that measure what steering costs.

    Beside a task of the testbed all its tasks, of which the other behaviours count as price:
    steering is not meant to move them. Elsewhere the price cards whose prompts are given or lie
    there; without any a MoesteerWarning says that no price is measured.
    """
    if any(card.role == "price" for card in cards):
        return list(cards)
    named = {card.name for card in cards}
    bundled = any(card.testbed is not None for card in cards)
    beside = [
        replace(card, role="price")
        for card in all_cards()
        if card.name not in named
        and (card.testbed is not None) == bundled
        and (bundled or (card.role == "price" and _has_prompts(card, data)))
    ]
    if not any(card.role == "price" for card in beside):
        warnings.warn(
            "only targets are measured, no price: there is no task for harmless requests, fluency"
            " or facts whose prompts are here. Give them with --tasks and --data.",
            MoesteerWarning,
            stacklevel=3,
        )
    return [*cards, *beside]


def prepare(
    engine: "Engine",
    card: Card,
    split: str,
    data: str | None,
    chat_options: Mapping[str, object],
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> Asked:
    """A card's prompts, rendered, with its judges; MoesteerError where the prompts are missing."""
    check_numbers(limit=limit, max_new_tokens=max_new_tokens)
    items = read_items(card, split, data)[:limit]
    longest = max_new_tokens or card.max_new_tokens
    prompts = []
    for item in items:
        try:
            prompts.append(render_prompt(item.messages, engine.tokenizer, chat_options))
        except MoesteerError as error:
            raise MoesteerError(f"{item.source}: {error}") from None
        check_length(engine, prompts[-1], longest, item.source)
    judges = make_judges(card, engine, chat_options)
    return Asked(card, items, prompts, judges, longest)


def identity(asked: Asked) -> str:
    """What decides a task's replies and verdicts, as a hash."""
    items = [(item.messages, sorted(item.columns.items())) for item in asked.items]
    text = repr((replace(asked.card, where=""), items))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_numbers(**numbers: int | None) -> None:
    """MoesteerError for an option of this name whose number is too small."""
    for name, value in numbers.items():
        least = 0 if name in ("seeds", "seed") else 1
        if value is not None and value < least:
            raise MoesteerError(
                f"--{name.replace('_', '-')} is {value}; it must be at least {least}."
            )


def _has_prompts(card: Card, data: Mapping[str, str]) -> bool:
    return card.name in data or Path(card.prompts.source).is_file()


# -- replies -------------------------------------------------------------------------------------


def ask_all(
    run: Run,
    engine: "Engine",
    asked: Sequence[Asked],
    by_name: Mapping[str, "Profile | None"],
    batch_size: int,
    say: Callable[[str], None] | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Ask what the run has not yet; group by group, so that replies don't depend on interruptions.

    A task's arms follow each other: the target is known first.
    """
    lines = [r for r in run.lines("replies", *REPLY) if r["arm"] in by_name]
    there = {(r["task"], r["arm"], r["item"]) for r in lines}
    total = sum(len(task.items) for task in asked) * len(by_name)
    done = len(there)
    if say is not None:
        tasks = "1 task" if len(asked) == 1 else f"{len(asked)} tasks"
        words = f"{tasks} × {len(by_name)} arms: {total:,} replies"
        say(words + (f", {done:,} of them are there" if done else ""))

    told = tally(progress, total, done)
    told(0)
    group = GROUP * batch_size
    for task in asked:
        for arm, profile in by_name.items():
            for start in range(0, len(task.items), group):
                chosen = range(start, min(start + group, len(task.items)))
                missing = [i for i in chosen if (task.card.name, arm, i) not in there]
                if missing:
                    told(len(missing) - len(chosen))  # what is there in part is asked again
                    _ask(run, engine, task, (arm, profile), chosen, missing, batch_size, told)
        if any(task.card.name == name for name, _, _ in there):
            _judge_again(run, task)


def replies_of(run: Run) -> list[dict[str, Any]]:
    """The run's replies, each with its last verdict."""
    found = {(r["task"], r["arm"], r["item"]): r for r in run.lines("replies", *REPLY)}
    return list(found.values())


def _judge_again(run: Run, task: Asked) -> None:
    """Judge replies without an outcome once more: an endpoint may be back."""
    open_ones = [
        reply
        for reply in replies_of(run)
        if reply["task"] == task.card.name and reply["outcome"] is None
    ]
    if not open_ones:
        return
    judged = judge_replies(
        task.card,
        task.judges,
        [task.items[reply["item"]] for reply in open_ones],
        [reply["reply"] for reply in open_ones],
    )
    run.add(
        "replies",
        [
            {**reply, "outcome": said.outcome, "verdicts": [asdict(v) for v in said.verdicts]}
            for reply, said in zip(open_ones, judged, strict=True)
            if said.outcome is not None
        ],
    )


def _ask(
    run: Run,
    engine: "Engine",
    task: Asked,
    arm_and_profile: "tuple[str, Profile | None]",
    chosen: range,
    missing: Sequence[int],
    batch_size: int,
    told: Callable[[int], None],
) -> None:
    """Ask and judge one group; what is `missing` in the run is added to it."""
    arm, profile = arm_and_profile
    generated = engine.generate(
        [task.prompts[i] for i in chosen],
        profile,
        max_new_tokens=task.max_new_tokens,
        batch_size=batch_size,
        progress=told,
    )
    replies = dict(zip(chosen, generated.replies, strict=True))
    judged = judge_replies(
        task.card,
        task.judges,
        [task.items[i] for i in missing],
        [replies[i] for i in missing],
    )
    # The proof first: there is never a reply without it.
    asked = {"task": task.card.name, "arm": arm, "start": chosen.start}
    run.add("fired", [asked | _fired(seen) for seen in generated.evidence])
    if generated.steered is not None:
        opened = dict(zip(chosen, generated.steered, strict=True))
        run.add("gates", [_opened(task, arm, item, opened[item]) for item in missing])
    run.add(
        "replies",
        [
            {
                "task": task.card.name,
                "arm": arm,
                "item": i,
                "prompt": task.items[i].prompt,
                "reply": replies[i],
                "outcome": said.outcome,
                "verdicts": [asdict(verdict) for verdict in said.verdicts],
            }
            for i, said in zip(missing, judged, strict=True)
        ],
    )


def _fired(seen: "LayerEvidence | DirectionEvidence") -> dict[str, Any]:
    found: dict[str, Any] = {"layer": seen.layer, "tokens": seen.tokens, "obeyed": seen.obeyed}
    if isinstance(seen, DirectionEvidence):
        for name in ("place", "expert", "operation", "measured", "expected"):
            found[name] = getattr(seen, name)
    return found


def _opened(task: Asked, arm: str, item: int, steered: bool) -> dict[str, Any]:
    return {"task": task.card.name, "arm": arm, "item": item, "steered": steered}


# -- drift ---------------------------------------------------------------------------------------


def _drifts(
    run: Run,
    engine: "Engine",
    asked: Sequence[Asked],
    by_name: Mapping[str, "Profile | None"],
    batch_size: int,
) -> list[Drift]:
    """The drift of every steered arm on every task; what the run holds is not measured again."""
    there = {(r["task"], r["arm"]): Drift(**r) for r in run.lines("drift", *DRIFT)}
    replies = {(r["task"], r["arm"], r["item"]): r["reply"] for r in run.lines("replies")}

    def conversations(task: Asked, arm: str) -> list[TokenisedConversation]:
        said = [replies[task.card.name, arm, i] for i in range(len(task.items))]
        return as_conversations(engine.tokenizer, task.prompts, said)

    for task in asked:
        name = task.card.name
        if all((name, arm) in there for arm, profile in by_name.items() if profile is not None):
            continue
        unsteered = conversations(task, UNSTEERED)
        before = selections(engine, unsteered, batch_size)
        for arm, profile in by_name.items():
            if profile is None or (name, arm) in there:
                continue
            after = selections(engine, conversations(task, arm), batch_size)
            kl = divergence(engine, unsteered, profile, batch_size)
            drift = Drift(name, arm, kl, routing_drift(before, after))
            run.add("drift", [asdict(drift)])
            there[name, arm] = drift
    in_order = [(task.card.name, arm) for task in asked for arm in by_name]
    return [there[key] for key in in_order if key in there]


# -- the summary ---------------------------------------------------------------------------------


def task_facts(
    engine: "Engine", asked: Sequence[Asked], checks: str | Path, replies: Sequence[dict[str, Any]]
) -> tuple[list[TaskFacts], list[str]]:
    """What was asked, with each judge's check, and what speaks against trusting a judge."""
    facts, notes = [], []
    for task in asked:
        card = task.card
        check = known_check(card, checks, engine)
        notes += doubts(card, check)
        facts.append(
            TaskFacts(
                name=card.name,
                title=card.title,
                outcome=card.outcome,
                outcomes=card.outcomes,
                role=card.role,
                harmless=card.harmless,
                items=len(task.items),
                check=told(check),
                agreement=_agreement(reply for reply in replies if reply["task"] == card.name),
            )
        )
    return facts, notes


def _agreement(replies: Iterable[Mapping[str, Any]]) -> str:
    """How often several judges gave different outcomes; nothing to say of a single one."""
    verdicts = [tuple(Verdict(**verdict) for verdict in reply["verdicts"]) for reply in replies]
    differ, both = disagreement([Judged(None, of_reply) for of_reply in verdicts])
    return f"its judges differ on {differ:,} of {both:,} replies" if both else ""


def arm_facts(
    name: str,
    profile: "Profile | None",
    fired: Sequence[Mapping[str, Any]],
    gates: Sequence[Mapping[str, Any]],
) -> ArmFacts:
    """What an arm is, and whether its steering was obeyed, from a run's lines."""
    if profile is None:
        return ArmFacts(name)
    # A group that was asked twice, because the first time was cut off, counts once.
    mine = {(r["task"], r["start"], *_where(r)): r for r in fired if r["arm"] == name}
    opened = [line["steered"] for line in gates if line["arm"] == name]
    by_place: Counter[tuple] = Counter()
    for (_, _, *where), record in mine.items():
        by_place[tuple(where)] += record["tokens"]
    return ArmFacts(
        name,
        profile.activated,
        profile.deactivated,
        tokens=max(by_place.values(), default=0),
        # Where every prompt left its gate shut there is nothing to obey.
        obeyed=(bool(mine) or (bool(opened) and not any(opened)))
        and all(record["obeyed"] for record in mine.values()),
        note=profile.name,
        directions=tuple(direction.words for direction in profile.directions),
    )


def _gates(
    tasks: Sequence[TaskFacts],
    by_name: "Mapping[str, Profile | None]",
    lines: Sequence[Mapping[str, Any]],
) -> Iterator[Gated]:
    """How many prompts of each task opened the gate, in each arm that has one."""
    steered = {(line["task"], line["arm"], line["item"]): line["steered"] for line in lines}
    for task in tasks:
        for arm, profile in by_name.items():
            if profile is not None and profile.gate is not None:
                opened = [open for (*of, _), open in steered.items() if of == [task.name, arm]]
                ends = wilson_interval(sum(opened), len(opened))
                yield Gated(task.name, arm, sum(opened), len(opened), *ends)


def _where(record: Mapping[str, Any]) -> tuple:
    """What tells the lines of one group apart: a router has no place."""
    return record["layer"], record.get("place"), record.get("expert"), record.get("operation")
