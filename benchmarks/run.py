"""Run all benchmarks, or the named ones; writes `results.md` and `results.json` beside this file.

python benchmarks/run.py [startup] [memory] [counting] [detection] [resampling] …
python benchmarks/run.py on_vllm        in vLLM's environment; writes `results-vllm.md` and `.json`
"""

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from paired import Figure

HERE = Path(__file__).parent
SECTIONS = (
    "startup",
    "memory",
    "counting",
    "detection",
    "resampling",
    "decoding",
    "compiled",
    "directions",
    "rationales",
)
ON_VLLM = ("on_vllm",)
"""Sections for vLLM's own environment, whose results are kept apart."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, *ON_VLLM, []], metavar="section")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write the results to")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; see paired.py
    figures: list[Figure] = []
    for section in asked.sections or SECTIONS:
        print(f"-- {section}", file=sys.stderr, flush=True)
        for figure in importlib.import_module(section).figures():
            print(f"{figure.name}: {figure.ratio}", file=sys.stderr, flush=True)
            figures.append(figure)
    machine = describe_machine()
    results = {
        "machine": machine,
        "figures": [{**asdict(f), "median": f.ratio.median, "met": f.met} for f in figures],
    }
    name = "results-vllm" if set(asked.sections) & set(ON_VLLM) else "results"
    (asked.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (asked.out / f"{name}.md").write_text(page(figures, machine))


def describe_machine() -> dict[str, str]:
    from moesteer.provenance import installed_versions

    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "processor": f"{_processor()}, {os.cpu_count()} cores, one used",
        "system": f"{platform.system()} {platform.machine()}",
        **installed_versions(),
    }


def page(figures: Sequence[Figure], machine: dict[str, str]) -> str:
    """The results as Markdown: a table a section."""
    lines = [
        "# Results",
        "",
        "Written by `run.py`. Every figure is a ratio of two contestants that ran in turn on the"
        " same machine: median (lowest–highest round). What each means: [README](README.md).",
        "",
        "; ".join(f"{key} {value}" for key, value in machine.items()),
    ]
    for section, members in groupby(figures, lambda figure: figure.section):
        lines += ["", f"## {section}", "", "| | ratio | rounds | bar | |", "|---|---|---|---|---|"]
        lines += [_row(figure) for figure in members]
    return "\n".join(lines) + "\n"


def _row(figure: Figure) -> str:
    name = f"{figure.name} ({figure.note})" if figure.note else figure.name
    bar, verdict = "–", ""
    if figure.bar is not None:
        bar = f"{'≤' if figure.at_most else '≥'} {figure.bar:g}"
        verdict = "met" if figure.met else "**missed**"
    return f"| {name} | {figure.ratio} | {len(figure.ratio.rounds)} | {bar} | {verdict} |"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
