"""A report as GitHub's Markdown: the same blocks as the page; figures are their tables."""

import re
from collections.abc import Iterator

from moesteer.report.blocks import (
    Block,
    Commands,
    Exchange,
    Figure,
    Lead,
    Paragraph,
    Report,
    Table,
    Warn,
)

WIDEST = 20
"""Columns; wider tables (a heat map's numbers) are left to the page."""
LONGEST = 60
"""Rows of a table that are written out."""


def markdown_of(report: Report) -> str:
    """The whole text, with one level-1 heading."""
    parts = [f"# {escaped(report.title)}"]
    for section in report.sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            parts += _written(block)
    return "\n\n".join(parts) + "\n"


def _written(block: Block) -> Iterator[str]:
    match block:
        case Lead():
            yield f"**{escaped(block.text)}**"
        case Paragraph():
            yield escaped(block.text)
        case Warn():
            yield f"> **Note.** {escaped(block.text)}"
        case Commands():
            yield fenced("\n".join(block.lines), "sh")
        case Exchange():
            yield f"{escaped(block.task)}, asked:"
            yield fenced(block.prompt)
            for arm, reply, outcome in block.replies:
                yield f"{escaped(arm)} ({escaped(outcome)}):"
                yield fenced(reply)
        case Figure():
            yield f"### {escaped(block.title)}"
            yield from _table(block.table)
        case Table():
            yield from _table(block)


def _table(table: Table) -> Iterator[str]:
    if len(table.headings) > WIDEST:
        yield f"{escaped(table.caption)}: {len(table.headings)} columns, on the HTML page."
        return
    yield f"*{escaped(table.caption)}*"
    rows = [table.headings, *((cell.text for cell in row) for row in table.rows[:LONGEST])]
    lines = ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in rows]
    ruler = "|" + "|".join("---:" if right else "---" for right in table.numeric) + "|"
    yield "\n".join([lines[0], ruler, *lines[1:]])
    if len(table.rows) > LONGEST:
        yield f"{len(table.rows) - LONGEST:,} more rows are on the HTML page."


def escaped(words: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line, also within a table."""
    words = " ".join(words.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~#>])", r"\\\1", words)


def fenced(words: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", words)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{words}\n{fence}"
