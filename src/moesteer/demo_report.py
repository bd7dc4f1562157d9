"""The long version of the demonstration: its runs, kept in folders, and the page made of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

from moesteer.contrast import read_pairs
from moesteer.demo import KNOCKED, DemoResult
from moesteer.detection.compare_to_folder import compare_to_folder
from moesteer.engines.base import Engine
from moesteer.evaluation.cards import read_card
from moesteer.evaluation.evaluate import evaluate
from moesteer.profile import Side
from moesteer.report.write_report import check_report, write_report
from moesteer.testbed import ground_truth

REPORTED: Mapping[str, tuple[Side, str]] = {
    "refusal": ("b", "testbed-restricted"),
    "document": ("a", "testbed-document"),
    "digits": ("a", "testbed-digits"),
}
"""Which way a behaviour is steered in the report, and the task that shows it."""
REPORTED_PROMPTS = 32


def write_demo_report(
    engine: Engine,
    result: DemoResult,
    out: str | Path,
    step: Callable[[str], None] = lambda _: None,
    command: str = "",
) -> Path:
    """The report of the demonstration, an HTML page; its run folders stand beside it.

    Each behaviour is evaluated in the direction of `REPORTED` with every control, and its detectors
    are compared with knock-out. Runs that are there already are taken up.
    """
    page = Path(out)
    check_report(page)
    runs = page.with_suffix(".runs")
    runs.mkdir(exist_ok=True)
    folders: list[Path] = []
    for found in result.behaviours:
        side, task = REPORTED[found.behaviour]
        step(f"{found.behaviour}: comparing detectors with knock-out")
        source = f"testbed:{found.behaviour}:dev"
        compare_to_folder(
            engine,
            read_pairs(source)[:KNOCKED],
            out=runs / f"{found.behaviour}-detectors",
            source=source,
            truth=ground_truth().behaviours[found.behaviour],
            command=command,
        )
        step(f"{found.behaviour}: evaluating beside every control")
        evaluate(
            engine,
            found.toward[side].profile,
            [read_card(task)],
            out=runs / found.behaviour,
            limit=REPORTED_PROMPTS,
            batch_size=REPORTED_PROMPTS,
            command=command,
        )
        folders += [runs / found.behaviour, runs / f"{found.behaviour}-detectors"]
    step("writing the report")
    return write_report(folders, page)[0]
