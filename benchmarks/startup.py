"""How long a newcomer waits for the first line: `moesteer --help` against a bare Python."""

import subprocess
import sys
import time
from pathlib import Path

from paired import Figure, Ratio

ROUNDS = 20


def figures() -> list[Figure]:
    moesteer = str(Path(sys.executable).with_name("moesteer"))
    return [
        Figure(
            "Start-up",
            "`moesteer --help`: time in units of `python -c pass`",
            _against_bare_python([moesteer, "--help"]),
            bar=10,
            at_most=True,
        ),
        Figure(
            "Start-up",
            "`moesteer detect --help`: time in units of `python -c pass`",
            _against_bare_python([moesteer, "detect", "--help"]),
        ),
    ]


def _against_bare_python(command: list[str]) -> Ratio:
    bare = [sys.executable, "-c", "pass"]
    _seconds(command)  # once, so that both are read from the cache
    return Ratio(tuple(_seconds(command) / _seconds(bare) for _ in range(ROUNDS)))


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
