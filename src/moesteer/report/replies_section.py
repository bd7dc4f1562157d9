"""Replies before and after steering: counts always, texts only where they do no harm."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from moesteer.evaluation.comparison import (
    STEERED,
    UNSTEERED,
    TaskFacts,
)
from moesteer.evaluation.judge_check import UNJUDGED
from moesteer.report.blocks import (
    Block,
    Exchange,
    Paragraph,
    Table,
    number,
    text,
)
from moesteer.report.page import Evaluation, Page

SHOWN = 3
"""Prompts a task."""


def reply_blocks(page: Page, show_replies: bool) -> list[Block]:
    """Counts of outcomes before and after; replies of harmless tasks, of others where asked for."""
    blocks: list[Block] = []
    for evaluation in page.evaluations:
        blocks += _moved_table(evaluation)
        for task in evaluation.comparison.tasks:
            if task.harmless or show_replies:
                blocks += _exchanges(evaluation, task)
            else:
                blocks.append(
                    Paragraph(
                        f"Replies to {task.name} are not shown: the task is not marked harmless."
                        " Asked for with --show-replies, they are."
                    )
                )
    return blocks


def _before_and_after(
    evaluation: Evaluation, task: TaskFacts
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The unsteered and the steered reply to each prompt."""
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {UNSTEERED: {}, STEERED: {}}
    for record in evaluation.replies:
        if record["task"] == task.name and record["arm"] in by_arm:
            by_arm[record["arm"]][record["item"]] = record
    before, after = by_arm[UNSTEERED], by_arm[STEERED]
    return [(before[item], after[item]) for item in sorted(before.keys() & after.keys())]


def _moved_table(evaluation: Evaluation) -> list[Block]:
    rows = []
    for task in evaluation.comparison.tasks:
        pairs = _before_and_after(evaluation, task)
        moved = Counter((_outcome(before), _outcome(after)) for before, after in pairs)
        rows += [
            (text(task.name), text(before), text(after), number(count, "d"))
            for (before, after), count in moved.most_common()
        ]
    caption = f"Outcomes before and after steering: {evaluation.comparison.profile}"
    return (
        [Table(caption, ("task", "unsteered", "steered", "prompts"), tuple(rows))] if rows else []
    )


def _outcome(record: Mapping[str, Any]) -> str:
    return record["outcome"] or UNJUDGED


def _exchanges(evaluation: Evaluation, task: TaskFacts) -> list[Block]:
    """Prompts with another reply when steered; those whose outcome changed come first."""
    pairs = [p for p in _before_and_after(evaluation, task) if p[0]["reply"] != p[1]["reply"]]
    pairs.sort(key=lambda pair: _outcome(pair[0]) == _outcome(pair[1]))
    return [
        Exchange(
            task.name,
            before["prompt"],
            (
                (UNSTEERED, before["reply"], _outcome(before)),
                (STEERED, after["reply"], _outcome(after)),
            ),
        )
        for before, after in pairs[:SHOWN]
    ]
