"""Attribution against captum and inseq, in an environment of its own that has both.

The contest is `one_by_one.py`. moesteer itself needs neither package.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from paired import Figure, Ratio

REPOSITORY = Path(__file__).parent.parent
PLACE = REPOSITORY / "build" / "benchmark-rationales"
PACKAGES = ("captum==0.9.0", "inseq==0.7.1")


def figures() -> list[Figure]:
    contest = Path(__file__).with_name("one_by_one.py")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "figures.json"
        command = [environment(), "-W", "ignore", contest, found]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        records = json.loads(found.read_text())
    return [Figure(**{**one, "ratio": Ratio(tuple(one["ratio"]["rounds"]))}) for one in records]


def environment() -> Path:
    """The Python of an environment with our locked versions, captum and inseq; made once."""
    python, done = PLACE / "bin" / "python", PLACE / "installed"
    if done.exists() and done.read_text() == " ".join(PACKAGES):
        return python
    print("making an environment with captum and inseq", file=sys.stderr, flush=True)
    venv.create(PLACE, with_pip=True, clear=True)
    install = [python, "-m", "pip", "install", "-qq", "--constraint", "constraints.txt"]
    for wanted in (["torch"], ["--editable", ".", *PACKAGES]):
        subprocess.run([*install, *wanted], check=True, cwd=REPOSITORY)
    done.write_text(" ".join(PACKAGES))
    return python
