"""Outcomes of every arm beside the controls, what the verdict stands on, and proof of firing."""

from collections.abc import Sequence

from moesteer.evaluation.comparison import (
    STEERED,
    UNSTEERED,
    ArmFacts,
    Comparison,
    Difference,
)
from moesteer.report.blocks import (
    Block,
    Cell,
    Figure,
    Table,
    number,
    percent,
    probability,
    signs,
    text,
)
from moesteer.report.figures import (
    outcome_dots,
)
from moesteer.report.page import Evaluation
from moesteer.report.terminal import named
from moesteer.report.verdict import verdicts


def outcome_blocks(evaluation: Evaluation) -> list[Block]:
    """Shares, what the verdict stands on, all differences, drift and the proof of firing."""
    comparison = evaluation.comparison
    of = f"{comparison.profile}, split {comparison.split}"
    tasks = sorted(comparison.tasks, key=lambda task: task.role == "price")
    return [
        Figure(
            f"Outcomes beside the controls: {of}",
            tuple(outcome_dots(comparison, task) for task in tasks),
            "A dot an arm, with Wilson's 95 % interval; controls have a dot a seed. The dashed line"
            " is the unsteered model.",
            _shares_table(comparison, of),
        ),
        _evidence_table(comparison, of),
        _differences_table(
            "All differences in percentage points, paired by prompt, with 95 % bootstrap intervals"
            f" and exact p, of other prompts and not of other seeds: {of}",
            comparison.differences,
        ),
        *_outcomes_tables(comparison, of),
        *_gates_table(comparison, of),
        *_drift_table(comparison, of),
        _fired_table(comparison, of),
    ]


def _shares_table(comparison: Comparison, of: str) -> Table:
    headings = ("task", "arm", "outcome", "share", "from", "to", "replies", "unjudged")
    rows = [
        (
            text(share.task),
            text(share.arm),
            text(task.outcome),
            percent(share.share),
            percent(share.low),
            percent(share.high),
            number(share.n, "d"),
            number(share.unjudged, "d"),
        )
        for task in comparison.tasks
        for share in comparison.shares
        if share.task == task.name
    ]
    return Table(f"Shares with Wilson's 95 % interval: {of}", headings, tuple(rows))


def _outcomes_tables(comparison: Comparison, of: str) -> list[Block]:
    """Of tasks with more than two outcomes all of them: what is no refusal may be no answer."""
    tables: list[Block] = []
    for task in comparison.tasks:
        shares = [share for share in comparison.shares if share.task == task.name and share.n]
        names = tuple(dict.fromkeys((*task.outcomes, *(o for s in shares for o in s.outcomes))))
        if len(names) > 2 and shares:
            rows = tuple(
                (text(s.arm), *(percent(s.outcomes.get(o, 0) / s.n) for o in names)) for s in shares
            )
            caption = f"All outcomes of {task.name}, shares of the judged replies: {of}"
            tables.append(Table(caption, ("arm", *names), rows))
    return tables


def _evidence_table(comparison: Comparison, of: str) -> Table:
    """Of each target every difference that must hold, of each price how far it falls."""
    against = {found.task: found.against for found in verdicts(comparison)}
    return _differences_table(
        f"What the verdict stands on, in percentage points: {of}",
        [
            comparison.difference(task.name, STEERED, other)
            for task in sorted(comparison.tasks, key=lambda task: task.role == "price")
            for other in against.get(task.name, (UNSTEERED,))
        ],
    )


def _differences_table(caption: str, differences: Sequence[Difference]) -> Table:
    def points(share: float | None) -> Cell:
        return Cell("–") if share is None else Cell(signs(f"{100 * share:+.1f}"), share)

    rows = tuple(
        (
            text(d.task),
            text(f"{d.arm} less {d.against}"),
            points(d.difference),
            points(d.low),
            points(d.high),
            probability(d.p),
            probability(d.holm),
            number(d.n, "d"),
        )
        for d in differences
    )
    headings = ("task", "difference", "points", "from", "to", "p", "p (Holm)", "prompts")
    return Table(caption, headings, rows)


def _gates_table(comparison: Comparison, of: str) -> list[Block]:
    """Which prompts were steered at all, where the profile has a gate."""
    if not comparison.gates:
        return []
    rows = tuple(
        (
            text(gated.task),
            text(gated.arm),
            number(gated.opened, "d"),
            number(gated.prompts, "d"),
            percent(gated.opened / gated.prompts if gated.prompts else None),
            percent(gated.low),
            percent(gated.high),
        )
        for gated in comparison.gates
    )
    headings = ("task", "arm", "opened", "prompts", "share", "from", "to")
    return [Table(f"Prompts that opened the gate, with Wilson's interval: {of}", headings, rows)]


def _drift_table(comparison: Comparison, of: str) -> list[Block]:
    if not comparison.drifts:
        return []
    rows = tuple(
        (text(drift.task), text(drift.arm), number(drift.kl), number(drift.routing))
        for drift in comparison.drifts
    )
    caption = f"How far each arm moved from the unsteered model: {of}"
    headings = ("task", "arm", "KL, nats a token", "routing, 0–1")
    return [Table(caption, headings, rows)]


def _fired_table(comparison: Comparison, of: str) -> Table:
    steered = [arm for arm in comparison.arms if arm.name != UNSTEERED]
    columns = {
        "activated": [named(arm.activated) or "none" for arm in steered],
        "deactivated": [named(arm.deactivated) or "none" for arm in steered],
        "directions": ["; ".join(arm.directions) or "none" for arm in steered],
    }
    experts = any(arm.activated or arm.deactivated for arm in steered)
    if any(arm.directions for arm in steered):
        columns = columns if experts else {"directions": columns["directions"]}
    else:
        del columns["directions"]
    rows = tuple(
        (
            text(arm.name),
            *(text(words[place]) for words in columns.values()),
            number(arm.tokens, ",d"),
            text(_obeyed(arm)),
            text(arm.note),
        )
        for place, arm in enumerate(steered)
    )
    headings = ("arm", *columns, "tokens a layer", "obeyed", "steered by")
    return Table(f"Proof that the steering fired: {of}", headings, rows)


def _obeyed(arm: ArmFacts) -> str:
    if arm.obeyed and not arm.tokens:
        return "no prompt opened its gate"
    return "every token" if arm.obeyed else "not every token"
