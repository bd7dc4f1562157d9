"""A report as GitHub's Markdown: the same blocks as the page.

Figures are their tables, or images, where whoever asks draws them.
"""

import re
from collections.abc import Callable, Iterable, Iterator

from moesteer.report.blocks import (
    Block,
    Cell,
    Commands,
    Drawing,
    Exchange,
    Figure,
    Lead,
    Paragraph,
    Report,
    Shaded,
    Table,
    Warn,
    Word,
)

WIDEST = 20
"""Columns; wider tables (a heat map's numbers) are left to the page."""
LONGEST = 60
"""Rows of a table that are written out."""


Draw = Callable[[Drawing], str]
"""Keeps a drawing as an image and gives the image's address."""


def markdown_of(report: Report, draw: Draw | None = None) -> str:
    """The whole text, with one level-1 heading; with `draw`, figures are images."""
    parts = [f"# {escaped(report.title)}"]
    for section in report.sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            parts += _written(block, draw)
    return "\n\n".join(parts) + "\n"


def _written(block: Block, draw: Draw | None) -> Iterator[str]:
    match block:
        case Lead():
            yield f"**{escaped(block.text)}**"
        case Paragraph():
            yield escaped(block.text)
        case Warn():
            yield f"> **Note.** {escaped(block.text)}"
        case Commands():
            yield fenced("\n".join(block.lines), block.language)
        case Exchange():
            yield f"{escaped(block.task)}, asked:"
            yield fenced(block.prompt)
            for arm, reply, outcome in block.replies:
                yield f"{escaped(arm)} ({escaped(outcome)}):"
                yield fenced(reply)
        case Shaded():
            yield f"{escaped(block.title)} (*people's words*, **the method's**)"
            yield "\n".join(f"* {escaped(name)}: {_marked(words)}" for name, words in block.lines)
        case Figure():
            yield f"### {escaped(block.title)}"
            if draw is None:
                yield from _table(block.table)
            else:
                yield "\n".join(f"![{escaped(d.about)}]({draw(d)})" for d in block.drawings)
                yield f"*{escaped(block.caption)}*"
        case Table():
            yield from _table(block)


def _table(table: Table) -> Iterator[str]:
    if len(table.headings) > WIDEST:
        yield f"{escaped(table.caption)}: {len(table.headings)} columns, on the HTML page."
        return
    yield f"*{escaped(table.caption)}*"
    rows = [map(escaped, table.headings)]
    rows += [map(_cell, row) for row in table.rows[:LONGEST]]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    ruler = "|" + "|".join("---:" if right else "---" for right in table.numeric) + "|"
    yield "\n".join([lines[0], ruler, *lines[1:]])
    if len(table.rows) > LONGEST:
        yield f"{len(table.rows) - LONGEST:,} more rows are on the HTML page."


def _cell(cell: Cell) -> str:
    words = escaped(cell.text)
    return f"*{words}*" if cell.pale and words else words


def _marked(words: Iterable[Word]) -> str:
    """The text with what people marked in italics and what the method chose in bold."""
    parts = []
    for word in words:
        # One space stands for many, also at the ends, where `escaped` leaves none.
        before, after = (" " * end for end in (word.text[:1].isspace(), word.text[-1:].isspace()))
        inner = escaped(word.text)
        stars = "*" * (word.human + 2 * word.chosen) if inner else ""
        parts.append(f"{before}{stars}{inner}{stars}{after if inner else ''}")
    return "".join(parts).strip()


def escaped(words: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line, also within a table."""
    words = " ".join(words.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~#>])", r"\\\1", words)


def fenced(words: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", words)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{words}\n{fence}"
