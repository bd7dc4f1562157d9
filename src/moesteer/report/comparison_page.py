"""What `moesteer evaluate` prints: arms by tasks, then the differences, then what it cost."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.evaluation.comparison import (
    STEERED,
    UNSTEERED,
    ArmFacts,
    Comparison,
    Difference,
    Share,
    TaskFacts,
    pool_of,
)
from moesteer.report.terminal import opened_words

LISTED = 3
"""Directions of an arm that are named."""

READING = """\
Shares are of judged replies, with Wilson's 95 % interval. Differences are paired by prompt, in
percentage points, with a 95 % bootstrap interval over prompts and an exact p, adjusted over tasks
(Holm); 0 alone: no difference on any prompt. Of several seeds, shares show the mean and least–most;
their p speaks of other prompts, not of other seeds.\
"""


def comparison_page(comparison: Comparison) -> RenderableType:
    """Shares, differences, drift and the proof of firing; no replies."""
    parts: list[RenderableType] = [
        Text(f"{comparison.profile} on {comparison.model}, split {comparison.split}", "bold"),
        Text(""),
        shares_table(comparison),
        Text(""),
        *_outcomes_tables(comparison),
        differences_table(comparison),
        Text(""),
        *_gates_table(comparison),
        drift_table(comparison),
        Text(""),
        Text(READING, "dim"),
        *(Text(line) for line in _below(comparison)),
    ]
    return Group(*parts)


def shares_table(comparison: Comparison) -> RenderableType:
    """A row an arm or pool of arms, a column a task: the share of its outcome, with interval."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("share of replies")
    for task in comparison.tasks:
        table.add_column(f"{task.name}\n{task.outcome} ({task.role})", justify="right")
    for pool in _pools(comparison):
        cells = [_share_cell(shares) for shares in _by_task(comparison, pool)]
        table.add_row(pool, *cells, style="" if pool in (UNSTEERED, STEERED) else "dim")
    table.add_row("replies an arm", *(str(task.items) for task in comparison.tasks), style="dim")
    return table


def _outcomes_tables(comparison: Comparison) -> Iterator[RenderableType]:
    """Of tasks with more than two outcomes all of them: what is no refusal may be no answer."""
    for task in comparison.tasks:
        if len(task.outcomes) > 2:
            table = Table(box=None, header_style="bold", pad_edge=False)
            table.add_column(f"outcomes of {task.name}")
            for outcome in task.outcomes:
                table.add_column(outcome, justify="right")
            for pool in _pools(comparison):
                shares = [s for s in _of_task(comparison, task) if pool_of(s.arm) == pool]
                n = sum(share.n for share in shares)
                counts = [sum(s.outcomes.get(o, 0) for s in shares) for o in task.outcomes]
                cells = [f"{count / n:.0%}" if n else "–" for count in counts]
                table.add_row(pool, *cells, style="" if pool in (UNSTEERED, STEERED) else "dim")
            yield table
            yield Text("")


def differences_table(comparison: Comparison) -> RenderableType:
    """A row a comparison, a column a task: percentage points, interval and Holm's p."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("difference, points")
    for task in comparison.tasks:
        table.add_column(task.name, justify="right")
    for arm, against in dict.fromkeys((d.arm, d.against) for d in comparison.differences):
        cells = [
            _difference_cell(comparison.difference(task.name, arm, against))
            for task in comparison.tasks
        ]
        table.add_row(f"{arm} − {against}", *cells, style="" if arm == STEERED else "dim")
    return table


def _gates_table(comparison: Comparison) -> Iterator[RenderableType]:
    """A row an arm or pool with a gate, a column a task: how many prompts opened it."""
    if not comparison.gates:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("prompts that opened the gate")
    for task in comparison.tasks:
        table.add_column(task.name, justify="right")
    for pool in dict.fromkeys(pool_of(gated.arm) for gated in comparison.gates):
        cells = []
        for task in comparison.tasks:
            mine = [g for g in comparison.gates if (g.task, pool_of(g.arm)) == (task.name, pool)]
            cells.append(", ".join(dict.fromkeys(opened_words(gated) for gated in mine)))
        table.add_row(pool, *cells, style="" if pool == STEERED else "dim")
    yield table
    yield Text("")


def drift_table(comparison: Comparison) -> RenderableType:
    """A row an arm or pool, a column a task: KL to the unsteered model, and routing drift."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("KL (nats a token) / routing")
    for task in comparison.tasks:
        table.add_column(task.name, justify="right")
    for pool in _pools(comparison):
        rows = [d for d in comparison.drifts if pool_of(d.arm) == pool]
        if rows:
            cells = []
            for task in comparison.tasks:
                mine = [d for d in rows if d.task == task.name]
                cells.append(f"{_mean([d.kl for d in mine])} / {_mean([d.routing for d in mine])}")
            table.add_row(pool, *cells, style="" if pool == STEERED else "dim")
    return table


