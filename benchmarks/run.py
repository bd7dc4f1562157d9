"""Run all benchmarks, or the named ones; writes `results.json` and its tables beside this file.

python benchmarks/run.py [startup] [memory] [counting] [detection] [resampling] …
python benchmarks/run.py on_vllm        in vLLM's environment; writes `results-vllm.json`

The named ones replace those figures in what was measured before, on the same machine and versions.
The tables are `tables.py`'s: `results.md`, `results-vllm.md`, and the one in the README.
"""

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from paired import Figure, figure_of, record_of
from tables import write_readme, write_tables

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
    "plan",
    "others",
)
ON_VLLM = ("on_vllm",)
"""Sections for vLLM's own environment, whose results are kept apart."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, *ON_VLLM, []], metavar="section")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write the results to")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; see paired.py
    on_vllm = set(asked.sections) & set(ON_VLLM)
    file = asked.out / ("results-vllm.json" if on_vllm else "results.json")
    machine = describe_machine()
    before = measured_before(file, machine) if asked.sections and not on_vllm else []
    figures: list[Figure] = []
    for section in asked.sections or SECTIONS:
        print(f"-- {section}", file=sys.stderr, flush=True)
        for figure in importlib.import_module(section).figures():
            print(f"{figure.name}: {figure.ratio}", file=sys.stderr, flush=True)
            figures.append(figure)
    found = [record_of(figure) for figure in put_in(before, figures)]
    file.write_text(json.dumps({"machine": machine, "figures": found}, indent=1) + "\n")
    write_tables(asked.out)
    if asked.out == HERE:
        write_readme(HERE.parent / "README.md", HERE)


def measured_before(file: Path, machine: dict[str, str]) -> list[Figure]:
    """The figures in a file, which have to be of this machine and these versions."""
    if not file.exists():
        return []
    results = json.loads(file.read_text())
    for key, value in results["machine"].items():
        if key != "date" and machine.get(key) != value:
            sys.exit(
                f"{file}: {key} was {value} and is {machine.get(key)} now, so new figures can't"
                " stand beside the old ones: run all sections, or write to another folder (--out)."
            )
    return [figure_of(record) for record in results["figures"]]


def put_in(before: Sequence[Figure], new: Sequence[Figure]) -> list[Figure]:
    """New figures where those of the same section stood; of new sections behind all others."""
    fresh = {title: list(members) for title, members in groupby(new, lambda one: one.section)}
    found: list[Figure] = []
    for title, members in groupby(before, lambda one: one.section):
        found += fresh.pop(title, members)
    return [*found, *(figure for members in fresh.values() for figure in members)]


def describe_machine() -> dict[str, str]:
    from moesteer.provenance import installed_versions

    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "processor": f"{_processor()}, {os.cpu_count()} cores, one used",
        "system": f"{platform.system()} {platform.machine()}",
        **installed_versions(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
