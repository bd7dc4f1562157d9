"""Commands that walk a paper's road on the user's model: a command a paper."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moesteer.commands.common import DEFAULT, ModelOptions, command_line, load_engine

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.reproduce.steps import Road


def steermoe(
    *,
    model: str,
    out: str,
    pairs: list[str] | None = None,
    data: list[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    options: ModelOptions = DEFAULT,
) -> None:
    """Walk SteerMoE's road: experts of safety and of faithfulness, steered, beside the paper.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`, which needs no data.
    out
        The folder of results: tables.md, summary.json, report.html, profiles and runs. Given again,
        with more data if you like, it goes on from there.
    pairs
        document=FILE and refusal=FILE: contrast pairs of faithfulness and of safety. May be
        repeated.
    data
        TASK=FILE: your prompts of one of the paper's tasks; or MY_CARD.toml=FILE, with your own
        card of it. May be repeated.
    limit
        Only the first so many prompts of each task, for a trial.
    batch_size
        Prompts a batch.
    """
    from moesteer.reproduce.steermoe import road as paper

    stand_in, bundled = _stand_in(model, "testbed", [*(pairs or []), *(data or [])])
    _check(limit, batch_size)
    road = paper.road(
        stand_in,
        bundled=bundled,
        pairs=_named(pairs, "BEHAVIOUR=FILE"),
        data=_named(data, "TASK=FILE"),
        limit=limit,
    )
    _walk(road, out, batch_size, lambda: load_engine(stand_in, options), options)


def expert_refusal(
    *,
    model: str,
    out: str,
    data: list[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    options: ModelOptions = DEFAULT,
) -> None:
    """Walk expert-aware refusal steering's road: the direction, its writers, single experts.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`, for which testbed-expert stands in and which needs
        no data.
    out
        The folder of results: tables.md, summary.json, report.html, profiles and runs. Given again,
        it goes on from there.
    data
        restricted=FILE and harmless=FILE: prompts that the model refuses and that it answers. May
        be repeated.
    limit
        Measure on the first so many prompts of each set only, for a trial.
    batch_size
        Prompts a batch.
    """
    from moesteer.reproduce.expert_refusal import road as paper

    stand_in, bundled = _stand_in(model, "testbed-expert", data or [])
    _check(limit, batch_size, options)
    given = _named(data, "restricted=FILE")
    road = paper.road(stand_in, bundled=bundled, data=given, limit=limit)
    _walk(road, out, batch_size, lambda: load_engine(stand_in, options), options)


def rationales(
    *,
    model: str,
    out: str,
    data: list[str] | None = None,
    train: list[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    options: ModelOptions = DEFAULT,
) -> None:
    """Walk the rationales' road: what a model names, uses and people mark, and fine-tuning.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`, for which testbed-reader stands in and which needs
        no data; a dense model too.
    out
        The folder of results: tables.md, summary.json, report.html and runs. Given again, with more
        data if you like, it goes on from there.
    data
        e-snli=FILE, fever=FILE, medical-bios=FILE: instances to measure on. May be repeated.
    train
        The same, with instances to fine-tune on. May be repeated.
    limit
        Measure on the first so many instances of each set only, for a trial.
    batch_size
        Prompts a batch.
    """
    from moesteer.reproduce import rationales as paper

    stand_in, bundled = _stand_in(model, "testbed-reader", [*(data or []), *(train or [])])
    _check(limit, batch_size, options)
    if bundled and options.dtype == "auto":  # all its weights are trained, and small steps count
        options = replace(options, dtype="float32")
    road = paper.road(
        stand_in,
        bundled=bundled,
        data=_named(data, "e-snli=FILE"),
        train=_named(train, "e-snli=FILE"),
        limit=limit,
    )
    _walk(road, out, batch_size, lambda: load_engine(stand_in, options, dense=True), options)


def _walk(
    road: "Road",
    out: str,
    batch_size: int,
    load: "Callable[[], Engine]",
    options: ModelOptions,
) -> None:
    """Say what will be done, do it, and write it down."""
    import torch

    from moesteer.chat import parse_chat_options
    from moesteer.errors import MoesteerError
    from moesteer.files import write_text
    from moesteer.report.progress import counted_progress
    from moesteer.report.reproduce_page import (
        plan_page,
        reproduction_of,
        reproduction_page,
        tables_markdown,
        tables_of,
    )
    from moesteer.report.terminal import print_text
    from moesteer.report.write_report import write_report
    from moesteer.reproduce.steps import SUMMARY, walk
    from moesteer.runs import check_place

    chat_options = parse_chat_options(options.chat_option or [])
    road.check()
    check_place(Path(out), f"reproduce {road.paper.name}")
    if road.bundled:
        torch.set_num_threads(1)  # on so small a model, threads mostly wait for each other
    print_text(plan_page(road), width=110)
    walked = walk(
        road,
        load,
        out,
        chat_options=chat_options,
        batch_size=batch_size,
        command=command_line(),
        say=lambda line: print(f"moesteer: {line}", file=sys.stderr),
        stage=counted_progress,
    )
    result, folder = reproduction_of(walked, tables_of(road.paper.name)), walked.folder
    write_text(folder / SUMMARY, result.to_json() + "\n")
    print_text(reproduction_page(result))
    write_text(folder / "tables.md", tables_markdown(result))
    if result.runs:
        write_report([folder / run for run in result.runs], folder / "report.html")
    print_text(f"written: {out}")
    if failed := [one.step for one in result.not_run if one.failed]:
        raise MoesteerError(
            f"{len(failed)} of what could be run was not finished: {'; '.join(failed)}. The tables"
            " say why; mended, the same command goes on from there."
        )


def _stand_in(model: str, instead: str, given: list[str]) -> tuple[str, bool]:
    """The model that is meant, and whether it comes with moesteer; such a one takes no data."""
    from moesteer.errors import MoesteerError
    from moesteer.report.verdict import TESTBED

    if model not in TESTBED:
        return model, False
    if given:
        raise MoesteerError(f"{model} brings its own tasks and prompts; leave out {given[0]}.")
    return (instead if model == "testbed" else model), True


def _check(limit: int | None, batch_size: int, options: ModelOptions = DEFAULT) -> None:
    from moesteer.errors import MoesteerError
    from moesteer.options import check_least

    check_least(1, limit=limit, batch_size=batch_size)
    if options.engine != "transformers":
        raise MoesteerError("this road needs gradients or hidden states; leave out --engine.")


def _named(texts: list[str] | None, form: str) -> dict[str, str]:
    """NAME=FILE texts by name; MoesteerError for one of another form, and for a name twice."""
    from moesteer.errors import MoesteerError

    found: dict[str, str] = {}
    for text in texts or []:
        name, equals, file = (part.strip() for part in text.partition("="))
        if not (name and equals and file):
            raise MoesteerError(f"{text!r} is not {form}.")
        if name in found:
            raise MoesteerError(f"{name} is given twice: {found[name]} and {file}.")
        found[name] = file
    return found
