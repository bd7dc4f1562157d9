"""What can happen to the output of a command: unwritable, full, shared, interrupted."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from as_user import RANKING, Run, in_own_process
from moesteer.files import sole_writer
from moesteer.profile import Profile

# --- what can happen to an output -----------------------------------------------------------------

WRITERS = ["detect", "select", "import-ranking", "generate", "pairs refusal"]


@pytest.fixture
def writer(
    model_folder: Path, made: dict[str, Path], pairs_file: Path
) -> Callable[[str], list[object]]:
    """The arguments of a command that writes, up to --out."""

    def arguments(name: str) -> list[object]:
        match name:
            case "detect":
                return ["detect", model_folder, "--pairs", pairs_file]
            case "select":
                return ["select", made["scored"], "--activate", 1, "--toward", "a"]
            case "import-ranking":
                return ["import-ranking", RANKING, "--top-k", 1]
            case "generate":
                return ["generate", model_folder, "hi", "--max-new-tokens", 2]
            case _:
                Path("asked.jsonl").write_text('{"prompt": "How?", "reply": "So."}\n')
                return ["pairs", "refusal", "asked.jsonl"]

    return arguments


@pytest.mark.parametrize("name", WRITERS)
def test_outputs_that_cannot_be_written(
    refused: Run, writer: Callable[[str], list[object]], name: str
):
    for out, said in (
        ("missing/out", "the folder missing does not exist"),
        (".", "is a folder"),
        ("/dev/null", "not an ordinary file"),
        ("n" * 300, "File name too long"),
    ):
        assert said in refused(*writer(name), "--out", out).err


@pytest.mark.parametrize("command", ["detect", "generate"])
def test_an_output_is_checked_before_the_work(refused: Run, pairs_file: Path, command: str):
    more = ("--pairs", pairs_file) if command == "detect" else ("hi",)
    said = refused(command, "./no-model", *more, "--out", "missing/out")
    assert "the folder missing does not exist" in said.err


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(
    run: Run,
    writer: Callable[[str], list[object]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
):
    arguments = writer(name)
    Path("out").write_text("old")
    before = set(Path().iterdir())

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        said = run(*arguments, "--out", "out")
    assert said.code == 2
    assert "moesteer: out could not be written: the disk is full" in said.err
    assert "Traceback" not in said.err
    assert Path("out").read_text() == "old"
    # Replies that are paid for wait in a file beside it until they can be written.
    kept = {Path(".out.lines.partial")} if name == "generate" else set()
    assert set(Path().iterdir()) == before | kept
    assert run(*arguments, "--out", "out").code == 0
    assert set(Path().iterdir()) == before
    assert Path("out").read_bytes() != b"old"


def test_two_runs_on_one_output(run: Run, model_folder: Path, pairs_file: Path):
    arguments = ("detect", model_folder, "--pairs", pairs_file, "--out", "p")
    with sole_writer(Path("p")):
        said = run(*arguments)
        assert said.code == 2
        assert f"p is being written by another run (process {os.getpid()})" in said.err
        assert not Path("p").exists()
    assert run(*arguments).code == 0


STOPPED = """
import os, signal, sys
from moesteer.detection import counts
from moesteer.engines.transformers_engine import TransformersEngine

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
how = getattr(signal, sys.argv.pop(1))
counts.BATCH_TOKENS, counts.CHECKPOINT_SECONDS = 100, 0 if how == signal.SIGKILL else 30
count, batches = TransformersEngine.count_selections, []

def counting(self, conversations, counted):
    batches.append(len(conversations))
    if len(batches) == 5:
        os.kill(os.getpid(), how)
    return count(self, conversations, counted)

TransformersEngine.count_selections = counting
from moesteer.cli import main
main()
"""


@pytest.mark.parametrize("signal", ["SIGINT", "SIGKILL"])
def test_an_interrupted_run_goes_on(
    run: Run, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, signal: str
):
    from moesteer.engines.transformers_engine import TransformersEngine

    arguments = ("detect", model_folder, "--pairs", pairs_file, "--out")
    Path("p").write_text("old")
    stopped = in_own_process(signal, *arguments, "p", code=STOPPED)
    assert Path("p").read_text() == "old"
    assert "Traceback" not in stopped.stderr
    if signal == "SIGINT":
        assert stopped.returncode == 130
        assert "moesteer: interrupted" in stopped.stderr
    else:
        assert stopped.returncode == -9

    counted: list[int] = []
    count = TransformersEngine.count_selections

    def counting(engine: TransformersEngine, conversations, how):
        counted.append(len(conversations))
        return count(engine, conversations, how)

    monkeypatch.setattr("moesteer.detection.counts.BATCH_TOKENS", 100)
    monkeypatch.setattr(TransformersEngine, "count_selections", counting)
    assert run(*arguments, "p").code == 0
    resumed, counted = counted, []
    assert run(*arguments, "whole").code == 0
    assert len(counted) > 5
    assert resumed == counted[4:]  # four batches were done and are not done again
    p, whole = Profile.load("p").scores, Profile.load("whole").scores
    assert p is not None
    assert whole is not None
    for key, array in vars(p).items():
        np.testing.assert_array_equal(array, getattr(whole, key))
    assert sorted(path.name for path in Path().iterdir()) == ["p", "pairs.jsonl", "whole"]


@pytest.mark.parametrize("temperature", [0, 2])
def test_an_interrupted_generation_goes_on(
    run: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
):
    from moesteer.engines.transformers_engine import TransformersEngine

    asked: list[str] = []
    generate = TransformersEngine.generate

    def asking(engine: TransformersEngine, prompts, *more, **options):
        if asked[-1:] == ["stop here"]:
            raise KeyboardInterrupt
        asked.extend(prompt.removeprefix("<|user|>").partition("<")[0] for prompt in prompts)
        return generate(engine, prompts, *more, **options)

    monkeypatch.setattr("moesteer.generate.GROUP", 1)
    monkeypatch.setattr(TransformersEngine, "generate", asking)
    prompts = ["one", "two", "three", "stop here", "four", "five"]
    arguments = ("generate", model_folder, *prompts, "--batch-size", 2, "--max-new-tokens", 8)
    arguments = (*arguments, "--temperature", temperature, "--out")
    Path("p").write_text("old")
    said = run(*arguments, "p")
    assert said.code == 130
    assert "moesteer: interrupted" in said.err
    assert Path("p").read_text() == "old"
    assert asked == prompts[:4]
    asked.clear()
    assert run(*arguments, "p").code == 0
    assert asked == prompts[4:]
    monkeypatch.setattr(TransformersEngine, "generate", generate)
    assert run(*arguments, "whole").code == 0
    assert Path("p").read_text() == Path("whole").read_text()
    assert len(Path("p").read_text().splitlines()) == 6
    assert sorted(path.name for path in Path().iterdir()) == ["p", "whole"]
