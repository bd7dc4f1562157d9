"""The tables of `benchmarks/`: every bar is in the first one, and a miss shows."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("paired")


@pytest.fixture
def tables(paired: ModuleType) -> ModuleType:
    return import_module("tables")


@pytest.fixture
def figure(paired: ModuleType):
    def made(section: str, name: str, *rounds: float, **options: object):
        return paired.Figure(section, name, paired.Ratio(rounds), **options)

    return made


@pytest.fixture
def measured(paired: ModuleType, figure, tmp_path: Path) -> Path:
    """A folder of results: three bars here, one in vLLM's file, and one without a bar."""
    here = [
        figure("Start", "help", 3.0, 4.0, 8.0, bar=10, at_most=True),
        figure("Decoding", "small", 0.8, 0.85, 0.9, bar=0.9),
        figure("Decoding", "large", 0.95, bar=0.9),
        figure("Decoding", "a hook", 0.7),
        figure("Foretold", "memory", 1.5, bar=0.7),
        figure("Foretold", "memory", 1.5, bar=1.3, at_most=True),
        figure("Beside others: counts", "in units of nnsight", 1.25),
    ]
    for file, figures in (
        ("results.json", here),
        ("results-vllm.json", [figure("vLLM", "eager", 0.97, bar=0.95)]),
    ):
        records = [paired.record_of(one) for one in figures]
        results = {"machine": {"torch": "1.2"}, "figures": records}
        (tmp_path / file).write_text(json.dumps(results))
    return tmp_path


def test_a_figure_comes_back_from_json(paired: ModuleType, figure) -> None:
    one = figure("S", "n", 1.0, 2.0, bar=1.5, at_most=True, note="why")
    assert paired.figure_of(json.loads(json.dumps(paired.record_of(one)))) == one


def test_the_results_begin_with_all_bars(tables: ModuleType, measured: Path) -> None:
    tables.write_tables(measured)
    page = (measured / "results.md").read_text()
    first, *others = page.split("\n## ")[1:]
    assert first.splitlines() == [
        "All bars",
        "",
        "3 of 5 are met, those of [vLLM](results-vllm.md) among them.",
        "",
        "| | | ratio | bar | |",
        "|---|---|---|---|---|",
        "| Start | help | 4 (3–8) | ≤ 10 | met |",
        "| Decoding | small | 0.85 (0.8–0.9) | ≥ 0.9 | **missed** |",
        "|  | large | 0.95 | ≥ 0.9 | met |",
        "| Foretold | memory | 1.5 | ≥ 0.7, ≤ 1.3 | **missed** |",
        "| vLLM | eager | 0.97 | ≥ 0.95 | met |",
    ]
    assert [table.splitlines()[0] for table in others] == [
        "Start",
        "Decoding",
        "Foretold",
        "Beside others: counts",
    ]
    assert "| a hook | 0.7 | 1 | – |  |" in page
    assert "torch 1.2" in page
    assert "| eager | 0.97 | 1 | ≥ 0.95 | met |" in (measured / "results-vllm.md").read_text()


def test_the_readme_gets_its_table_between_its_markers(tables: ModuleType, measured: Path) -> None:
    readme = measured / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nbehind\n")
    for _ in range(2):  # writing anew changes nothing
        tables.write_readme(readme, measured)
        assert readme.read_text().splitlines() == [
            "before",
            "<!-- benchmarks -->",
            "| | ratio | bar | met |",
            "|---|---|---|---|",
            "| Start: help | 4 | ≤ 10 | 1 of 1 |",
            "| Decoding: small, and 1 more | 0.85–0.95 | ≥ 0.9 | **1 of 2** |",
            "| Foretold: memory | 1.5 | ≥ 0.7, ≤ 1.3 | **0 of 1** |",
            "| vLLM: eager | 0.97 | ≥ 0.95 | 1 of 1 |",
            "| Beside others: counts: in units of nnsight | 1.25 | – |  |",
            "<!-- /benchmarks -->",
            "behind",
        ]


def test_a_readme_without_markers_is_left_alone(tables: ModuleType, measured: Path) -> None:
    readme = measured / "README.md"
    readme.write_text("nothing to fill in\n")
    tables.write_readme(readme, measured)
    assert readme.read_text() == "nothing to fill in\n"


def test_a_section_measured_anew_replaces_its_old_figures(tables: ModuleType, figure) -> None:
    run = import_module("run")
    before = [figure("A", "x", 1.0), figure("A", "y", 1.0), figure("B", "z", 1.0)]
    anew = [figure("C", "new", 3.0), figure("A", "x", 2.0)]
    assert run.put_in(before, anew) == [anew[1], before[2], anew[0]]


def test_figures_of_other_versions_are_not_put_beside_new_ones(
    tables: ModuleType, measured: Path
) -> None:
    run = import_module("run")
    assert len(run.measured_before(measured / "results.json", {"torch": "1.2"})) == 7
    with pytest.raises(SystemExit, match=r"torch was 1\.2 and is 1\.3 now"):
        run.measured_before(measured / "results.json", {"torch": "1.3"})


def test_all_benchmarks_are_run(tables: ModuleType) -> None:
    run = import_module("run")
    found = {
        file.stem for file in BENCHMARKS.glob("*.py") if "def figures() ->" in file.read_text()
    }
    contests = {"one_by_one", "with_others"}  # run by `rationales` and `others`
    assert found - contests == {*run.SECTIONS, *run.ON_VLLM}
