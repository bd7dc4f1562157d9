"""The judges: their verdicts, what checks say of them, and what speaks against them."""

from collections import Counter
from collections.abc import Iterator, Sequence

from moesteer.evaluation.comparison import (
    Comparison,
    TaskFacts,
)
from moesteer.evaluation.judge_check import UNCHANGED
from moesteer.report.blocks import (
    Block,
    Table,
    number,
    percent,
    text,
)
from moesteer.report.page import Check, Evaluation, Page

NEVER_CHECKED = "never checked"
GUESS = "no better than a guess"


def judge_blocks(page: Page) -> list[Block]:
    """Who judged, how often which outcome was given, and how the judges were checked."""
    blocks: list[Block] = []
    for evaluation in page.evaluations:
        comparison = evaluation.comparison
        checks = {check.check.card: check for check in page.checks}
        rows = tuple(
            (
                text(task.name),
                text(_judge_names(evaluation, task)),
                text(_verdict_counts(comparison, task)),
                number(_unjudged(comparison, task), "d"),
                text(_check_words(checks.get(task.name), task)),
            )
            for task in comparison.tasks
        )
        headings = ("task", "judges", "verdicts, all arms", "unjudged", "check of the judge")
        caption = f"Verdicts and who checked the judges: {comparison.profile}"
        blocks.append(Table(caption, headings, rows))
    return [*blocks, *_check_tables(page.checks)]


def _judge_names(evaluation: Evaluation, task: TaskFacts) -> str:
    names = [
        verdict["judge"]
        for record in evaluation.replies
        if record["task"] == task.name
        for verdict in record["verdicts"]
    ]
    return ", ".join(dict.fromkeys(names)) or "–"


def _verdict_counts(comparison: Comparison, task: TaskFacts) -> str:
    said: Counter[str] = Counter()
    for share in comparison.shares:
        if share.task == task.name:
            said.update(share.outcomes)
    return ", ".join(f"{outcome} {count:,}" for outcome, count in said.items())


def _unjudged(comparison: Comparison, task: TaskFacts) -> int:
    return sum(share.unjudged for share in comparison.shares if share.task == task.name)


def _check_words(check: Check | None, task: TaskFacts) -> str:
    said = task.check
    if check is not None:
        plain = check.check.modes[UNCHANGED]
        said = f"right on {plain.seen} of {plain.n} known replies; see below"
    return "; ".join(filter(None, (said, task.agreement)))


def _check_tables(checks: Sequence[Check]) -> list[Block]:
    """What each judge sees of changed replies, and which outcome it gave where which was due."""
    if not checks:
        return []
    seen = tuple(
        (
            text(check.check.card),
            text(name),
            number(mode.seen, "d"),
            number(mode.n, "d"),
            percent(mode.share),
            percent(mode.low),
            percent(mode.high),
            text(GUESS if mode.share <= chance(check) else ""),
        )
        for check in checks
        for name, mode in check.check.modes.items()
    )
    given = tuple(
        (text(check.check.card), text(due), text(outcome), number(count, "d"))
        for check in checks
        for due, counts in check.check.confusion.items()
        for outcome, count in counts.items()
        if count
    )
    gold = "; ".join(f"{c.check.card}: {c.check.judge}, {c.check.gold}" for c in checks)
    headings = ("task", "change", "seen", "of", "share", "from", "to", "warning")
    return [
        Table(f"What the judges see of changed replies ({gold})", headings, seen),
        Table("Outcomes that judges gave where one was due", ("task", "due", "given", "n"), given),
    ]


def chance(check: Check) -> float:
    """How often a guess among the outcomes is right."""
    return 1 / len(check.check.confusion)


def doubts(page: Page) -> Iterator[str]:
    """What speaks against the judges: never checked, or no better than a guess."""
    checked = {check.check.card for check in page.checks}
    tasks = [task for evaluation in page.evaluations for task in evaluation.comparison.tasks]
    never = [t.name for t in tasks if t.check == NEVER_CHECKED and t.name not in checked]
    if never:
        yield f"The judges of {', '.join(dict.fromkeys(never))} were never checked."
    for evaluation in page.evaluations:
        yield from (note for note in evaluation.comparison.notes if f"{NEVER_CHECKED};" not in note)
    for check in page.checks:
        for name, mode in check.check.modes.items():
            if mode.share <= chance(check):
                seen = f"sees “{name}” in {mode.seen} of {mode.n} replies"
                yield f"{check.check.card}: its judge {seen}, {GUESS} among its outcomes."
