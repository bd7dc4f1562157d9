"""A road's steps: those that fail, data that come later or change, and what is made of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from as_user import in_own_process
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.report.reproduce_page import reproduction_of, tables_of
from moesteer.reproduce.outcome import Claim, Entry, NotRun, Reproduction, Table
from moesteer.reproduce.papers import PAPERS, PaperName, read_paper
from moesteer.reproduce.steps import Context, Road, Step, walk, without_thinking

PAPER = read_paper("steermoe")


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> TransformersEngine:
    return load_transformers(str(model_folder))


def good(context: Context) -> Iterator[object]:
    (context.out / "good").mkdir(exist_ok=True)
    (context.out / "good" / "summary.json").write_text("{}")
    yield "good"


def bad(context: Context) -> Iterator[object]:
    yield "seen before it failed"
    raise MoesteerError("the judge is asleep")


def told(result: object, _bundled: bool) -> Iterator[Table | Claim]:
    """What a report would make of these."""
    if result == "good":
        yield Table("Good", "", ("", "n"), ((Entry("a"), Entry("1", 1.0)),), "good")
        yield Claim("safe", "seen late")
        yield Claim("faithful", "seen first")
    else:
        yield Claim("unsafe", str(result))


def road(*steps: Step, **other) -> Road:
    return Road(PAPER, "made", False, None, ("rule: the paper's",), steps, **other)


GOOD, BAD = Step("good", "does it", good, runs=("good", "gone")), Step("bad", "fails", bad)
LACKING = Step("lacking", "can't", bad, missing="its data: --data it=FILE.")


def test_a_step_that_fails_leaves_the_others(engine: TransformersEngine, tmp_path: Path) -> None:
    lines: list[str] = []
    walked = walk(road(BAD, LACKING, GOOD), lambda: engine, tmp_path / "out", say=lines.append)
    assert walked.results == ("seen before it failed", "good")
    result = reproduction_of(walked, told)
    assert [table.title for table in result.tables] == ["Good"]
    # In the paper's order, whenever they were seen.
    assert [claim.key for claim in result.claims] == ["faithful", "safe", "unsafe"]
    assert result.not_run == (
        NotRun("bad", "the judge is asleep", failed=True),
        NotRun("lacking", "its data: --data it=FILE."),
    )
    assert result.runs == ("good",)
    assert "bad was not finished: the judge is asleep" in lines
    assert Reproduction.from_json(result.to_json()) == result


@pytest.mark.parametrize("paper", PAPERS)
def test_what_a_report_does_not_know_is_an_error(paper: PaperName) -> None:
    with pytest.raises(TypeError, match="str is no result of this road"):
        next(tables_of(paper)("what is this?", False))


def test_a_road_knows_nothing_of_the_report() -> None:
    """The report is made of results: nothing that walks a road imports it, however far away."""
    code = """
import pkgutil, sys
from importlib import import_module
import moesteer.reproduce as package
for module in pkgutil.walk_packages(package.__path__, "moesteer.reproduce."):
    import_module(module.name)
print(*[name for name in sys.modules if name.startswith("moesteer.report.")])
"""
    said = in_own_process(code=code)
    assert (said.returncode, said.stdout.strip()) == (0, ""), said.stderr


def test_where_nothing_can_be_run_no_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(MoesteerError, match=r"nothing of SteerMoE.*\n  lacking: its data"):
        walk(road(LACKING), lambda: pytest.fail("loaded"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_may_come_later_but_not_change(engine: TransformersEngine, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "mquake.jsonl"
    file.write_text("{}\n")
    walk(road(GOOD), lambda: engine, out)
    walk(road(GOOD, inputs={"mquake": str(file)}), lambda: engine, out)
    walk(road(GOOD, inputs={"mquake": str(file), "mctest": "ORG/mctest"}), lambda: engine, out)
    with pytest.raises(MoesteerError, match="begun with mctest, too"):
        walk(road(GOOD, inputs={"mquake": str(file)}), lambda: engine, out)
    file.write_text('{"other": 1}\n')
    with pytest.raises(MoesteerError, match="begun with other data for mquake"):
        walk(road(GOOD, inputs={"mquake": str(file), "mctest": "ORG/mctest"}), lambda: engine, out)


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
