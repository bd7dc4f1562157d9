"""Judges, judged: how often a judge sees what a controlled change did to a reply.

Intuition. A share of outcomes is worth what its judge is worth. Take replies whose outcome is
known (gold), change each in one known way (changes.py), and count how often the judge gives the
outcome that the changed reply now has. The card's `[[changes]]` say which that is; `unchanged` is
the gold as it was.

    seen(mode) = replies of the mode with the expected outcome / replies of the mode

with Wilson's interval, and which outcome was given where which was due (confusion). A mode that the
task `depends_on` and in which the judge does no better than a guess among the outcomes is warned
of: what the task measures may then be the judge. Method: after REFLECT (arXiv 2605.19196).

The testbed's gold is made as it is needed, from the world's own texts.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesteer.errors import MoesteerError
from moesteer.evaluation.cards import Card, items_from, make_judges, with_prompts
from moesteer.evaluation.changes import CHANGES, Gold
from moesteer.evaluation.judges.testbed import OUTCOMES
from moesteer.evaluation.judging import cost_of, judge_replies
from moesteer.evaluation.task import Item, Judge
from moesteer.provenance import about, now
from moesteer.runs import open_run, read_run
from moesteer.statistics.intervals import wilson_interval

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

KIND = "judge"
UNCHANGED = "unchanged"
UNJUDGED = "unjudged"
FLUENT = "fluent"
SUMMARY = "summary.json"
BATCH = 64
"""Replies that are judged, and written, together."""


@dataclass(frozen=True)
class Probe:
    """A reply, changed or not, and the outcome that a judge should see."""

    mode: str
    item: Item
    reply: str
    expected: str


@dataclass(frozen=True)
class Mode:
    """A failure mode: the expected outcome was `seen` in so many of `n`; Wilson's interval."""

    seen: int
    n: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.seen / self.n


@dataclass(frozen=True)
class JudgeCheck:
    """What a check found. `confusion[expected][given]` counts replies; given may be "unjudged".

    `calls` and `tokens` are 0 where no judge counts them.
    """

    card: str
    judge: str
    gold: str
    date: str
    modes: Mapping[str, Mode]
    confusion: Mapping[str, Mapping[str, int]]
    seconds: float
    calls: int
    tokens: int


# --- gold ---------------------------------------------------------------------------------------


def read_gold(card: Card, path: str) -> list[Gold]:
    """Replies with a known outcome: the item's columns, `reply` and `outcome`, a record each."""
    gold = []
    for item in items_from(card, path, more=("reply", "outcome")):
        outcome = item.columns["outcome"]
        if outcome not in card.outcomes:
            raise MoesteerError(
                f"{item.source}: outcome is {outcome!r}; the judges of {card.name} give"
                f" {', '.join(card.outcomes)}."
            )
        columns = {k: v for k, v in item.columns.items() if k not in ("reply", "outcome")}
        bare = with_prompts(Item((), columns, item.source), card)
        gold.append(Gold(bare, item.columns["reply"], outcome))
    return gold


def built_in_gold(card: Card, split: str = "dev") -> list[Gold]:
    """Both replies of the testbed to each prompt of a split, with what they are by construction.

    Both are fluent. Raises MoesteerError where that is not what the card's judges tell apart.
    """
    if card.testbed is None or not _has_gold(card):
        raise MoesteerError(
            f"the task {card.name} has no replies of known outcome; give some with --gold FILE, a"
            f" JSONL file with {', '.join((*card.columns, 'reply', 'outcome'))}; the outcome is one"
            f" of {', '.join(card.outcomes)}."
        )
    from moesteer.testbed.world import PROBES, held_out, probes

    gold = []
    examples = held_out(card.testbed, split, PROBES)
    pairs = zip(probes(card.testbed, split), examples, strict=True)
    for number, (probe, example) in enumerate(pairs, start=1):
        columns = {"prompt": probe.prompt, **probe.expected}
        item = with_prompts(Item((), columns, f"testbed:{card.testbed}:{split}:{number}"), card)
        for outcome, reply in zip(probe.expected, (example.a, example.b), strict=False):
            gold.append(Gold(item, reply, FLUENT if card.outcome == FLUENT else outcome))
    return gold


