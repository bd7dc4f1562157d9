"""Figures as marks at positions: heat map, volcano, dots with intervals, curves, scatter.

Nothing is drawn here; `template/marks.jinja` writes the marks as SVG. Colours are the terminal
page's: red goes with A, blue with B, grey is zero.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moesteer.detection.selecting import experts_table, ranked_experts
from moesteer.evaluation.comparison import STEERED, UNSTEERED, Comparison, TaskFacts, pool_of
from moesteer.profile import Profile
from moesteer.report.blocks import (
    NARROW,
    Curve,
    Dot,
    Drawing,
    Label,
    Line,
    Mark,
    Rect,
    percent,
    signs,
)
from moesteer.report.terminal import FALSE_DISCOVERIES

SMALLEST_P = 1e-300


@dataclass(frozen=True)
class Scale:
    """From values to pixels, evenly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    @property
    def ticks(self) -> list[float]:
        """Three to seven round values."""
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span))
        step *= next(part for part in (1, 0.5, 0.2) if span / (step * part) >= 2.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(step * number, 12) for number in range(first, last + 1)]


def plain(value: float) -> str:
    return signs(f"{value:g}")


# -- experts -------------------------------------------------------------------------------------

LEFT = 46
"""Room for the numbers of layers, and of the vertical axis."""


