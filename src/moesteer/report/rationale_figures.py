"""Figures of rationales: methods beside each other, and what masking or training changes."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from moesteer.evaluation.comparison import STEERED
from moesteer.rationale.measures import ACCURACY, RANDOM
from moesteer.rationale.summary import Mean, Summary
from moesteer.report.blocks import Curve, Dot, Drawing, Label, Line, Mark, percent, signs
from moesteer.report.figures import LEFT, Scale, Series, as_percent, drawn_axes, plain
from moesteer.report.rationale_words import (
    MEANT,
    chosen_methods,
    greyed,
    groups,
    is_share,
    name_of,
    prompted_methods,
    value_words,
)

STYLES = {
    "attention": "attends",
    "saliency": "slopes",
    "input": "slopes",
    "integrated": "slopes",
    "gate": "routes",
    "behaviour": "routes",
    "occlusion": "leaves",
    "unbound": "says",
    "top": "says",
    "random": "guesses",
}
"""By the first word of a method's name: what it looks at. Methods that look at the same have lines
of one colour, dashed differently."""
DASHES = ("", "dash1", "dash2", "dash3")
WIDTH = 370
NAMES = 138
"""Room for the names of methods."""
ROW = 20


def styles_of(methods: Sequence[str]) -> dict[str, str]:
    """How each method's line is drawn."""
    found: dict[str, str] = {}
    for method in methods:
        family = STYLES.get(method.partition("-")[0].partition(" ")[0], "leaves")
        place = sum(style.split()[0] == family for style in found.values())
        found[method] = f"{family} {DASHES[place % len(DASHES)]}".strip()
    return found


