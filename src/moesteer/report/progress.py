"""Progress of long work: a live line on a terminal, a plain line now and then elsewhere.

All of it goes to standard error; standard output is for results.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0


@contextmanager
def counted_progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `report(done, total)`; shows units/s of this run and the time left."""
    console = Console(stderr=True)
    began = time.monotonic()
    start: list[int] = []

    def rate(read: int) -> float:
        start.append(read)
        return (read - start[0]) / max(time.monotonic() - began, 1e-9)

    if console.is_terminal:
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(
                "{task.completed:,}/{task.total:,} {task.fields[unit]}, {task.fields[rate]:,.0f}/s,"
            ),
            TimeRemainingColumn(),
            TextColumn("left"),
        ]
        with Progress(*columns, console=console, transient=True) as progress:
            # A line is drawn as soon as it is there, and how much there is to do is not yet known.
            task = progress.add_task(title, total=0, rate=0.0, unit=unit, visible=False)

            def report(read: int, total: int) -> None:
                progress.update(task, completed=read, total=total, rate=rate(read), visible=True)

            yield report
        return
    said = [0.0]

    def say(read: int, total: int) -> None:
        speed = rate(read)
        if read == total or (start[0] < read and time.monotonic() - said[0] > PLAIN_SECONDS):
            said[0] = time.monotonic()
            left = f", {(total - read) / speed:.0f} s left" if 0 < read < total and speed else ""
            done = f"{read:,} of {total:,} {unit}, {speed:,.0f} {unit}/s{left}"
            console.print(f"{title}: {done}", highlight=False)

    yield say


@contextmanager
def steps(title: str) -> Iterator[Callable[[str], None]]:
    """Yields `step(what)`, to be called when something new begins."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = [TextColumn("{task.description}"), TimeElapsedColumn()]
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(title, total=None)
            yield lambda what: progress.update(task, description=f"{title}: {what}", refresh=True)
    else:
        yield lambda what: console.print(f"{title}: {what}", highlight=False)
