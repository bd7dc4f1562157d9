"""Run folders: taken up by the same run, refused for any other, and never half a line."""

import json
import multiprocessing
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from moesteer.errors import MoesteerError
from moesteer.runs import ABOUT, Run, open_run, read_run

SETTINGS = {"model": "tiny", "seeds": 3, "tasks": {"facts": ["a", "b"]}}
TOLD = {"command": "moesteer evaluate tiny", "date": "2026-01-01"}


def start(folder: Path, **changed: object) -> Run:
    with open_run(folder, "evaluate", SETTINGS | changed, TOLD) as run:
        run.add("replies", [{"reply": "né", "n": 1}, {"reply": "line\nbreak", "n": 2}])
    return run


def test_what_was_added_is_read_back_by_the_same_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(folder)
    with open_run(folder, "evaluate", SETTINGS, {"command": "again"}) as run:
        assert run.lines("replies") == [{"reply": "né", "n": 1}, {"reply": "line\nbreak", "n": 2}]
        assert run.lines("drift") == []
        run.add("replies", [{"n": 3}])
    assert [line["n"] for line in read_run(folder).lines("replies")] == [1, 2, 3]
    # Who began it is who is named.
    assert read_run(folder).about == TOLD
    assert read_run(folder).settings == SETTINGS


def test_settings_are_compared_as_they_are_written(tmp_path: Path) -> None:
    """Tuples become lists in JSON: that is no difference."""
    folder = tmp_path / "run"
    start(folder, layers=(1, 2))
    with open_run(folder, "evaluate", SETTINGS | {"layers": (1, 2)}, TOLD) as run:
        assert len(run.lines("replies")) == 2


def test_how_something_was_made_is_no_difference(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(folder, profile={"experts": [1], "evidence": {"command": "one", "versions": {"a": 1}}})
    other = {"experts": [1], "evidence": {"command": "another", "versions": {}}}
    with open_run(folder, "evaluate", SETTINGS | {"profile": other}, TOLD) as run:
        assert len(run.lines("replies")) == 2
    other["experts"] = [1, 2]
    with (
        pytest.raises(MoesteerError, match=r"profile\.experts was \[1\] and is \[1, 2\] now"),
        open_run(folder, "evaluate", SETTINGS | {"profile": other}, TOLD),
    ):
        pass


def test_what_is_held_by_name_may_grow(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(folder)
    more = SETTINGS | {"tasks": {"facts": ["a", "b"], "more": ["c"]}}
    with open_run(folder, "evaluate", more, {"command": "again"}, growing=("tasks",)) as run:
        assert len(run.lines("replies")) == 2
    assert read_run(folder).settings == more
    assert read_run(folder).about == {"command": "again"}
    changed = SETTINGS | {"tasks": {"facts": ["a"], "more": ["c"], "third": []}}
    for settings in (SETTINGS, changed):
        with (
            pytest.raises(MoesteerError, match=r"tasks\.(more|facts) was"),
            open_run(folder, "evaluate", settings, TOLD, growing=("tasks",)),
        ):
            pass
    assert read_run(folder).settings == more


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seeds": 4}, "seeds was 3 and is 4 now"),
        ({"model": "other"}, 'model was "tiny" and is "other" now'),
        ({"limit": 5}, "limit was null and is 5 now"),
        ({"tasks": {"facts": ["x" * 200]}}, " … "),
    ],
)
def test_other_settings_are_refused_with_both_values(
    tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    folder = tmp_path / "run"
    start(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with (
        pytest.raises(MoesteerError) as refusal,
        open_run(folder, "evaluate", SETTINGS | changed, {}),
    ):
        pass
    assert said in str(refusal.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_another_commands_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(folder)
    with (
        pytest.raises(MoesteerError, match="a run of `evaluate`, not of `search`"),
        open_run(folder, "search", SETTINGS, {}),
    ):
        pass


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(folder)
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps(about | {"schema": 99}))
    with pytest.raises(MoesteerError, match="format 99; this version of moesteer reads format 1"):
        read_run(folder)
    with (
        pytest.raises(MoesteerError, match="format 99"),
        open_run(folder, "evaluate", SETTINGS, {}),
    ):
        pass


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(MoesteerError, match=r"holds thesis\.txt, but no run"),
        open_run(tmp_path, "evaluate", SETTINGS, {}),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "can't be read"), ("[]", "format None"), ('{"schema": 1}', "lacks kind")],
)
def test_a_broken_run_file(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / ABOUT).write_text(content)
    with pytest.raises(MoesteerError, match=said):
        read_run(tmp_path)


def test_no_folder_no_run_and_a_file_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(MoesteerError, match=r"is no run of moesteer: it has no run\.json"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for folder, said in (("file", "is a file"), ("no/where", "does not exist")):
        with (
            pytest.raises(MoesteerError, match=said),
            open_run(tmp_path / folder, "evaluate", SETTINGS, {}),
        ):
            pass


def test_half_a_line_is_dropped_when_the_run_is_taken_up(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(folder)
    with (folder / "replies.jsonl").open("a") as stream:
        stream.write('{"reply": "never fini')
    assert len(read_run(folder).lines("replies")) == 2
    with open_run(folder, "evaluate", SETTINGS, {}) as run:
        run.add("replies", [{"n": 3}])
        assert [line["n"] for line in run.lines("replies")] == [1, 2, 3]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = start(folder)
    with (folder / "replies.jsonl").open("a") as stream:
        stream.write("nonsense\n")
    with pytest.raises(MoesteerError, match=r"replies\.jsonl:3 is not JSON"):
        run.lines("replies")


def _hold(folder: Path, ready: Event) -> None:
    with open_run(folder, "evaluate", SETTINGS, {}):
        ready.set()
        time.sleep(60)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run", ready), daemon=True)
    other.start()
    try:
        assert ready.wait(30)
        with (
            pytest.raises(MoesteerError, match=f"another run \\(process {other.pid}\\)"),
            open_run(tmp_path / "run", "evaluate", SETTINGS, {}),
        ):
            pass
    finally:
        other.kill()
        other.join()
    with open_run(tmp_path / "run", "evaluate", SETTINGS, {}) as run:  # the lock died with it
        assert run.lines("replies") == []


def test_a_line_that_lacks_a_key_is_named(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.add("drift", [{"item": 1, "kl": 0.5}, {"item": 2}])
    assert len(run.lines("drift", "item")) == 2
    with pytest.raises(MoesteerError, match=r"drift.jsonl:2 lacks 'kl'"):
        run.lines("drift", "item", "kl")
