"""Two contestants side by side: A B A B …, and the ratio of each pair.

A single time says more about the machine than about the code, and a machine changes from minute to
minute. So nothing here is timed alone: within a round each piece of work is done by both, one right
after the other, and only the ratio of a round's two sums is kept.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """The ratios of all rounds, in their order."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.rounds)

    def __str__(self) -> str:
        if len(self.rounds) == 1:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({min(self.rounds):.3g}–{max(self.rounds):.3g})"


@dataclass(frozen=True)
class Figure:
    """One line of the results: a ratio, and the bar it should reach, None where it only informs."""

    section: str
    name: str
    ratio: Ratio
    bar: float | None = None
    at_most: bool = False
    """Whether the ratio should stay below the bar rather than reach it."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.ratio.median <= self.bar if self.at_most else self.ratio.median >= self.bar


def record_of(figure: Figure) -> dict[str, Any]:
    """A figure as JSON; `figure_of` reads it."""
    return {**asdict(figure), "median": figure.ratio.median, "met": figure.met}


def figure_of(record: dict[str, Any]) -> Figure:
    ratio = Ratio(tuple(record["ratio"]["rounds"]))
    given = {one.name: record[one.name] for one in fields(Figure)}
    return Figure(**{**given, "ratio": ratio})


def processor_seconds(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_seconds(work: Work) -> float:
    """For work on a GPU, which has to end with its results on the CPU."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def relative_speed(
    ours: Sequence[Work],
    other: Sequence[Work],
    rounds: int,
    warm_up: int = 1,
    seconds: Callable[[Work], float] = processor_seconds,
) -> Ratio:
    """How fast ours is, in units of the other: time(other) / time(ours), a ratio a round.

    Both hold the same pieces of work in the same order; each piece is done by both in turn.
    """
    ratios: list[float] = []
    for number in range(warm_up + rounds):
        ours_took = other_took = 0.0
        for our_piece, other_piece in zip(ours, other, strict=True):
            ours_took += seconds(our_piece)
            other_took += seconds(other_piece)
        if number >= warm_up:
            ratios.append(other_took / ours_took)
    return Ratio(tuple(ratios))
