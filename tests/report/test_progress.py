"""Progress as it is drawn on a terminal: a real one, by its own device."""

import contextlib
import os
import pty
from collections.abc import Callable, Iterator

import pytest

from moesteer.report.progress import counted_progress, steps


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Standard error is a terminal; the function reads what was drawn there so far.

    No fixture: pytest puts its own standard error in place after fixtures.
    """
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    monkeypatch.setenv("TERM", "xterm")
    stream = os.fdopen(theirs, "w")
    monkeypatch.setattr("sys.stderr", stream)

    def drawn() -> str:
        stream.flush()
        read = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(ours, 4096):
                read += part
        return read.decode()

    yield drawn
    os.close(ours)
    with contextlib.suppress(OSError):  # nobody reads it any more
        stream.close()


def test_a_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as drawn:
        with counted_progress("detect", "tokens") as report:
            report(0, 4000)
            report(1000, 4000)
        assert "1,000/4,000 tokens" in drawn()


def test_work_that_ends_before_it_says_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch), counted_progress("detect", "tokens"):
        pass


def test_steps_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as drawn:
        with steps("demo") as step:
            step("finding experts")
        assert "finding experts" in drawn()