def heat_map(profile: Profile) -> Drawing:
    """Scores as a layer × expert grid: a cell of 12 to 34 px an expert, full colour at max |score|.

    Cells with q < 0.05 are outlined, activated ones bear a +, deactivated ones a −.
    """
    assert profile.scores is not None
    assert profile.model is not None
    shapes = profile.model.layers
    widest = max(shape.experts for shape in shapes)
    side = max(12, min(34, 680 // widest))
    largest = _largest(profile)
    signs_of = dict.fromkeys(profile.activated, "+") | dict.fromkeys(profile.deactivated, "−")
    cells: list[Mark] = []
    over: list[Mark] = []
    top = 24
    for row, shape in enumerate(shapes):
        y = top + row * side
        cells.append(Label(LEFT - 8, y + side / 2 + 4, str(shape.layer), "end"))
        for expert in range(shape.experts):
            x = LEFT + expert * side
            value = float(profile.scores.value[row, expert])
            share = round(abs(value) / largest, 3)
            told = expert_words(profile, row, expert)
            style = "warm" if value > 0 else "cold"
            cells.append(Rect(x, y, side - 1, side - 1, style, share, told))
            if profile.scores.q[row, expert] < FALSE_DISCOVERIES:
                over.append(Rect(x + 1, y + 1, side - 3, side - 3, "found"))
            if sign := signs_of.get((shape.layer, expert)):
                centre = x + (side - 1) / 2
                strong = "on strong" if share > 0.5 else "on"
                over.append(Label(centre, y + (side - 1) / 2 + 5, sign, "middle", strong))
    every = next(step for step in (1, 2, 4, 8, 16, 32) if side * step >= 24)
    numbers = [
        Label(LEFT + expert * side + (side - 1) / 2, top - 8, str(expert), "middle")
        for expert in range(0, widest, every)
    ]
    bottom = top + len(shapes) * side
    return Drawing(
        f"Scores by layer and expert: {profile.name}",
        f"{len(shapes)} layers of up to {widest} experts; scores from −{largest:.2f} (blue) to"
        f" +{largest:.2f} (red); {_strongest_words(profile)}.",
        max(LEFT + widest * side + 8, 340),
        bottom + 44,
        (Label(4, top - 8, "layer"), *numbers, *cells, *over, *_legend(largest, bottom + 14)),
    )


def _legend(largest: float, y: float) -> list[Mark]:
    """Blue, grey and red with their scores, in steps."""
    marks: list[Mark] = []
    for step in range(-8, 9):
        style = "warm" if step > 0 else "cold"
        marks.append(Rect(LEFT + (step + 8) * 12, y, 12, 8, style, abs(step) / 8))
    for place, words in ((0, f"−{largest:.2f}"), (8.5, "0"), (17, f"+{largest:.2f}")):
        marks.append(Label(LEFT + place * 12, y + 24, words, "middle"))
    return [*marks, Label(LEFT + 17 * 12 + 26, y + 8, "score")]


def volcano(profile: Profile) -> Drawing:
    """Every expert at (score, −log10 p); filled where q < 0.05, ringed where steered."""
    assert profile.scores is not None
    assert profile.model is not None
    scores = profile.scores
    steered = {*profile.activated, *profile.deactivated}
    largest = _largest(profile)
    highest = max(1.0, -math.log10(max(min(experts_table(profile, "p").values()), SMALLEST_P)))
    x = Scale(-1.08 * largest, 1.08 * largest, LEFT, 560)
    y = Scale(0, 1.05 * highest, 300, 28)
    marks = drawn_axes(x, y, "score (right: more in A)", "−log₁₀ p")
    marks.append(Line(x(0), y.start, x(0), y.end, "zero"))
    later: list[Mark] = []
    for row, shape in enumerate(profile.model.layers):
        for expert in range(shape.experts):
            value = float(scores.value[row, expert])
            height = -math.log10(max(float(scores.p[row, expert]), SMALLEST_P))
            side = "warm" if value > 0 else "cold"
            sure = scores.q[row, expert] < FALSE_DISCOVERIES
            told = expert_words(profile, row, expert)
            dot = Dot(x(value), y(height), 3.5, side if sure else "unsure", told)
            marks.append(dot)
            if (shape.layer, expert) in steered:
                later.append(Dot(dot.x, dot.y, 6.5, "ring"))
    found = sum(q < FALSE_DISCOVERIES for q in experts_table(profile, "q").values())
    return Drawing(
        f"Score against certainty: {profile.name}",
        f"{found} experts have q < {FALSE_DISCOVERIES}; {_strongest_words(profile)}.",
        580,
        344,
        (*marks, *later),
    )


def expert_words(profile: Profile, row: int, expert: int) -> str:
    """All that is known of an expert, in a line."""
    assert profile.scores is not None
    assert profile.model is not None
    s, layer = profile.scores, profile.model.layers[row].layer
    at = row, expert
    role = "activated" if (layer, expert) in profile.activated else ""
    role = "deactivated" if (layer, expert) in profile.deactivated else role
    words = signs(
        f"layer {layer}, expert {expert}: {s.value[at]:+.3f} ({s.low[at]:+.3f} … {s.high[at]:+.3f})"
    )
    certainty = f"q {'< 0.001' if s.q[at] < 0.001 else f'= {s.q[at]:.3f}'}"
    rates = f"in A {percent(s.rate_a[at]).text}{_count(profile, 'tokens_a', s.rate_a[at])}"
    rates += f", in B {percent(s.rate_b[at]).text}{_count(profile, 'tokens_b', s.rate_b[at])}"
    return "; ".join(filter(None, (words, certainty, rates, role)))


def _count(profile: Profile, side: str, rate: float) -> str:
    """How many tokens selected it; a mean probability counts none."""
    seen = profile.evidence
    if seen is None or seen.counted not in ("top-k", "top-1") or not getattr(seen, side):
        return ""
    tokens = getattr(seen, side)
    return f" ({round(rate * tokens):,} of {tokens:,})"


def _largest(profile: Profile) -> float:
    """The largest |score|; 1 where all are 0."""
    return max(map(abs, experts_table(profile, "value").values())) or 1.0


def _strongest_words(profile: Profile) -> str:
    strongest = ranked_experts(profile)[:3]
    return "strongest: " + ", ".join(f"layer {layer} expert {e}" for layer, e in strongest)


# -- outcomes ------------------------------------------------------------------------------------

ROW = 22


def outcome_dots(comparison: Comparison, task: TaskFacts) -> Drawing:
    """A row an arm, or a pool of arms: the share of the task's outcome with Wilson's interval."""
    pools = list(dict.fromkeys(pool_of(arm.name) for arm in comparison.arms))
    x = Scale(0, 1, 112, 316)
    top = 50
    bottom = top + ROW * len(pools) - 6
    marks: list[Mark] = [Label(0, 14, task.title, style="title")]
    marks.append(Label(0, 31, f"{task.role}: share of “{task.outcome}”", style="quiet"))
    for share in (0, 0.25, 0.5, 0.75, 1):
        marks.append(Line(x(share), top - 10, x(share), bottom, "grid"))
        if share in (0, 0.5, 1):
            words = percent(share).text
            marks.append(Label(x(share), bottom + 16, words, "middle", "quiet"))
    before = comparison.share(task.name, UNSTEERED).share
    if before is not None:
        marks.append(Line(x(before), top - 10, x(before), bottom, "before"))
    for row, pool in enumerate(pools):
        y = top + ROW * row
        style = {STEERED: "steered", UNSTEERED: "plain"}.get(pool, "control")
        marks.append(Label(102, y + 4, pool, "end", "strong" if pool == STEERED else ""))
        shares = [s for s in comparison.shares if s.task == task.name and pool_of(s.arm) == pool]
        for number, share in enumerate(shares):
            if share.share is None:
                continue
            at = y + 5 * (number - (len(shares) - 1) / 2)
            told = (
                f"{share.arm}: {percent(share.share).text} ({percent(share.low).text} …"
                f" {percent(share.high).text}), {share.count} of {share.n}"
            )
            told += f", {share.unjudged} unjudged" if share.unjudged else ""
            marks.append(Line(x(share.low), at, x(share.high), at, f"span {style}"))
            marks.append(Dot(x(share.share), at, 4.5 if len(shares) == 1 else 3, style, told))
    words = [
        f"{arm} {percent(share).text}"
        for arm in (UNSTEERED, STEERED)
        if (share := comparison.share(task.name, arm).share) is not None
    ]
    return Drawing(f"{task.title} ({task.name})", "; ".join(words), 340, bottom + 26, tuple(marks))


# -- searches ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """Points of one line: (x, y, what is said of it)."""

    name: str
    style: str
    points: tuple[tuple[float, float, str], ...]


def curves(
    title: str,
    about: str,
    series: Sequence[Series],
    axes: tuple[str, str, str],
    marked: float | None = None,
    loose: Sequence[Series] = (),
) -> Drawing:
    """Lines over a number of experts, shares up from 0 to 1; `loose` are points without a line.

    `axes` names the horizontal axis, the left and the right one; `marked` is a number of experts.
    """
    everything = [point for line in (*series, *loose) for point in line.points]
    most = max(point[0] for point in everything)
    x, y = Scale(0, max(most, 1) * 1.04, LEFT, 470), Scale(0, 1, 290, 34)
    marks = drawn_axes(x, y, axes[0], axes[1], up=as_percent)
    marks.append(Label(x.end, y.end - 12, axes[2], "end", "quiet"))
    if marked is not None:
        marks.append(Line(x(marked), y.start, x(marked), y.end, "before"))
        marks.append(Label(x(marked) + 6, y.start - 8, "chosen", style="quiet"))
    ends: list[tuple[float, Series]] = []
    for line in reversed(series):  # the first lies on top
        points = tuple((x(a), y(b)) for a, b, _ in line.points)
        marks.append(Curve(points, line.style))
        marks += [Dot(x(a), y(b), 4, line.style, told) for a, b, told in line.points]
        ends.append((points[-1][1], line))
    marks += [
        Dot(x(a), y(b), 4.5, line.style, told) for line in loose for a, b, told in line.points
    ]
    ends.reverse()
    for at, (_, line) in zip(apart([end for end, _ in ends], 15), ends, strict=True):
        marks.append(Label(x.end + 6, at + 4, line.name, style=f"name {line.style}"))
    return Drawing(title, about, 600, 336, tuple(marks))


def scatter(
    title: str,
    about: str,
    series: Sequence[Series],
    axes: tuple[str, str],
    *,
    form: Callable[[float], str] = plain,
    rings: Sequence[tuple[float, float, str]] = (),
    width: float = 560,
) -> Drawing:
    """Points of several kinds; `rings` stand around points, with a word beside them."""
    points = [point for kind in series for point in kind.points]
    x = _around([point[0] for point in points], LEFT, width - 14)
    y = _around([point[1] for point in points], width / 2, 28)
    marks = drawn_axes(x, y, *axes, form, form)
    for scale, other, flat in ((x, y, False), (y, x, True)):
        if scale.low < 0 < scale.high:
            ends = (other.start, scale(0), other.end, scale(0))
            marks.append(Line(*(ends if flat else (ends[1], ends[0], ends[3], ends[2])), "zero"))
    for kind in series:
        marks += [Dot(x(a), y(b), 4, kind.style, told) for a, b, told in kind.points]
    for a, b, words in rings:
        marks.append(Dot(x(a), y(b), 7.5, "ring"))
        end = x(a) > (x.start + x.end) / 2
        marks.append(
            Label(x(a) - 6 if end else x(a) + 6, y(b) - 10, words, "end" if end else "start")
        )
    return Drawing(title, about, width, width / 2 + 46, tuple(marks))


def as_percent(share: float) -> str:
    return signs(f"{100 * share:.0f}") + f"{NARROW}%"


def _around(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale that holds the values, with some room around them."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05
    return Scale(low - room, high + room, start, end)


def apart(places: Sequence[float], least: float) -> list[float]:
    """The places, in their order, moved down until they are `least` apart."""
    moved = dict.fromkeys(range(len(places)), 0.0)
    last = -math.inf
    for number in sorted(moved, key=lambda n: places[n]):
        last = moved[number] = max(places[number], last + least)
    return list(moved.values())


def drawn_axes(
    x: Scale,
    y: Scale,
    below: str,
    beside: str,
    across: Callable[[float], str] = plain,
    up: Callable[[float], str] = plain,
) -> list[Mark]:
    """Both axes with their names; `across` and `up` write the numbers at them."""
    marks: list[Mark] = []
    for tick in y.ticks:
        marks.append(Line(x.start, y(tick), x.end, y(tick), "grid"))
        marks.append(Label(x.start - 8, y(tick) + 4, up(tick), "end", "quiet"))
    for tick in x.ticks:
        marks.append(Line(x(tick), y.start, x(tick), y.start + 4, "axis"))
        marks.append(Label(x(tick), y.start + 18, across(tick), "middle", "quiet"))
    marks.append(Line(x.start, y.start, x.end, y.start, "axis"))
    marks.append(Label((x.start + x.end) / 2, y.start + 38, below, "middle", "quiet"))
    marks.append(Label(4, y.end - 12, beside, "start", "quiet"))
    return marks