def method_dots(summary: Summary, measure: str, arms: Sequence[str]) -> Drawing:
    """A row a method: its mean under each arm, with the interval; random units last."""
    methods = [name for of, random in groups(summary) for name in (*of, *random)]
    means = {
        (arm, method): mean
        for arm in arms
        for method in methods
        if (mean := summary.mean(arm, method, measure)) is not None
    }
    methods = [method for method in methods if any((arm, method) in means for arm in arms)]
    x = Scale(0, 1, NAMES, WIDTH - 24)
    top, bottom = 50, 50 + ROW * len(methods) - 4
    form = as_percent if is_share(measure) else plain
    marks: list[Mark] = [
        Label(0, 14, name_of(measure), style="title"),
        Label(0, 31, MEANT[measure], style="quiet"),
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        marks.append(Line(x(tick), top - 10, x(tick), bottom, "grid"))
        if tick in (0, 0.5, 1):
            marks.append(Label(x(tick), bottom + 16, form(tick), "middle", "quiet"))
    said = []
    for row, method in enumerate(methods):
        y = top + ROW * row
        chance = method.startswith("random")
        shown = "random" if chance else method
        marks.append(Label(NAMES - 12, y + 4, shown, "end", "quiet" if chance else ""))
        for number, arm in enumerate(arms):
            mean = means.get((arm, method))
            if mean is not None:
                at = y + 6 * (number - (len(arms) - 1) / 2)
                pale = measure in greyed(summary, arm)
                marks += _dot(mean, x, at, "unsure" if pale else _arm_style(arm, chance))
        if (arms[0], method) in means:
            said.append(f"{method} {value_words(means[arms[0], method])}")
    return Drawing(name_of(measure), "; ".join(said), WIDTH, bottom + 26, tuple(marks))


def _arm_style(arm: str, chance: bool) -> str:
    style = "steered" if arm == STEERED else "" if chance else "plain"
    return f"{style} control".strip() if chance else style


def _dot(mean: Mean, x: Scale, y: float, style: str) -> list[Mark]:
    told = f"{mean.method}, {mean.arm}: {name_of(mean.measure)} {value_words(mean)}"
    return [
        Line(x(mean.low), y, x(mean.high), y, f"span {style}"),
        Dot(x(mean.value), y, 4, style, told),
    ]


def panel(
    measure: str,
    about: str,
    series: Sequence[Series],
    axis: str,
    *,
    forms: tuple[Callable[[float], str], Callable[[float], str]],
    whole: bool = False,
    pale: AbstractSet[float] = frozenset(),
    size: tuple[float, float] = (WIDTH, 286),
    names: float = NAMES,
) -> Drawing:
    """Lines with dots, named at their right ends; from 0 to 1 where that is the `whole`, else as
    high as they go.

    `axis` names the horizontal one, of which `forms` come first. `pale`: where along it values mean
    little. `names`: the room for names.
    """
    points = [point for line in series for point in line.points]
    width, height = size
    x = Scale(0, max(1e-9, *(x for x, _, _ in points)), LEFT, width - names)
    low, high = 0.0, 1.0
    if not whole:
        low, high = (f([*(y for _, y, _ in points), 0.0]) for f in (min, max))
        room = 0.06 * (high - low) or 0.05
        low, high = low - room * (low < 0), high + room
    y = Scale(low, high, height - 46, 46)
    marks: list[Mark] = [Label(0, 14, name_of(measure), style="title")]
    marks += drawn_axes(x, y, axis, MEANT[measure], *forms)
    if low < 0:
        marks.append(Line(x.start, y(0), x.end, y(0), "zero"))
    for line in reversed(series):  # the first lies on top
        marks.append(Curve(tuple((x(a), y(b)) for a, b, _ in line.points), line.style))
        for a, b, told in line.points:
            marks.append(Dot(x(a), y(b), 3, "unsure" if a in pale else line.style, told))
    ends = spread([y(line.points[-1][1]) for line in series], 14, 46, height - 8)
    for at, line in zip(ends, series, strict=True):
        marks.append(Label(x.end + 8, at + 4, line.name, style=f"name {line.style}"))
    return Drawing(name_of(measure), about, width, height, tuple(marks))


def spread(places: Sequence[float], least: float, top: float, bottom: float) -> list[float]:
    """The places moved as little as can be until they are `least` apart, from `top` to `bottom`.

    Least squares: less what stands above each, places must not fall (isotonic regression).
    """
    from scipy.optimize import isotonic_regression

    order = sorted(range(len(places)), key=lambda number: places[number])
    above = {number: least * rank for rank, number in enumerate(order)}
    free = isotonic_regression([places[number] - above[number] for number in order]).x
    last = max(top, bottom - least * (len(places) - 1))
    moved = dict(zip(order, free.clip(top, last).tolist(), strict=True))
    return [round(moved[number] + above[number], 2) for number in range(len(places))]


def share_curves(summary: Summary, arm: str, measure: str) -> Drawing | None:
    """A line a method over the share of the units that is masked; None where nothing is known."""
    styles = styles_of(summary.methods)
    series = []
    for method in summary.methods:
        points = tuple(
            (point.share, point.value, _at_share(point))
            for point in summary.curve(arm, method, measure)
            if point.share is not None
        )
        if points:
            series.append(Series(method, styles[method], points))
    if not series:
        return None
    about = "; ".join(f"{s.name} up to {s.points[-1][1]:.2f}" for s in series)
    return panel(
        measure,
        signs(about),
        series,
        "units kept" if measure == "sufficiency" else "units masked",
        forms=(as_percent, as_percent if is_share(measure) else plain),
        whole=is_share(measure),
        pale=set(summary.shares if measure in greyed(summary, arm) else ()),
    )


def _at_share(point: Mean) -> str:
    share = percent(point.share).text
    return f"{point.method}, {share} of the units: {name_of(point.measure)} {value_words(point)}"


def epoch_curves(epochs: Sequence[tuple[int, Summary]], measure: str) -> Drawing | None:
    """A line a method over the epochs, of their first arms; of random units one as a whole."""
    first = epochs[0][1]
    methods = [*chosen_methods(first), *prompted_methods(first), RANDOM]
    styles = styles_of(methods)
    series = []
    for method in methods:
        points = []
        for epoch, summary in epochs:
            mean = summary.mean(summary.arms[0].name, method, measure)
            if mean is not None:
                told = f"{method}, epoch {epoch}: {name_of(measure)} {value_words(mean)}"
                points.append((float(epoch), mean.value, told))
        if points:
            series.append(Series(method, styles[method], tuple(points)))
    if not series:
        return None
    about = "; ".join(f"{s.name} {s.points[0][1]:.2f} to {s.points[-1][1]:.2f}" for s in series)
    return panel(
        measure,
        about,
        series,
        "epoch",
        forms=(_whole_numbers, as_percent if is_share(measure) else plain),
        whole=True,
        pale={epoch for epoch, s in epochs if measure in greyed(s, s.arms[0].name)},
    )


def accuracy_curve(epochs: Sequence[tuple[int, Summary]]) -> Drawing:
    """Accuracy over the epochs, beside the share of the commonest label."""
    right, alone = [], []
    for epoch, summary in epochs:
        arm = summary.arms[0]
        low, high = (percent(end).text for end in (arm.low, arm.high))
        told = f"epoch {epoch}: accuracy {percent(arm.accuracy).text} ({low} … {high})"
        right.append((float(epoch), arm.accuracy, told))
        common = f"the commonest label alone: {percent(arm.majority).text}"
        alone.append((float(epoch), arm.majority, common))
    series = [
        Series("accuracy", "leaves", tuple(right)),
        Series("commonest label alone", "guesses", tuple(alone)),
    ]
    first, last = (percent(point[1]).text for point in (right[0], right[-1]))
    return panel(
        ACCURACY,
        f"from {first} to {last}",
        series,
        "epoch",
        forms=(_whole_numbers, as_percent),
        whole=True,
        size=(2 * WIDTH + 20, 196),
        names=NAMES + 10,
    )


def _whole_numbers(value: float) -> str:
    """Epochs are whole; what lies between them is not named."""
    return f"{value:g}" if value == int(value) else ""
