"""Which of many directions it is: three measurements of each, on prompts that it was not fitted on.

    bypass   mean refusal score of A's prompts while the direction is ablated at every write to the
             residual stream: the lower, the more of the behaviour goes with it
    induce   mean refusal score of B's prompts while it is added at its own layer's input: whether
             it brings the behaviour about
    KL       KL(unsteered ‖ ablated) of the first token's distribution on B's prompts, in nats:
             whether its loss changes what has nothing to do with the behaviour

The lowest bypass wins, of those with KL ≤ 0.1, induce ≥ 0 and a layer below 0.8 of all: later ones
are close to the words themselves (Arditi et al. 2024, arXiv 2406.11717, which has these thresholds
as the defaults here).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
from jaxtyping import Bool, Float

from moesteer.chat import TokenisedConversation
from moesteer.direction import Candidates, Direction, Place, Site
from moesteer.directions.refusal import refusal_scores
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

if TYPE_CHECKING:
    from moesteer.directions.prompts import AskedPrompt, PromptSets
    from moesteer.engines.base import Engine


@dataclass(frozen=True)
class Thresholds:
    """What a direction must hold to be chosen; `max_layer` is a share of all layers."""

    max_kl: float = 0.1
    min_induce: float = 0.0
    max_layer: float = 0.8

    def __post_init__(self) -> None:
        if not self.max_kl >= 0:
            raise MoesteerError(f"--max-kl is {self.max_kl:g}; it must be 0 or more.")
        if not np.isfinite(self.min_induce):
            raise MoesteerError(f"--min-induce is {self.min_induce:g}; it must be finite.")
        if not 0 < self.max_layer <= 1:
            raise MoesteerError(
                f"--max-layer is {self.max_layer:g}; it is a share of the layers, above 0 to 1."
            )


def every_write(layers: int) -> tuple[Site, ...]:
    """What enters each layer, and what its attention and its feed-forward part write."""
    return tuple((layer, place) for layer in range(layers) for place in get_args(Place))


def score_candidates(
    engine: "Engine",
    sets: "PromptSets",
    candidates: Candidates,
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Float[np.ndarray, " candidate"]]:
    """Bypass, induce and KL of each candidate, on the validation prompts.

    `progress` is told how many prompts were read under a candidate since the last call: of each
    candidate A's once and B's twice.
    """
    writes = every_write(engine.facts.decoder_layers)
    ablations, additions = [], []
    for number, layer in enumerate(candidates.layer.tolist()):
        vector = candidates.vector_of(number)
        where = f"layer {layer}, position {candidates.position[number]}"
        ablated = Direction(vector, writes, "ablate")
        added = Direction(vector, ((layer, "input"),))
        ablations.append(Profile(directions=(ablated,), name=f"without {where}"))
        additions.append(Profile(directions=(added,), name=f"with {where}"))
    a, b = sets.validation.a, sets.validation.b
    return {
        "bypass": refusal_scores(engine, a, sets.tokens, ablations, progress=progress).mean(1),
        "induce": refusal_scores(engine, b, sets.tokens, additions, progress=progress).mean(1),
        "kl": np.array([mean_kl(engine, b, profile, progress) for profile in ablations]),
    }


def mean_kl(
    engine: "Engine",
    prompts: "Sequence[AskedPrompt]",
    profile: Profile,
    progress: Callable[[int], None] | None = None,
) -> float:
    """Mean KL(unsteered ‖ steered), in nats, of what would come first after the prompts."""
    # Some token must stand where the distribution is read; which one says nothing.
    some = [
        TokenisedConversation((*prompt.ids, prompt.ids[-1]), (False,) * len(prompt.ids) + (True,))
        for prompt in prompts
    ]
    found = engine.divergence(some, profile)
    if progress is not None:
        progress(len(prompts))
    return float(found.mean())


def choose(candidates: Candidates, layers: int, thresholds: Thresholds) -> int:
    """The number of the candidate with the lowest bypass of those within the thresholds.

    Raises MoesteerError where there is none: it names the nearest, which breaks the fewest (the
    lowest bypass among equals), and what it breaks.
    """
    breaks = _broken(candidates, layers, thresholds)
    bypass = candidates.scores["bypass"]
    number = int(np.lexsort((bypass, np.sum(list(breaks.values()), axis=0)))[0])
    if not any(broken[number] for broken in breaks.values()):
        return number
    layer, position = int(candidates.layer[number]), int(candidates.position[number])
    kl, induce = (float(candidates.scores[name][number]) for name in ("kl", "induce"))
    said = {
        "--max-kl": f"KL is {kl:.4g}, over {thresholds.max_kl:g} (--max-kl)",
        "--min-induce": f"induce is {induce:+.4g}, under {thresholds.min_induce:g} (--min-induce)",
        "--max-layer": f"layer {layer} is not below {thresholds.max_layer:g} × {layers}"
        " (--max-layer)",
    }
    broken = "; its ".join(said[option] for option, which in breaks.items() if which[number])
    raise MoesteerError(
        f"none of {len(candidates)} directions is within the thresholds. The nearest is of layer"
        f" {layer}, position {position} (bypass {bypass[number]:+.4g}): its {broken}."
    )


def _broken(
    candidates: Candidates, layers: int, thresholds: Thresholds
) -> dict[str, Bool[np.ndarray, " candidate"]]:
    """By option: which candidates are not within its threshold."""
    return {
        "--max-kl": ~(candidates.scores["kl"] <= thresholds.max_kl),
        "--min-induce": ~(candidates.scores["induce"] >= thresholds.min_induce),
        "--max-layer": ~(candidates.layer < thresholds.max_layer * layers),
    }
