"""Counting how far long work has come, for whoever wants to be told."""

from collections.abc import Callable


def tally(
    progress: Callable[[int, int], None] | None, total: int, done: int = 0
) -> Callable[[int], None]:
    """A function that is called with how many more are done; it tells `progress` how many that
    makes, of how many."""

    def told(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return told
