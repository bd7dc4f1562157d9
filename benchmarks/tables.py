"""Figures as Markdown: all of them, those that have a bar, and the few that the README shows.

python benchmarks/tables.py        writes the tables anew from the JSON files beside this one
"""

import json
from collections.abc import Iterable, Sequence
from itertools import chain, groupby, repeat
from pathlib import Path

from paired import Figure, figure_of

OPENING, CLOSING = "<!-- benchmarks -->", "<!-- /benchmarks -->"
"""What the README's table stands between."""
BESIDE_OTHERS = "Beside others: "
"""How the titles of sections begin that the README shows figure by figure."""
HEAD = (
    "Written by `run.py`. Every figure is a ratio of two contestants that ran in turn on the same"
    " machine: median (lowest–highest round). What each means: [README](README.md)."
)
RULE = "|---|---|---|---|"


def write_tables(folder: Path) -> None:
    """`results.md` and `results-vllm.md`, of what was measured so far."""
    figures, machine = _read(folder / "results.json")
    on_vllm, its_machine = _read(folder / "results-vllm.json")
    if figures:
        parts = [*bars([*figures, *on_vllm], bool(on_vllm)), *sections(figures)]
        (folder / "results.md").write_text(_page(machine, parts))
    if on_vllm:
        (folder / "results-vllm.md").write_text(_page(its_machine, sections(on_vllm)))


def write_readme(file: Path, folder: Path) -> None:
    """Put the short table between the README's two markers; without them, leave it alone."""
    before, opening, rest = file.read_text().partition(OPENING)
    _, closing, behind = rest.partition(CLOSING)
    if opening and closing:
        figures = [*_read(folder / "results.json")[0], *_read(folder / "results-vllm.json")[0]]
        table = "\n".join(short_table(figures))
        file.write_text(f"{before}{OPENING}\n{table}\n{CLOSING}{behind}")


def bars(figures: Sequence[Figure], with_vllm: bool = False) -> list[str]:
    """Everything that has a bar, in one table."""
    held = alike(figure for figure in figures if figure.bar is not None)
    met = sum(map(_met, held))
    where = ", those of [vLLM](results-vllm.md) among them" if with_vllm else ""
    lines = ["", "## All bars", "", f"{met} of {len(held)} are met{where}.", ""]
    lines += ["| | | ratio | bar | |", f"{RULE}---|"]
    for section, members in groupby(held, lambda same: same[0].section):
        for title, same in zip(chain([section], repeat("")), members, strict=False):
            one = same[0]
            lines.append(
                f"| {title} | {one.name} | {one.ratio} | {_bar(same)} | {_verdict(same)} |"
            )
    return lines


def sections(figures: Sequence[Figure]) -> list[str]:
    """All figures, a table a section."""
    lines = []
    for section, members in groupby(figures, lambda figure: figure.section):
        lines += ["", f"## {section}", "", "| | ratio | rounds | bar | |", f"{RULE}---|"]
        for same in alike(members):
            one = same[0]
            name = f"{one.name} ({one.note})" if one.note else one.name
            lines.append(
                f"| {name} | {one.ratio} | {len(one.ratio.rounds)} | {_bar(same)} |"
                f" {_verdict(same)} |"
            )
    return lines


def short_table(figures: Sequence[Figure]) -> list[str]:
    """A line for each bar of a section: the medians held to it; and each figure beside others."""
    held = alike(figure for figure in figures if figure.bar is not None)
    lines = ["| | ratio | bar | met |", RULE]
    for section, members in groupby(held, lambda same: same[0].section):
        if section.startswith(BESIDE_OTHERS):
            continue
        by_bar: dict[str, list[list[Figure]]] = {}
        for same in members:
            by_bar.setdefault(_bar(same), []).append(same)
        for bar, group in by_bar.items():
            first, more, met = group[0][0].name, len(group) - 1, sum(map(_met, group))
            medians = [same[0].ratio.median for same in group]
            ends = dict.fromkeys(f"{end:.3g}" for end in (min(medians), max(medians)))
            share = f"{met} of {len(group)}"
            lines.append(
                f"| {section}: {first}{f', and {more} more' if more else ''} | {'–'.join(ends)} |"
                f" {bar} | {share if met == len(group) else f'**{share}**'} |"
            )
    for one in figures:
        if one.section.startswith(BESIDE_OTHERS):
            name = f"{one.section}: {one.name}"
            lines.append(f"| {name} | {one.ratio.median:.3g} | {_bar([one])} | {_verdict([one])} |")
    return lines


def alike(figures: Iterable[Figure]) -> list[list[Figure]]:
    """Figures with what follows them under the same name: one ratio, and a bar on either side."""
    return [list(same) for _, same in groupby(figures, lambda one: (one.section, one.name))]


def _bar(same: Sequence[Figure]) -> str:
    held = [figure for figure in same if figure.bar is not None]
    return ", ".join(f"{'≤' if one.at_most else '≥'} {one.bar:g}" for one in held) or "–"


def _met(same: Sequence[Figure]) -> bool:
    return all(figure.met is not False for figure in same)


def _verdict(same: Sequence[Figure]) -> str:
    if all(figure.bar is None for figure in same):
        return ""
    return "met" if _met(same) else "**missed**"


def _page(machine: dict[str, str], parts: Sequence[str]) -> str:
    about = "; ".join(f"{key} {value}" for key, value in machine.items())
    return "\n".join(["# Results", "", HEAD, "", about, *parts]) + "\n"


def _read(file: Path) -> tuple[list[Figure], dict[str, str]]:
    if not file.exists():
        return [], {}
    results = json.loads(file.read_text())
    return [figure_of(record) for record in results["figures"]], results["machine"]


if __name__ == "__main__":
    here = Path(__file__).parent
    write_tables(here)
    write_readme(here.parent / "README.md", here)
