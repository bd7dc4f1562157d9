"""`moesteer detect`: a detection that holds its output file, resumes after a kill, and saves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesteer.detection.counts import Progress
from moesteer.detection.detect import detect
from moesteer.detection.selecting import select_experts
from moesteer.errors import MoesteerError
from moesteer.files import sole_writer
from moesteer.profile import Profile, Side

if TYPE_CHECKING:
    from moesteer.contrast import ContrastPair
    from moesteer.engines.base import Engine


def detect_to_file(
    engine: "Engine",
    pairs: "Sequence[ContrastPair]",
    *,
    out: str,
    select: tuple[int, int, Side | None],
    detector: str,
    match_spans: bool,
    chat_options: Mapping[str, bool | int | float | str],
    source: str,
    seed: int,
    command: str,
    progress: Progress | None = None,
) -> Profile:
    """Detect, choose `select` = (activate, deactivate, toward) experts if any, and write `out`.

    The counts are checkpointed beside `out` and removed once it is written.
    """
    activate, deactivate, toward = select
    if bool(activate or deactivate) != (toward is not None):
        raise MoesteerError(
            "say both how many experts to steer (--activate, --deactivate) and towards which side"
            " (--toward), or neither, to keep all scores for `moesteer select`."
        )
    if min(activate, deactivate, seed) < 0:
        raise MoesteerError("--activate, --deactivate and --seed can't be negative.")
    experts = sum(layer.experts for layer in engine.facts.layers)
    if activate + deactivate > experts:
        raise MoesteerError(
            f"{activate + deactivate} experts to steer, but {engine.facts.id} has {experts}."
        )
    path = Path(out)
    checkpoint = path.parent / f".{path.name}.counts.partial"
    with sole_writer(path):
        profile = detect(
            engine,
            pairs,
            detector,
            match_spans=match_spans,
            chat_options=chat_options,
            source=source,
            checkpoint=checkpoint,
            progress=progress,
            seed=seed,
            command=command,
        )
        if toward is not None:
            profile = select_experts(
                profile, activate=activate, deactivate=deactivate, toward=toward
            )
        profile.save(path)
        checkpoint.unlink(missing_ok=True)
    return profile