def _below(comparison: Comparison) -> Iterator[str]:
    """The proof of firing, the judges' checks, what was unjudged, and other notes."""
    for arm in comparison.arms:
        if arm.name != UNSTEERED:
            yield fired_line(arm)
    for task in comparison.tasks:
        yield f"judge of {task.name}: {'; '.join(filter(None, (task.check, task.agreement)))}"
        unjudged = sum(share.unjudged for share in _of_task(comparison, task))
        if unjudged:
            asked = task.items * len(comparison.arms)
            yield f"unjudged on {task.name}: {unjudged:,} of {asked:,} replies, in no share"
    for note in comparison.notes:
        yield f"note: {note}"


def fired_line(arm: ArmFacts) -> str:
    """That an arm's experts and directions did what they should, on how many tokens."""
    experts = arm.activated or arm.deactivated or not arm.directions
    what = [f"+{len(arm.activated)} −{len(arm.deactivated)} experts"] if experts else []
    what += _listed(arm.directions)
    proof = ["activated always selected, deactivated never"] if experts else []
    proof += ["the stream moved as it should"] if arm.directions else []
    proof = proof if arm.obeyed else ["not always obeyed"]
    proof = proof if arm.tokens or not arm.obeyed else ["no prompt opened its gate"]
    tokens = f"{arm.tokens:,} tokens a {'layer' if experts else 'place'}"
    return f"fired: {arm.name} ({arm.note}): {'; '.join([*what, tokens, *proof])}"


def _listed(directions: Sequence[str]) -> list[str]:
    """The first directions, and how many more there are."""
    more = len(directions) - LISTED
    return [*directions[:LISTED], *([f"{more} more directions"] if more > 0 else [])]


def _pools(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(pool_of(arm.name) for arm in comparison.arms))


def _by_task(comparison: Comparison, pool: str) -> list[list[Share]]:
    return [
        [share for share in _of_task(comparison, task) if pool_of(share.arm) == pool]
        for task in comparison.tasks
    ]


def _of_task(comparison: Comparison, task: TaskFacts) -> list[Share]:
    return [share for share in comparison.shares if share.task == task.name]


def _share_cell(shares: Sequence[Share]) -> str:
    values = [share.share for share in shares if share.share is not None]
    if not values:
        return "unjudged"
    if len(shares) == 1:
        return f"{values[0]:.0%} ({shares[0].low:.0%}–{shares[0].high:.0%})"
    return f"{sum(values) / len(values):.0%} [{min(values):.0%}–{max(values):.0%}]"


def _difference_cell(difference: Difference) -> str:
    if difference.difference is None or difference.low is None or difference.high is None:
        return "–"
    if not (difference.difference or difference.low or difference.high):
        return "0"
    points, low, high = (100 * x for x in (difference.difference, difference.low, difference.high))
    return f"{points:+.0f} ({low:+.0f} … {high:+.0f}) {p_words(difference.holm)}"


def p_words(p: float | None) -> str:
    """p = 0.03, or p < 0.001 where it is smaller; nothing without a p."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "–"