def _has_gold(card: Card) -> bool:
    """Whether the testbed's replies have outcomes that the card's judges give."""
    if card.testbed not in OUTCOMES:
        return False
    known = set(OUTCOMES[card.testbed]) - {"other", "wrong"}
    return card.outcome == FLUENT or known <= set(card.outcomes)


# --- checking -----------------------------------------------------------------------------------


def probes_of(card: Card, gold: Sequence[Gold]) -> list[Probe]:
    """The gold as it is, then each of the card's changes where it makes sense."""
    return [Probe(UNCHANGED, one.item, one.reply, one.outcome) for one in gold] + [
        Probe(change.mode, one.item, reply, change.to or one.outcome)
        for change in card.changes
        for number, one in enumerate(gold)
        if one.outcome in change.of
        for reply in [CHANGES[change.mode].make(one, gold, change.column, number)]
        if reply is not None
    ]


def check_judges(
    card: Card,
    engine: "Engine | None" = None,
    *,
    gold: str | None = None,
    out: str | None = None,
    chat_options: Mapping[str, object] | None = None,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> JudgeCheck:
    """Judge the card's judges on gold replies: the user's file `gold`, or the testbed's own.

    With `out`, a folder, the verdicts and `summary.json` are kept there, and an interrupted check
    is taken up. Raises MoesteerError where there is no gold, or a judge can't be had.
    """
    known = read_gold(card, gold) if gold is not None else built_in_gold(card)
    probes = probes_of(card, known)
    judges = make_judges(card, engine, chat_options or {})
    if out is None:
        done, costs = [], []
        for batch in _batches(probes, 0, progress):
            records, cost = _judged(card, judges, batch)
            done += records
            costs.append(cost)
        return _summed(card, judges, probes, done, costs, gold)
    model = None if engine is None else engine.facts.id
    settings = {**_identity(card), "probes": _hash(probes), "model": model}
    with open_run(out, KIND, settings, about(command) | {"gold": gold}) as run:
        for batch in _batches(probes, len(run.lines("verdicts")), progress):
            records, cost = _judged(card, judges, batch)
            run.add("costs", [cost])
            run.add("verdicts", records)
        check = _summed(card, judges, probes, run.lines("verdicts"), run.lines("costs"), gold)
        _write_summary(run.folder, check)
    return check


def _batches(
    probes: Sequence[Probe], start: int, progress: Callable[[int, int], None] | None
) -> Iterator[Sequence[Probe]]:
    say = progress or (lambda done, total: None)
    say(start, len(probes))
    for first in range(start, len(probes), BATCH):
        yield probes[first : first + BATCH]
        say(min(first + BATCH, len(probes)), len(probes))


def _judged(
    card: Card, judges: Sequence[Judge], batch: Sequence[Probe]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A record a reply, and what judging them cost."""
    began, before = time.monotonic(), cost_of(judges)
    judged = judge_replies(card, judges, [p.item for p in batch], [p.reply for p in batch])
    after = cost_of(judges)
    cost = {
        "seconds": time.monotonic() - began,
        "calls": after.calls - before.calls,
        "tokens": after.tokens - before.tokens,
    }
    records = [
        {
            "mode": probe.mode,
            "item": probe.item.source,
            "prompt": probe.item.prompt,
            "reply": probe.reply,
            "expected": probe.expected,
            "outcome": one.outcome,
            "verdicts": [asdict(verdict) for verdict in one.verdicts],
        }
        for probe, one in zip(batch, judged, strict=True)
    ]
    return records, cost


def _summed(
    card: Card,
    judges: Sequence[Judge],
    probes: Sequence[Probe],
    done: Sequence[Mapping[str, Any]],
    costs: Sequence[Mapping[str, Any]],
    gold: str | None,
) -> JudgeCheck:
    modes: dict[str, Mode] = {}
    pairs = [(probe, record["outcome"]) for probe, record in zip(probes, done, strict=True)]
    for name in dict.fromkeys(probe.mode for probe in probes):
        right = [outcome == probe.expected for probe, outcome in pairs if probe.mode == name]
        modes[name] = Mode(sum(right), len(right), *wilson_interval(sum(right), len(right)))
    confusion = {due: dict.fromkeys((*card.outcomes, UNJUDGED), 0) for due in card.outcomes}
    for probe, outcome in pairs:
        confusion[probe.expected][outcome or UNJUDGED] += 1
    return JudgeCheck(
        card=card.name,
        judge=(f"{card.combine} of " if len(judges) > 1 else "")
        + ", ".join(j.name for j in judges),
        gold=gold or f"built in ({card.prompts.source})",
        date=now(),
        modes=modes,
        confusion=confusion,
        seconds=round(sum(cost["seconds"] for cost in costs), 3),
        calls=sum(cost["calls"] for cost in costs),
        tokens=sum(cost["tokens"] for cost in costs),
    )


# --- finding checks -----------------------------------------------------------------------------


def find_check(card: Card, folder: str | Path) -> JudgeCheck | None:
    """The newest finished check of the same card with the same judges, in `folder` or just below.

    None where there is none. A check of other settings, or of an older card, is not one.
    """
    found = []
    for path in (Path(folder), *sorted(Path(folder).glob("*/"))):
        if not (path / SUMMARY).is_file() or not (path / "run.json").is_file():
            continue
        try:
            run = read_run(path)
        except MoesteerError:  # a run of another version
            continue
        same = all(run.settings.get(key) == value for key, value in _identity(card).items())
        if run.kind == KIND and same:
            found.append(((path / SUMMARY).stat().st_mtime, path))
    return _read_summary(max(found)[1]) if found else None


def known_check(
    card: Card, folder: str | Path, engine: "Engine | None" = None
) -> JudgeCheck | None:
    """A check from `folder`, else, for a card of the testbed, one made on the spot.

    The latter is left out where a judge needs a model and there is none.
    """
    found = find_check(card, folder)
    needs = any(spec.settings.needs_engine for spec in card.judges)
    if found is not None or not _has_gold(card) or (needs and engine is None):
        return found
    return check_judges(card, engine)


def told(check: JudgeCheck | None) -> str:
    """A check in one line: what was seen as it was, of all changes, and what was seen least."""
    if check is None:
        return "never checked"
    changed = {name: mode for name, mode in check.modes.items() if name != UNCHANGED}
    seen, n = sum(m.seen for m in changed.values()), sum(m.n for m in changed.values())
    plain = check.modes[UNCHANGED]
    line = f"right on {plain.seen} of {plain.n} known replies"
    if not changed:
        return line
    worst = min(changed, key=lambda name: changed[name].share)
    return (
        f"{line}, {seen} of {n} changed ones; least on {worst}"
        f" ({changed[worst].seen} of {changed[worst].n})"
    )


def doubts(card: Card, check: JudgeCheck | None) -> list[str]:
    """What speaks against trusting the card's judges, a sentence each; none: nothing known."""
    if check is None:
        return [
            f"{card.name}: its judge was never checked; `moesteer judge check {card.name} --gold"
            " FILE --out FOLDER` does it."
        ]
    chance = 1 / len(card.outcomes)
    said = []
    for name in (UNCHANGED, *card.depends_on):
        mode = check.modes.get(name)
        if mode is None:
            said.append(f"{card.name}: its judge was never checked on {name}.")
        elif mode.share <= chance:
            said.append(
                f"{card.name}: its judge sees {name} in {mode.seen} of {mode.n}, no better than a"
                f" guess among {len(card.outcomes)} outcomes."
            )
    return said


def _identity(card: Card) -> dict[str, Any]:
    """What makes a check one of this card: its judges, and how they are asked and combined."""
    return {
        "card": card.name,
        "judges": [{"kind": s.kind, **s.settings.model_dump()} for s in card.judges],
        "combine": card.combine,
        "template": card.prompts.template,
        "changes": [[c.mode, list(c.of), c.to, c.column] for c in card.changes],
    }


def _write_summary(folder: Path, check: JudgeCheck) -> None:
    from moesteer.files import write_text

    write_text(folder / SUMMARY, json.dumps(asdict(check), ensure_ascii=False, indent=1) + "\n")


def _read_summary(folder: Path) -> JudgeCheck:
    path = folder / SUMMARY
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return JudgeCheck(**raw | {"modes": {k: Mode(**m) for k, m in raw["modes"].items()}})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MoesteerError(
            f"{path} can't be read ({error}); run `moesteer judge check` again."
        ) from None


def _hash(probes: Sequence[Probe]) -> str:
    content = [[p.mode, p.item.prompt, dict(p.item.columns), p.reply, p.expected] for p in probes]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
