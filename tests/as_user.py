"""Commands as a user meets them: on a tiny random MoE model, in a folder of their own.

Most run in this process, which is fast; what depends on the process (imports, signals, pipes) in
one of its own.
"""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from moesteer.cli import main

RANKING = Path(__file__).parent / "data" / "rankings" / "pandas-2.3.3-protocol5-totals.pkl"


class Said(NamedTuple):
    """What a command exited with and wrote."""

    code: object
    out: str
    err: str

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.out.split("\n") if line]


Run = Callable[..., Said]


@pytest.fixture
def run(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run a command in a folder of its own."""

    def run(*arguments: object, stdin: str = "") -> Said:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        monkeypatch.setattr("sys.argv", ["moesteer", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(run: Run, in_tmp_path: Path) -> Run:
    """Run a command that must fail in the user's words: exit 2, one message, nothing written."""

    def refused(*arguments: object, stdin: str = "") -> Said:
        def files() -> dict[Path, bytes]:
            return {p: p.read_bytes() for p in in_tmp_path.rglob("*") if p.is_file()}

        before = files()
        said = run(*arguments, stdin=stdin)
        assert said.code == 2
        assert said.err.startswith("moesteer: ")
        assert said.err.count("moesteer: ") == 1
        assert "Traceback" not in said.err
        assert said.out == ""
        assert files() == before
        return said

    return refused


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    """A profile with all scores and one with experts chosen, both detected once."""
    from moesteer.contrast import read_pairs
    from moesteer.detection.detect import detect
    from moesteer.detection.selecting import select_experts
    from moesteer.engines.transformers_engine import load_transformers

    folder = tmp_path_factory.mktemp("profiles")
    pairs = folder / "pairs.jsonl"
    lines = [
        {"prompt": f"Tell me {n}.", "a": f"Yes, sure: {n}", "b": f"No, never {n}"}
        for n in range(12)
    ]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored = detect(load_transformers(str(model_folder)), read_pairs(pairs))
    paths = {"scored": folder / "scored.safetensors", "chosen": folder / "chosen.safetensors"}
    scored.save(paths["scored"])
    select_experts(scored, activate=2, deactivate=3, toward="a").save(paths["chosen"])
    return paths


def in_own_process(*arguments: object, code: str | None = None, stdin: str = "", **options):
    start = ["-m", "moesteer"] if code is None else ["-c", code]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, **options)
