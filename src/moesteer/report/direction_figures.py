"""Figures of directions: what candidates do, by layer and position; who writes what, by layer."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from moesteer.report.blocks import MINUS, Curve, Dot, Drawing, Label, Line, Mark, Rect
from moesteer.report.figures import LEFT, Scale, Series, apart, drawn_axes, plain

Place = tuple[int, int]
"""(layer, position)."""


def layer_map(
    title: str,
    below: str,
    about: str,
    cells: Mapping[Place, tuple[float, str]],
    *,
    marked: AbstractSet[Place] = frozenset(),
    outlined: AbstractSet[Place] = frozenset(),
) -> Drawing:
    """A column a layer, a row a position: red is positive, blue negative, full at the largest.

    `below` stands under the title. `cells` hold the value and what is said of it; marked ones bear
    a +.
    """
    layers = sorted({layer for layer, _ in cells})
    positions = sorted({position for _, position in cells})
    side = max(9, min(34, 620 // (layers[-1] - layers[0] + 1)))
    largest = max(abs(value) for value, _ in cells.values()) or 1.0
    top = 62
    marks: list[Mark] = [
        Label(0, 14, title, style="title"),
        Label(0, 31, below, style="quiet"),
        Label(4, top - 8, "position"),
    ]
    over: list[Mark] = []
    every = next(step for step in (1, 2, 4, 8, 16, 32) if side * step >= 24)
    bottom = top + len(positions) * side
    for row, position in enumerate(positions):
        words = "mean" if position == 0 else f"{MINUS}{-position}"
        marks.append(Label(LEFT - 8, top + row * side + side / 2 + 4, words, "end"))
    for layer in range(layers[0], layers[-1] + 1):
        if (layer - layers[0]) % every == 0:
            x = LEFT + (layer - layers[0]) * side + (side - 1) / 2
            marks.append(Label(x, bottom + 14, str(layer), "middle", "quiet"))
    for (layer, position), (value, told) in sorted(cells.items()):
        x, y = LEFT + (layer - layers[0]) * side, top + positions.index(position) * side
        share = round(abs(value) / largest, 3)
        marks.append(Rect(x, y, side - 1, side - 1, "warm" if value > 0 else "cold", share, told))
        if (layer, position) in outlined:
            over.append(Rect(x + 1, y + 1, side - 3, side - 3, "found"))
        if (layer, position) in marked:
            strong = "on strong" if share > 0.5 else "on"
            over.append(Label(x + (side - 1) / 2, y + side / 2 + 4.5, "+", "middle", strong))
    width = LEFT + (layers[-1] - layers[0] + 1) * side + 8
    marks.append(
        Label(LEFT, bottom + 32, f"layer; full colour = {plain(round(largest, 3))}", style="quiet")
    )
    return Drawing(title, about, max(width, 236), bottom + 42, (*marks, *over))


def by_layer(
    title: str, about: str, series: Sequence[Series], up: str, across: str = "layer"
) -> Drawing:
    """Lines over layers, named at their right ends; zero is drawn."""
    points = [point for line in series for point in line.points]
    low, high = (f([*(y for _, y, _ in points), 0.0]) for f in (min, max))
    room = 0.06 * (high - low) or 0.05
    last = max(3.0, *(x for x, _, _ in points))  # for ticks at whole layers
    x = Scale(-0.02 * last, 1.02 * last, LEFT, 470)
    y = Scale(low - room, high + room, 290, 34)
    marks = drawn_axes(x, y, across, up)
    marks.append(Line(x.start, y(0), x.end, y(0), "zero"))
    for line in reversed(series):  # the first lies on top
        marks.append(Curve(tuple((x(a), y(b)) for a, b, _ in line.points), line.style))
        marks += [Dot(x(a), y(b), 3.5, line.style, told) for a, b, told in line.points]
    ends = [y(line.points[-1][1]) for line in series]
    for at, line in zip(apart(ends, 15), series, strict=True):
        marks.append(Label(x.end + 8, at + 4, line.name, style=f"name {line.style}"))
    return Drawing(title, about, 640, 336, tuple(marks))
