"""Commands that find directions: from two sets of prompts to a vector, and how it is used."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moesteer.commands.common import (
    DEFAULT,
    ModelOptions,
    check_out,
    command_line,
    load_engine,
    save_profile,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moesteer.generate import Prompt

SHOWN = 10
"""How many candidates are shown."""
LAST_TOKENS = 5
"""How many of a prompt's tokens are read of experts (arXiv 2606.04160)."""
OF_THE_STREAM = (
    *("max_kl", "min_induce", "max_layer"),
    *("operation", "coefficient", "place", "window"),
)
OF_EXPERTS = ("kind", "threshold", "layers")
"""Options of one of the two kinds of direction."""


def direction(
    model: str,
    /,
    *,
    restricted: str | None = None,
    harmless: str | None = None,
    pairs: str | None = None,
    out: str,
    positions: int | None = None,
    fit: int = 128,
    validate: int = 32,
    refusal_tokens: list[str] | None = None,
    max_kl: float = 0.1,
    min_induce: float = 0.0,
    max_layer: float = 0.8,
    operation: Literal["add", "ablate"] = "add",
    coefficient: float = 1.0,
    place: Literal["input", "attention", "mlp"] | None = None,
    window: Literal["prompt", "generation", "all"] = "all",
    experts: bool = False,
    kind: Literal["own", "forced"] = "own",
    threshold: float = 15.0,
    layers: list[int] | None = None,
    batch_size: int = 16,
    options: ModelOptions = DEFAULT,
    seed: int = 0,
) -> None:
    """Find the direction of a behaviour, such as refusal, from two sets of prompts.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`; a dense model too, without --experts.
    restricted
        Prompts that call the behaviour forth (side A): a file with a prompt a line, .csv with a
        column prompt, .jsonl with {"prompt": …} or {"messages": […]}, a data set
        (ORG/NAME:split), or testbed:TASK[:SPLIT].
    harmless
        Prompts that do not (side B), in the same forms.
    pairs
        Contrast pairs whose sides have different prompts, instead of the two sets.
    out
        The profile to write, with every direction that was measured. With --experts, an interrupted
        run is taken up when started again.
    positions
        How many of a prompt's last tokens are read. Without it, the tokens of the chat template
        that come after the instruction; with --experts, 5.
    fit
        Prompts a side to fit on; fewer where there are fewer.
    validate
        Prompts a side to choose on.
    refusal_tokens
        Words that replies with the behaviour begin with, instead of those found.
    max_kl
        The most that ablating the direction may change on harmless prompts, in nats.
    min_induce
        The least log-odds of the behaviour on harmless prompts while the direction is added.
    max_layer
        Only layers below this share of all.
    operation
        add: steer towards A (with a negative coefficient away from it); ablate: project out.
    coefficient
        How many times the direction is added.
    place
        Where: without it, what enters the direction's layer, or for ablate every write to the
        residual stream. attention, mlp: what that part writes.
    window
        On which tokens: of the prompt, generated ones, or all.
    experts
        Find the directions of single experts' outputs instead.
    kind
        With --experts: the expert's own output for the tokens routed to it (own); or, as in the
        paper, what the feed-forward part writes while the expert is forced (forced), which holds
        what the layer's other experts write as well.
    threshold
        With --experts: percentage points by which an expert's routing must differ.
    layers
        With --experts: only these layers.
    batch_size
        Prompts a batch.
    seed
        Seed of which prompts are fitted on and which are chosen on.
    """
    from moesteer.chat import parse_chat_options
    from moesteer.directions.aiming import Aim
    from moesteer.directions.experts import chosen_layers, find_expert_directions
    from moesteer.directions.prompts import draw_sets, positions_of
    from moesteer.directions.refusal import prepare_sets
    from moesteer.directions.residual import find_residual_direction
    from moesteer.directions.selection import Thresholds
    from moesteer.files import sole_writer
    from moesteer.generate import check_limits
    from moesteer.report.direction_page import direction_page
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import print_text

    _refuse_unused(experts, locals())
    check_limits(1, 0, batch_size, seed)
    thresholds = Thresholds(max_kl, min_induce, max_layer)
    aim = Aim(operation, coefficient, place, window)
    chat_options = parse_chat_options(options.chat_option or [])
    check_out(out, restricted, harmless, pairs)
    a, b, source = _read_sides(restricted, harmless, pairs)
    engine = load_engine(model, options, dense=not experts)
    if experts:
        chosen_layers(engine.facts, layers, threshold)
    checkpoint = Path(out).parent / f".{Path(out).name}.experts.partial"
    with sole_writer(Path(out)):
        sets = draw_sets(
            engine, a, b, fit=fit, validate=validate, chat_options=chat_options, seed=seed
        )
        last = positions_of(sets, LAST_TOKENS if experts and positions is None else positions)
        with counted_progress("filter", "prompts") as progress:
            sets = prepare_sets(
                engine, sets, refusal_tokens, batch_size=batch_size, progress=progress
            )
        with counted_progress("direction", "prompts") as progress:
            if experts:
                profile = find_expert_directions(
                    engine,
                    sets,
                    last=last,
                    threshold=threshold,
                    kind=kind,
                    layers=layers,
                    seed=seed,
                    batch_size=batch_size,
                    source=source,
                    command=command_line(),
                    checkpoint=checkpoint,
                    progress=progress,
                )
            else:
                profile = find_residual_direction(
                    engine,
                    sets,
                    last=last,
                    thresholds=thresholds,
                    aim=aim,
                    batch_size=batch_size,
                    seed=seed,
                    source=source,
                    command=command_line(),
                    progress=progress,
                )
        profile.save(out)
        checkpoint.unlink(missing_ok=True)
    print_text(direction_page(profile, SHOWN))
    print_text(f"written: {out}")


