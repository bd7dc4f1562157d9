"""What `moesteer demo` prints."""

from collections.abc import Iterator

import numpy as np
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moesteer import testbed
from moesteer.demo import (
    MEASURED,
    PROBES,
    SEEDS,
    TARGET,
    BehaviourResult,
    DemoResult,
    Direction,
    Outcomes,
)
from moesteer.profile import Expert
from moesteer.report.terminal import expert_table, heat_map, named, print_text
from moesteer.testbed.world import Probe

TOP = 8

OPENING = f"""\
This model was built for this demonstration: a small Qwen3-MoE (4 layers × 16 experts, 4 a token),
trained from nothing on an invented world. Experts that carry three behaviours were planted in it,
and decoys beside them, whose routing goes with a behaviour though they do nothing for it. So what
is found can be checked. None of these numbers says anything about a real model.

Each table below: experts are found on 192 contrast pairs, how many are steered is chosen on other
prompts (dev), and outcomes are measured once on held-out ones (test, {PROBES} a column). Shares
stand with Wilson's 95 % interval, scores with one from resampling pairs.
  q      the share of false discoveries to expect among experts of so small a q: it says that
         routing differs between the sides, not that an expert matters
  alone  by how much the log-odds of A against B fall where the replies part (nats, dev) when this
         one expert is switched off: what it carries\
"""

CLOSING = """\
p marks planted experts; d decoys, trained to score as high and do nothing: a score says what goes
with a behaviour, not what carries it; that shows when an expert is switched off alone. The dim rows
are controls: as many random experts in the same layers (mean of {seeds} seeds, [least–most]), and
the decoys alone. Read them in the bold columns, the behaviour's own. What moves in another column
is a side effect; a random draw may also hit experts planted for that column's behaviour.

Next, on your own model:
  moesteer doctor MODEL
  moesteer detect MODEL --pairs PAIRS.jsonl --activate 5 --toward a --out my.profile.safetensors
  moesteer evaluate MODEL --with my.profile.safetensors --tasks TASK --out run
  moesteer report run --out report.html\
"""


def print_demo(result: DemoResult) -> None:
    """Print the whole demonstration; without a terminal in plain text."""
    print_text(*demo_parts(result), width=110)


def demo_parts(result: DemoResult) -> Iterator[RenderableType]:
    yield Text(OPENING)
    for found in result.behaviours:
        yield from _behaviour_parts(found, result)
    yield Rule(style="dim")
    yield Text(CLOSING.format(seeds=len(SEEDS)))


def _behaviour_parts(found: BehaviourResult, result: DemoResult) -> Iterator[RenderableType]:
    truth = testbed.ground_truth().behaviours[found.behaviour]
    words = dict.fromkeys(truth.planted, "planted") | dict.fromkeys(truth.decoys, "decoy")
    letters = {expert: word[0] for expert, word in words.items()}
    yield Text("")
    yield Rule(f"[bold]{found.behaviour}[/]: A {truth.a}, B {truth.b}", align="left")
    alone = {expert: f"{effect:+.1f}" for expert, effect in found.knocked_out.items()}
    table = expert_table(found.scores, TOP, words, {"alone": alone})
    yield Group(Text("Experts that go with it", "bold"), table)
    yield heat_map(found.scores, letters)
    yield Text("")
    yield outcome_table(found, result)
    yield from _steered_lines(found, words)
    yield Text("")
    yield from _replies(found, result)


def outcome_table(found: BehaviourResult, result: DemoResult) -> RenderableType:
    """Outcomes unsteered, steered each way, and with random experts; the target in bold."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("share of replies")
    targets = {TARGET[found.behaviour, side] for side in ("a", "b")}
    for column in MEASURED:
        table.add_column(column, justify="right", style="bold" if column in targets else "")
    number = len(testbed.ground_truth().behaviours[found.behaviour].decoys)
    table.add_row("unsteered", *_shares(result.unsteered))
    for side, direction in found.toward.items():
        what = _what(direction)
        table.add_row(f"towards {side.upper()}: {what}", *_shares(direction.steered))
        table.add_row(
            f"  random: {what}", *(_spread(direction, column) for column in MEASURED), style="dim"
        )
        table.add_row(
            f"  decoys: {number} {what.split()[1]}", *_shares(direction.decoys), style="dim"
        )
    return table


def _shares(outcomes: Outcomes) -> list[str]:
    """Each column's share with its interval: "50% (36–64)"."""
    cells = []
    for column in MEASURED:
        low, high = outcomes.interval(column)
        cells.append(f"{outcomes.shares[column]:.0%} ({100 * low:.0f}–{100 * high:.0f})")
    return cells


def _what(direction: Direction) -> str:
    profile = direction.profile
    if profile.activated:
        return f"{len(profile.activated)} activated"
    return f"{len(profile.deactivated)} deactivated"


def _spread(direction: Direction, column: str) -> str:
    shares = [control.shares[column] for control in direction.random]
    return f"{np.mean(shares):.0%} [{100 * min(shares):.0f}–{100 * max(shares):.0f}]"


def _steered_lines(found: BehaviourResult, words: dict[Expert, str]) -> Iterator[Text]:
    for side, direction in found.toward.items():
        chosen = [*direction.profile.activated, *direction.profile.deactivated]
        kinds = [words.get(expert, "other") for expert in chosen]
        count = ", ".join(
            f"{kinds.count(kind)} {kind}" for kind in ("planted", "decoy", "other") if kind in kinds
        )
        yield Text(f"towards {side.upper()} steers {named(chosen)} ({count})", "dim")


def _replies(found: BehaviourResult, result: DemoResult) -> Iterator[RenderableType]:
    """A prompt each way on which steering changed the reply, before and after."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for side, direction in found.toward.items():
        task = MEASURED[TARGET[found.behaviour, side]][0]
        pairs = zip(result.unsteered.replies, direction.steered.replies, strict=True)
        changed: list[tuple[Probe, str, str]] = [
            (probe, before, after)
            for (probe, before), (_, after) in pairs
            if probe.task == task and before != after
        ]
        if changed:
            probe, before, after = changed[0]
            table.add_row("asked", Text(probe.prompt, "italic"))
            table.add_row("unsteered", Text(before))
            table.add_row(f"towards {side.upper()}", Text(after, "bold"))
    yield table
