"""Environments in `build/` for other people's packages, which moesteer itself doesn't need."""

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from paired import Figure, figure_of

REPOSITORY = Path(__file__).parent.parent


def figures_of(contest: str, python: Path) -> list[Figure]:
    """Run a contest, a file beside this one that writes its figures as JSON, on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "figures.json"
        command = [python, "-W", "ignore", Path(__file__).with_name(contest), found]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return [figure_of(record) for record in json.loads(found.read_text())]


def environment(name: str, packages: Sequence[str], alone: Sequence[str] = ()) -> Path:
    """The Python of `build/<name>` with our locked versions and these packages.

    Made once, and anew when what is asked for changes. Those in `alone` come without what they ask
    for: `packages` must hold what they need.
    """
    place = REPOSITORY / "build" / name
    python, done = place / "bin" / "python", place / "installed"
    asked = "\n".join([*packages, *alone, (REPOSITORY / "constraints.txt").read_text()])
    if done.exists() and done.read_text() == asked:
        return python
    print(f"making an environment with {', '.join(packages)}", file=sys.stderr, flush=True)
    venv.create(place, with_pip=True, clear=True)
    install = [python, "-m", "pip", "install", "-qq", "--constraint", "constraints.txt"]
    steps = [["torch"], ["--editable", ".", *packages], *([["--no-deps", *alone]] if alone else [])]
    for wanted in steps:
        subprocess.run([*install, *wanted], check=True, cwd=REPOSITORY)
    done.write_text(asked)
    return python
