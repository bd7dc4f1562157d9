"""What a report is made of: sections of paragraphs, tables, figures, replies and commands.

The same blocks become HTML and Markdown. A figure is drawn in HTML, and its table says the same in
both. A drawing is marks at positions in pixels, from the upper left corner.
"""

from dataclasses import dataclass

MINUS = "−"
NARROW = "\N{NARROW NO-BREAK SPACE}"


@dataclass(frozen=True)
class Cell:
    """What stands in a table; `value` is what it is sorted by, None for a text.

    `pale`: it means little, and a warning says why.
    """

    text: str
    value: float | None = None
    pale: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first column names the row. Columns of numbers are aligned right.

    `apart` are numbers of rows that the others are compared with.
    """

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    apart: frozenset[int] = frozenset()

    def __post_init__(self):
        for row in self.rows:
            assert len(row) == len(self.headings), (self.caption, row)

    @property
    def numeric(self) -> tuple[bool, ...]:
        """By column: whether it holds numbers."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.headings)
        return tuple(any(cell.value is not None for cell in column) for column in columns)


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Warn:
    """What the reader must know before believing a number."""

    text: str


@dataclass(frozen=True)
class Lead:
    """The verdict, set apart."""

    text: str
    found: bool


@dataclass(frozen=True)
class Commands:
    """What to type: in a shell, or in another language."""

    lines: tuple[str, ...]
    language: str = "sh"


@dataclass(frozen=True)
class Exchange:
    """A prompt and what was said to it, each with whose reply it is and its outcome."""

    task: str
    prompt: str
    replies: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Word:
    """A piece of a text: what is shaded or marked in one way; without a style it is plain.

    `share`, from 0 to 1, is how much of its style's colour it has, None for no shade; `human`:
    people marked it; `chosen`: a method did; `told` is read on it.
    """

    text: str
    style: str = ""
    share: float | None = None
    human: bool = False
    chosen: bool = False
    told: str = ""


@dataclass(frozen=True)
class Shaded:
    """A text several times over, each time as one method sees it."""

    title: str
    lines: tuple[tuple[str, tuple[Word, ...]], ...]


# -- drawings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rect:
    """`share`, from 0 to 1, is how much of its style's colour it has; `told` is read on it."""

    x: float
    y: float
    width: float
    height: float
    style: str
    share: float | None = None
    told: str = ""


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    r: float
    style: str
    told: str = ""


@dataclass(frozen=True)
class Line:
    x1: float
    y1: float
    x2: float
    y2: float
    style: str


@dataclass(frozen=True)
class Curve:
    """Straight lines from point to point."""

    points: tuple[tuple[float, float], ...]
    style: str


@dataclass(frozen=True)
class Label:
    """`anchor`: which end of the text, or its middle, is at x; the baseline is at y."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    style: str = ""


Mark = Rect | Dot | Line | Curve | Label


@dataclass(frozen=True)
class Drawing:
    """`title` names it, `about` says in words what there is to see."""

    title: str
    about: str
    width: float
    height: float
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Figure:
    """Drawings beside each other, how to read them, and the table that says the same."""

    title: str
    drawings: tuple[Drawing, ...]
    caption: str
    table: Table


Block = Paragraph | Warn | Lead | Commands | Exchange | Shaded | Table | Figure


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """A whole report; `title` is what it is about."""

    title: str
    sections: tuple[Section, ...]


# -- numbers in words ----------------------------------------------------------------------------


def number(value: float | None, form: str = ".3f") -> Cell:
    """A number with the minus sign that typography has; a dash where there is none."""
    if value is None:
        return Cell("–")
    return Cell(signs(format(value, form)), float(f"{value:.6g}"))


def text(words: object) -> Cell:
    return Cell(str(words))


def percent(share: float | None) -> Cell:
    return Cell("–") if share is None else Cell(f"{100 * share:.0f}{NARROW}%", share)


def probability(p: float | None) -> Cell:
    """A p or q, with a bound where it is small."""
    if p is None:
        return Cell("–")
    return Cell("< 0.001" if p < 0.001 else f"{p:.3f}", p)


def signs(written: str) -> str:
    """Minus signs for hyphens, and none before a zero."""
    if written.startswith("-") and not written.strip("-0."):
        written = written[1:]
    return written.replace("-", MINUS)
