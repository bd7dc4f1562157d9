"""The direction of a behaviour in the residual stream: a difference of means.

    r[l, p] = mean over A of x[l, p] − mean over B of x[l, p]

with x[l, p] what enters decoder layer l at position p, counted from the end of the prompt (Arditi
et al. 2024, arXiv 2406.11717: refusal is mediated by one direction). Every layer and position gives
a candidate; `selection.py` chooses among them.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from moesteer.direction import Candidates
from moesteer.directions.aiming import Aim, aimed
from moesteer.directions.means import mean_residuals
from moesteer.directions.prompts import PromptSets
from moesteer.directions.selection import Thresholds, choose, score_candidates
from moesteer.errors import MoesteerError
from moesteer.profile import Evidence, Profile
from moesteer.provenance import installed_versions
from moesteer.tally import tally

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

DETECTOR = "difference of means"


def residual_candidates(
    engine: "Engine",
    sets: PromptSets,
    last: int,
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Candidates:
    """Every layer's difference of means at the last `last` tokens; those of norm 0 are left out.

    Where all prompts have the same tokens, what enters the first layer is the same, too. `scores`
    hold the norm. Raises MoesteerError where all have norm 0.
    """
    a, b = (
        mean_residuals(engine, side, last, batch_size=batch_size, progress=progress)
        for side in (sets.fit.a, sets.fit.b)
    )
    difference = a - b
    norm = np.linalg.norm(difference, axis=-1)
    layer, place = np.nonzero(norm)
    if not len(layer):
        raise MoesteerError(
            f"the means over A and B are the same in all {len(norm)} layers at the last {last}"
            " tokens: a direction of norm 0 points nowhere. Do the prompts of A and B differ?"
        )
    return Candidates(
        "residual",
        layer,
        place - last,
        np.full(len(layer), -1),
        difference[layer, place].astype(np.float32),
        {"norm": norm[layer, place]},
    )


def find_residual_direction(
    engine: "Engine",
    sets: PromptSets,
    *,
    last: int,
    thresholds: Thresholds,
    aim: Aim,
    batch_size: int,
    seed: int,
    source: str,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Measure every candidate, choose one by its scores, and aim it.

    The profile keeps all candidates with their scores. `progress` is told how many prompts were
    read, under all candidates, and how many are to be. Raises MoesteerError where no candidate is
    within the thresholds.
    """
    fitted = len(sets.fit.a) + len(sets.fit.b)
    each = len(sets.validation.a) + 2 * len(sets.validation.b)
    told = tally(progress, fitted + each * engine.facts.decoder_layers * last)
    candidates = residual_candidates(engine, sets, last, batch_size=batch_size, progress=told)
    told = tally(progress, fitted + each * len(candidates), fitted)
    candidates.scores.update(score_candidates(engine, sets, candidates, progress=told))
    chosen = choose(candidates, engine.facts.decoder_layers, thresholds)
    profile = Profile(
        model=engine.facts,
        chat_options=sets.chat_options,
        evidence=evidence_of(
            sets, DETECTOR, last, seed=seed, source=source, command=command, **asdict(thresholds)
        ),
        candidates=candidates,
        name=source,
    )
    return aimed(profile, [chosen], aim)


def evidence_of(
    sets: PromptSets,
    detector: str,
    last: int,
    *,
    seed: int,
    source: str,
    command: str,
    **settings: bool | int | float | str,
) -> Evidence:
    """Where directions that were fitted on these sets come from."""
    a, b = len(sets.fit.a), len(sets.fit.b)
    return Evidence(
        detector=detector,
        counted=None,
        pairs=min(a, b),
        source=source,
        data_hash=sets.data_hash,
        target=f"the last {last} tokens of the prompt",
        tokens_a=a * last,
        tokens_b=b * last,
        seed=seed,
        interval="none",
        spans="as given",
        stability=None,
        versions=installed_versions(),
        command=command,
        settings=sets.settings
        | {"positions": last, "after_instruction": sets.after_instruction}
        | settings,
    )
