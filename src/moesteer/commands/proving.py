"""Commands that prove what a profile does: beside its controls, and after a search for one."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from moesteer.commands.common import (
    DEFAULT,
    ModelOptions,
    command_line,
    load_engine,
    load_profile,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moesteer.engines.base import Engine
    from moesteer.evaluation.cards import Card
    from moesteer.profile import Profile


def evaluate(
    model: str,
    /,
    *,
    with_: str,
    tasks: list[str],
    out: str,
    split: Literal["fit", "dev", "test", "all"] = "test",
    seeds: int = 3,
    data: list[str] | None = None,
    checks: str | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    options: ModelOptions = DEFAULT,
) -> None:
    """Measure a profile beside the unsteered model and its controls, on tasks; with its price.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    with_
        The profile to evaluate.
    tasks
        A task, or your own card (FILE.toml). May be repeated. Where all are targets, tasks that
        measure the price are added.
    out
        The folder of results. An interrupted run is taken up when started again, and tasks may be
        added to a finished one.
    split
        Which of the prompts. What was chosen on dev is measured on test, once.
    seeds
        How many controls of each kind.
    data
        TASK=FILE: where your prompts of a task are. May be repeated.
    checks
        The folder with results of `judge check`; without it, the folder that `out` is in.
    limit
        Only the first so many prompts of each task.
    max_new_tokens
        The longest reply, in tokens, instead of each task's own.
    batch_size
        Prompts a batch.
    """
    from moesteer.chat import parse_chat_options
    from moesteer.evaluation.cards import read_card
    from moesteer.evaluation.evaluate import evaluate as run_evaluation
    from moesteer.report.comparison_page import comparison_page
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import print_text

    cards = [read_card(name) for name in tasks]
    files = dict(parted(text, "=", "TASK=FILE") for text in data or [])
    profile = load_profile(with_)
    assert profile is not None
    chat_options = parse_chat_options(options.chat_option or [])
    engine = load_engine(model, options, profile, dense=not profile.steered_layers)
    with counted_progress("evaluate", "replies") as progress:
        comparison = run_evaluation(
            engine,
            profile,
            cards,
            out=out,
            split=split,
            data=files,
            seeds=seeds,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            limit=limit,
            chat_options=chat_options,
            checks=checks,
            say=_say,
            progress=progress,
            command=command_line(),
        )
    print_text(comparison_page(comparison))
    print_text(f"written: {out}")


def search(
    model: str,
    /,
    *,
    target: str,
    toward: Literal["a", "b"],
    out: str,
    pairs: str | None = None,
    detectors: list[str] | None = None,
    rankings: list[str] | None = None,
    directions: str | None = None,
    prices: list[str] | None = None,
    max_kl: float | None = None,
    budget: int | None = None,
    coefficients: list[float] | None = None,
    methods: list[Literal["one", "two"]] | None = None,
    others: int | None = None,
    optimiser: Literal["grid", "optuna"] = "grid",
    seeds: int = 3,
    data: list[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    options: ModelOptions = DEFAULT,
    seed: int = 0,
) -> None:
    """Choose how many experts, or which direction, to steer on dev prompts; then test it, once.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    target
        The task whose share of its outcome is to grow; TASK=OUTCOME for another of its outcomes.
    toward
        The side of the pairs to steer towards.
    out
        The folder of results; best.safetensors is the profile found. An interrupted search is taken
        up when started again.
    pairs
        Contrast pairs to detect from; the scores are kept beside `out`.
    detectors
        Detectors to rank experts by, from the pairs; without it, risk-difference.
    rankings
        Profiles with scores to rank experts by, instead of pairs.
    directions
        Search among the directions of this file, written by `direction`, instead of among experts.
    prices
        TASK>=SHARE: a task whose outcome must keep at least this share. May be repeated.
    max_kl
        The largest mean divergence from the unsteered model, in nats a token. With --directions,
        of the first token after the prices' prompts; 1 without it.
    budget
        Trials of one search; the search-matched controls take as many each. Without it, 48; with
        --directions 8, of which each has its replies judged.
    coefficients
        With --directions: how many times a direction is added, above 0; --toward gives the sign.
        Without it, from 0.25 to 4, for experts from 1 to 400. May be repeated.
    methods
        With --directions of experts: one (each expert alone), two (all kept ones of a layer
        together). Without it, both.
    others
        With --directions of experts: how many experts below the threshold a control searches; 10
        without it.
    optimiser
        A grid of numbers, or optuna's sampler.
    seeds
        How many controls of each kind.
    data
        TASK=FILE: where your prompts of a task are. May be repeated.
    limit
        Only the first so many prompts of each task and split. With --directions, 25 on dev without
        it.
    max_new_tokens
        The longest reply, in tokens, instead of each task's own. With --directions, 25 on dev
        without it.
    batch_size
        Prompts a batch.
    seed
        Seed of optuna's sampler.
    """
    from moesteer.chat import parse_chat_options
    from moesteer.evaluation.search import BUDGET
    from moesteer.evaluation.search import search as run_search
    from moesteer.report.progress import counted_progress
    from moesteer.report.search_page import search_page
    from moesteer.report.terminal import print_text

    _refuse_mixed(locals())
    card, kept = target_card(target), _prices(prices or [])
    files = dict(parted(text, "=", "TASK=FILE") for text in data or [])
    chat_options = parse_chat_options(options.chat_option or [])
    if directions is not None:
        more = {"max_kl": max_kl, "budget": budget, "others": others}
        _search_directions(
            model,
            directions,
            options,
            target=card,
            prices=kept,
            toward=toward,
            out=out,
            coefficients=coefficients,
            methods=methods,
            seeds=seeds,
            data=files,
            limit=limit,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            chat_options=chat_options,
            **{name: value for name, value in more.items() if value is not None},
        )
        return
    ranked = _rankings(rankings, pairs, detectors)
    engine = load_engine(model, options)
    with counted_progress("search", "trials") as progress:
        result = run_search(
            engine,
            ranked(engine, out, chat_options),
            card,
            toward=toward,
            out=out,
            prices=kept,
            max_kl=max_kl,
            budget=BUDGET if budget is None else budget,
            optimiser=optimiser,
            seeds=seeds,
            seed=seed,
            data=files,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            chat_options=chat_options,
            say=_say,
            progress=progress,
            command=command_line(),
        )
    print_text(search_page(result))
    print_text(f"written: {out}")


FOR_RANKINGS = ("pairs", "detectors", "rankings", "optimiser", "seed")
FOR_DIRECTIONS = ("coefficients", "methods", "others")
"""Options of a search that mean nothing in the other kind."""


def _refuse_mixed(given: "Mapping[str, object]") -> None:
    """MoesteerError for an option that is given and means nothing in this kind of search."""
    from inspect import signature

    from moesteer.errors import MoesteerError

    among_directions = given["directions"] is not None
    for name in FOR_RANKINGS if among_directions else FOR_DIRECTIONS:
        if given[name] != signature(search).parameters[name].default:
            raise MoesteerError(
                f"--{name} is for a search among experts, not among --directions."
                if among_directions
                else f"--{name} is for a search among --directions; give their file."
            )


def _search_directions(
    model: str, file: str, options: ModelOptions, *, target: "Card", **settings: Any
) -> None:
    """The search among the directions of a file; `settings` are those of `direction_search`."""
    from moesteer.evaluation.direction_choices import widest
    from moesteer.evaluation.direction_search import direction_search
    from moesteer.report.direction_search_page import direction_search_page
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import print_text

    source = load_profile(file)
    assert source is not None
    engine = load_engine(model, options, widest(source), dense=True)
    with counted_progress("search", "choices") as progress:
        result = direction_search(
            engine,
            source,
            target,
            **settings,
            say=_say,
            progress=progress,
            command=command_line(),
        )
    print_text(direction_search_page(result))
    print_text(f"written: {settings['out']}")


def target_card(text: str) -> "Card":
    """TASK or TASK=OUTCOME as a card with that outcome, whatever its role is elsewhere."""
    from dataclasses import replace

    from moesteer.errors import MoesteerError
    from moesteer.evaluation.cards import read_card

    name, _, outcome = text.partition("=")
    card = read_card(name)
    if outcome and outcome not in card.outcomes:
        raise MoesteerError(
            f"--target: {outcome!r} is no outcome of {card.name}; it has"
            f" {', '.join(card.outcomes)}."
        )
    return replace(card, outcome=outcome or card.outcome, role="target")


def _prices(texts: list[str]) -> "list[tuple[Card, float]]":
    """TASK>=SHARE texts as cards with the least share, whatever their role is elsewhere."""
    from dataclasses import replace

    from moesteer.errors import MoesteerError
    from moesteer.evaluation.cards import read_card

    found = []
    for text in texts:
        name, least = parted(text, ">=", "TASK>=SHARE")
        try:
            share = float(least)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise MoesteerError(f"--prices {text}: {least} is no share from 0 to 1.")
        found.append((replace(read_card(name), role="price"), share))
    return found


def _rankings(
    profiles: list[str] | None, pairs: str | None, detectors: list[str] | None
) -> "Callable[[Engine, str, dict[str, bool | int | float | str]], list[Profile]]":
    """Check what is given before the model is loaded; the function returned then detects."""
    from moesteer.contrast import read_pairs
    from moesteer.detection.detectors import detector_named
    from moesteer.errors import MoesteerError
    from moesteer.evaluation.search import detected_beside
    from moesteer.profile import Profile
    from moesteer.report.progress import counted_progress

    if (pairs is None) == (profiles is None) or (detectors and pairs is None):
        raise MoesteerError(
            "give either --pairs (with --detectors) to rank experts from, or --rankings."
        )
    if pairs is None:
        loaded = [Profile.load(path) for path in profiles or []]
        return lambda engine, out, chat_options: loaded
    names = [detector_named(name).name for name in detectors or ["risk-difference"]]
    read = read_pairs(pairs)

    def detected(
        engine: "Engine", out: str, chat_options: dict[str, bool | int | float | str]
    ) -> list[Profile]:
        with counted_progress("detect", "tokens") as progress:
            return [
                detected_beside(
                    engine,
                    read,
                    name,
                    out=out,
                    source=pairs,
                    chat_options=chat_options,
                    command=command_line(),
                    progress=progress,
                )
                for name in names
            ]

    return detected


def parted(text: str, sign: str, form: str) -> tuple[str, str]:
    """Both sides of the sign; MoesteerError where one is missing."""
    from moesteer.errors import MoesteerError

    left, found, right = text.partition(sign)
    if not (left and found and right):
        raise MoesteerError(f"{text!r} is not {form}.")
    return left.strip(), right.strip()


def _say(line: str) -> None:
    print(f"moesteer: {line}", file=sys.stderr)
