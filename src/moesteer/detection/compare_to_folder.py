"""`moesteer detectors`: a comparison that keeps its results in a folder, and resumes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moesteer.contrast import ContrastPair, pairs_hash
from moesteer.detection.comparing import (
    DetectorComparison,
    causal_profiles,
    compare_detectors,
    cost_of,
    measurement,
)
from moesteer.detection.decision import Over
from moesteer.detection.knocking import Cost
from moesteer.errors import MoesteerError
from moesteer.provenance import about
from moesteer.runs import open_run

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.testbed import PlantedBehaviour


def compare_to_folder(
    engine: "Engine",
    pairs: Sequence[ContrastPair],
    *,
    out: str | Path | None,
    source: str,
    beside: Mapping[str, Sequence[ContrastPair]] | None = None,
    neutral: Sequence[ContrastPair] = (),
    over: Over = "decision",
    layers: int | None = None,
    truth: "PlantedBehaviour | None" = None,
    chat_options: Mapping[str, bool | int | float | str] | None = None,
    seed: int = 0,
    command: str = "",
    say: Callable[[Cost], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DetectorComparison:
    """Compare all detectors on the pairs, which `source` names; without `out` nothing is kept.

    The folder also gets a profile of each causal detector, `knock-out.safetensors` and so on, to
    select experts by or to search with.

    `say` is told what it costs before it starts; for the rest see `compare_detectors`.
    """
    if seed < 0:
        raise MoesteerError(f"--seed is {seed}; it can't be negative.")
    others, options = beside or {}, dict(chat_options or {})
    measured = measurement(
        engine, pairs, over=over, beside=others, neutral=neutral, chat_options=options
    )
    cost = cost_of(engine, measured, layers)
    if say is not None:
        say(cost)
    settings = {
        "model": asdict(engine.facts),
        "pairs": source,
        "pairs_hash": pairs_hash(pairs),
        "beside": {name: pairs_hash(some) for name, some in others.items()},
        "neutral": pairs_hash(neutral),
        "over": over,
        "layers": cost.layers,
        "chat_options": options,
        "seed": seed,
    }
    with open_run(out, "detectors", settings, about(command)) if out else nullcontext() as run:
        result = compare_detectors(
            engine,
            pairs,
            measured,
            over=over,
            into=layers,
            truth=truth,
            chat_options=options,
            run=run,
            seed=seed,
            progress=progress,
        )
        if run:
            profiles = causal_profiles(result, source=source, command=command)
            for name, profile in profiles.items():
                profile.save(run.folder / f"{name}.safetensors")
    return result