def aim(
    profile: str,
    /,
    *,
    layer: int,
    position: int,
    expert: list[int] | None = None,
    operation: Literal["add", "ablate"] = "add",
    coefficient: float = 1.0,
    place: Literal["input", "attention", "mlp"] | None = None,
    window: Literal["prompt", "generation", "all"] = "all",
    out: str,
) -> None:
    """Choose another of the directions that a profile holds, and how it is used.

    Parameters
    ----------
    profile
        A profile from `direction`.
    layer
        The layer that the direction was read at.
    position
        The position that it was read at: −1 the prompt's last token, −2 the one before it, …;
        0 a mean over positions.
    expert
        Of directions of experts: whose; several are used together. Without it, all of the
        layer that were kept.
    operation
        add: steer towards A (with a negative coefficient away from it); ablate: project out.
    coefficient
        How many times the direction is added.
    place
        Where: without it, what enters the direction's layer, or for ablate every write to the
        residual stream. attention, mlp: what that part writes.
    window
        On which tokens: of the prompt, generated ones, or all.
    out
        The profile to write.
    """
    from moesteer.directions.aiming import Aim, aimed, find_candidates
    from moesteer.profile import Profile
    from moesteer.report.direction_page import direction_page
    from moesteer.report.terminal import print_text

    loaded = Profile.load(profile)
    chosen = find_candidates(loaded, layer, position, expert or [])
    steering = aimed(loaded, chosen, Aim(operation, coefficient, place, window))
    save_profile(steering.made_by(command_line()), out)
    print_text(direction_page(steering, SHOWN))
    print_text(f"written: {out}")


def _refuse_unused(experts: bool, given: "Mapping[str, object]") -> None:
    """Refuse options that are given and mean nothing for this kind of direction."""
    from inspect import signature

    from moesteer.errors import MoesteerError

    for name in OF_THE_STREAM if experts else OF_EXPERTS:
        if given[name] != signature(direction).parameters[name].default:
            option = f"--{name.replace('_', '-')}"
            raise MoesteerError(
                f"{option} is not for --experts; how such a direction is used is said by"
                " `moesteer aim`."
                if experts
                else f"{option} is for directions of experts; add --experts."
            )


def _read_sides(
    restricted: str | None, harmless: str | None, pairs: str | None
) -> "tuple[list[Prompt], list[Prompt], str]":
    """The prompts of A and of B, and where they come from."""
    from moesteer.contrast import read_pairs
    from moesteer.directions.prompts import prompts_of_pairs, read_prompt_set
    from moesteer.errors import MoesteerError

    if pairs is not None and not (restricted or harmless):
        return *prompts_of_pairs(read_pairs(pairs)), pairs
    if pairs is not None or restricted is None or harmless is None:
        raise MoesteerError(
            "give two sets of prompts, --restricted and --harmless, or --pairs, and not both."
        )
    source = f"{restricted} and {harmless}"
    return read_prompt_set(restricted), read_prompt_set(harmless), source
