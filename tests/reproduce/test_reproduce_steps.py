"""A road's steps: those that fail, data that come later or change, and what is written."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.reproduce.outcome import Claim, Entry, NotRun, Reproduction, Table
from moesteer.reproduce.papers import read_paper
from moesteer.reproduce.steps import Context, Made, Road, Step, walk, without_thinking

PAPER = read_paper("steermoe")


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> TransformersEngine:
    return load_transformers(str(model_folder))


def good(context: Context) -> Iterator[Made]:
    (context.out / "good").mkdir(exist_ok=True)
    (context.out / "good" / "summary.json").write_text("{}")
    yield Table("Good", "", ("", "n"), ((Entry("a"), Entry("1", 1.0)),), "good")
    yield Claim("safe", "seen late")
    yield Claim("faithful", "seen first")


def bad(context: Context) -> Iterator[Made]:
    yield Claim("unsafe", "seen before it failed")
    raise MoesteerError("the judge is asleep")


def road(*steps: Step, **other) -> Road:
    return Road(PAPER, "made", False, None, ("rule: the paper's",), steps, **other)


GOOD, BAD = Step("good", "does it", good, runs=("good", "gone")), Step("bad", "fails", bad)
LACKING = Step("lacking", "can't", bad, missing="its data: --data it=FILE.")


def test_a_step_that_fails_leaves_the_others(engine: TransformersEngine, tmp_path: Path) -> None:
    told: list[str] = []
    result = walk(road(BAD, LACKING, GOOD), lambda: engine, tmp_path / "out", say=told.append)
    assert [table.title for table in result.tables] == ["Good"]
    # In the paper's order, whenever they were seen.
    assert [claim.key for claim in result.claims] == ["faithful", "safe", "unsafe"]
    assert result.not_run == (
        NotRun("bad", "the judge is asleep", failed=True),
        NotRun("lacking", "its data: --data it=FILE."),
    )
    assert result.runs == ("good",)
    assert "bad was not finished: the judge is asleep" in told
    again = Reproduction.from_json((tmp_path / "out" / "summary.json").read_text())
    assert again == result


def test_where_nothing_can_be_run_no_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(MoesteerError, match=r"nothing of SteerMoE.*\n  lacking: its data"):
        walk(road(LACKING), lambda: pytest.fail("loaded"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_may_come_later_but_not_change(engine: TransformersEngine, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "mquake.jsonl"
    file.write_text("{}\n")
    walk(road(GOOD), lambda: engine, out)
    walk(road(GOOD, inputs={"mquake": str(file)}), lambda: engine, out)
    walk(road(GOOD), lambda: engine, out)
    walk(road(GOOD, inputs={"mquake": str(file), "mctest": "ORG/mctest"}), lambda: engine, out)
    file.write_text('{"other": 1}\n')
    with pytest.raises(MoesteerError, match="begun with other data for mquake"):
        walk(road(GOOD, inputs={"mquake": str(file)}), lambda: engine, out)


def test_another_road_in_the_same_folder_is_refused(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    walk(road(GOOD), lambda: engine, tmp_path / "out")
    with pytest.raises(MoesteerError, match="limit was null and is 3 now"):
        walk(replace(road(GOOD), limit=3), lambda: engine, tmp_path / "out")
    other = replace(road(GOOD), paper=read_paper("rationales"))
    with pytest.raises(MoesteerError, match="`reproduce steermoe`, not of `reproduce rationales`"):
        walk(other, lambda: engine, tmp_path / "out")


def test_thinking_is_off_where_there_is_a_switch(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert without_thinking(engine, {"x": 1})[0] == {"x": 1}
    template = engine.tokenizer.chat_template
    switched = f"{{% if enable_thinking %}}<think>{{% endif %}}{template}"
    monkeypatch.setattr(engine.tokenizer, "chat_template", switched)
    assert without_thinking(engine, {"x": 1})[0] == {"x": 1, "enable_thinking": False}
    assert without_thinking(engine, {"enable_thinking": True})[0] == {"enable_thinking": True}
