"""Rationales by attribution: a number for each word, by how much it had to do with the label.

What is attributed is one number R, how much more probable the model's label is than the next best
(`labels.decision_readout`). A method scores tokens (`methods/`, a file each); a word's score is the
sum of its tokens', or their mean or the largest of them. Methods that need the same pass through
the model share it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float

from moesteer.engines.base import TokenGradient
from moesteer.engines.readouts import Readout
from moesteer.errors import MoesteerError
from moesteer.rationale.labels import Decision, decision_readout
from moesteer.rationale.layout import Laid
from moesteer.rationale.masking import Mask
from moesteer.rationale.methods import attention, saliency
from moesteer.rationale.methods.behaviour_routing import behaviour_routing
from moesteer.rationale.methods.gate_x_gradient import gate_x_gradient
from moesteer.rationale.methods.input_x_gradient import input_x_gradient
from moesteer.rationale.methods.integrated_gradients import integrated_gradients
from moesteer.rationale.methods.occlusion import occlusion
from moesteer.rationale.methods.random_units import random_scores as random_scores

if TYPE_CHECKING:
    from torch import Tensor

    from moesteer.engines.base import Engine
    from moesteer.profile import Profile

METHODS = {
    "attention-last": "what the deciding token attends to in the last layer",
    "attention-mean": "the same, the mean over layers",
    "attention-rollout": "the same, followed through all layers",
    "saliency-l1": "how fast the decision changes with a token (sum of absolute values)",
    "saliency-l2": "how fast the decision changes with a token (Euclidean length)",
    "input-x-gradient": "what a token adds to the decision, to first order",
    "integrated-gradients": "what a token adds on the way from no words to the text",
    "occlusion": "how much the decision drops when a word is masked",
    "gate-x-gradient": "how much the decision hangs on the experts at a token",
    "behaviour-routing": "how far a token's experts are those of a behaviour",
}
"""The methods by name, and what each one's numbers say."""

ROUTED = ("gate-x-gradient", "behaviour-routing")
"""Those that look at experts, which a dense model has none of."""

Pool = Literal["sum", "mean", "max"]
"""How a word's score is made of its tokens'."""

_POOLS: Mapping[Pool, Callable[[np.ndarray], float]] = {
    "sum": lambda scores: float(scores.sum()),
    "mean": lambda scores: float(scores.mean()),
    "max": lambda scores: float(scores.max()),
}
_OF_ATTENTION: "Mapping[str, Callable[[Tensor], np.ndarray]]" = {
    "attention-last": attention.last,
    "attention-mean": attention.mean,
    "attention-rollout": attention.rollout,
}
_OF_GRADIENTS: Mapping[str, Callable[[TokenGradient], np.ndarray]] = {
    "saliency-l1": saliency.l1,
    "saliency-l2": saliency.l2,
    "input-x-gradient": input_x_gradient,
    "gate-x-gradient": gate_x_gradient,
}


@dataclass(frozen=True)
class Attributed:
    """For each instance a number for each unit, by method; and which share of their whole
    integrated gradients miss, None where they were not asked for."""

    scores: tuple[dict[str, tuple[float, ...]], ...]
    gaps: tuple[float | None, ...]


def attribute(
    engine: "Engine",
    laid: Sequence[Laid],
    decisions: Sequence[Decision],
    methods: Sequence[str],
    *,
    mask: Mask,
    profile: "Profile | None" = None,
    pool: Pool = "sum",
    behaviour: "Profile | None" = None,
    checkpointing: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Attributed:
    """Score every unit of every instance by every method, of `METHODS`, under a profile.

    `decisions`: the model's labels under the same profile. `mask` is for occlusion, `behaviour`,
    a profile with scores, for behaviour-routing. `checkpointing` computes layers twice in backward
    passes and holds less. `progress` is called with how many scorings, of an instance by a method,
    were done since the last call.

    Raises MoesteerError for an unknown method, for one that the model or a missing `behaviour`
    doesn't allow, and where scores are not finite.
    """
    check_methods(methods, bool(engine.facts.layers), behaviour)
    done = progress or (lambda _: None)
    readouts = [decision_readout(one, said) for one, said in zip(laid, decisions, strict=True)]
    asked = _Asked(engine, laid, readouts, methods, profile)
    found: list[dict[str, tuple[float, ...]]] = [{} for _ in laid]
    gaps: dict[int, float] = {}
    if not laid:
        return Attributed((), ())
    for method, number, scores in chain(
        _by_attention(asked),
        _by_gradients(asked, checkpointing),
        _by_integration(asked, checkpointing, gaps),
        _by_routing(asked, behaviour),
    ):
        found[number][method] = pooled(scores, laid[number], pool)
        done(1)
    if "occlusion" in methods:
        drops = occlusion(engine, laid, readouts, mask, profile)
        for of, drop in zip(found, drops, strict=True):
            of["occlusion"] = tuple(drop.tolist())
        done(len(laid))
    _check_finite(asked, found)
    ordered = tuple({method: of[method] for method in methods} for of in found)
    return Attributed(ordered, tuple(map(gaps.get, range(len(laid)))))


def pooled(scores: Float[np.ndarray, " token"], laid: Laid, pool: Pool) -> tuple[float, ...]:
    """Each unit's score, of those of its tokens."""
    return tuple(_POOLS[pool](scores[list(unit.tokens)]) for unit in laid.units)


def top(scores: Sequence[float], tokens: Sequence[int], budget: int) -> tuple[int, ...]:
    """The numbers of the units with the largest scores, best first, of equal ones the first: as
    many as come nearest to `budget` tokens, and one at least unless that is 0.

    By tokens, not by units: a method that likes long words would else mask, and agree, more.
    """
    chosen: list[int] = []
    total = 0
    for number in sorted(range(len(scores)), key=lambda number: -scores[number]):
        more = total + tokens[number]
        if total >= budget or (chosen and more - budget >= budget - total):
            break
        chosen.append(number)
        total = more
    return tuple(chosen)


# -- passes through the model --------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    engine: "Engine"
    laid: Sequence[Laid]
    readouts: Sequence[Readout]
    methods: Sequence[str]
    profile: "Profile | None"


_Found = Iterator[tuple[str, int, Float[np.ndarray, " token"]]]
"""A method, the number of an instance, and its score of each token."""


def _by_attention(asked: _Asked) -> _Found:
    own = [method for method in asked.methods if method in _OF_ATTENTION]
    if own:
        # The last token is the one that decides.
        for number, maps in asked.engine.attention_maps(asked.readouts, asked.profile):
            for method in own:
                yield method, number, _OF_ATTENTION[method](maps)


def _by_gradients(asked: _Asked, checkpointing: bool) -> _Found:
    own = [method for method in asked.methods if method in _OF_GRADIENTS]
    if own:
        gates = "gate-x-gradient" in own
        for number, found in asked.engine.token_gradients(
            asked.readouts, asked.profile, gates=gates, checkpointing=checkpointing
        ):
            for method in own:
                yield method, number, _OF_GRADIENTS[method](found)


def _by_integration(asked: _Asked, checkpointing: bool, gaps: dict[int, float]) -> _Found:
    """Fills in `gaps` by number of the instance."""
    if "integrated-gradients" in asked.methods:
        for number, scores, gap in integrated_gradients(
            asked.engine, asked.laid, asked.readouts, asked.profile, checkpointing=checkpointing
        ):
            gaps[number] = gap
            yield "integrated-gradients", number, scores


def _by_routing(asked: _Asked, behaviour: "Profile | None") -> _Found:
    if behaviour is not None and "behaviour-routing" in asked.methods:
        texts = [one.ids for one in asked.laid]
        found = behaviour_routing(asked.engine, texts, behaviour, asked.profile)
        for number, scores in enumerate(found):
            yield "behaviour-routing", number, scores


# -- checks --------------------------------------------------------------------------------------


def _check_finite(asked: _Asked, found: Sequence[Mapping[str, tuple[float, ...]]]) -> None:
    for one, of in zip(asked.laid, found, strict=True):
        for method, scores in of.items():
            if not np.isfinite(scores).all():
                raise MoesteerError(
                    f"{one.instance.source}: {method} gives NaN or infinite numbers in"
                    f" {asked.engine.facts.id}; load the model in another dtype (--dtype float32"
                    " or bfloat16)."
                )


def check_methods(methods: Sequence[str], routed: bool, behaviour: "Profile | None") -> None:
    """MoesteerError for a method that there is none of, or that needs what is not here."""
    for method in methods:
        if method not in METHODS:
            raise MoesteerError(
                f"there is no method of attribution {method!r}; choose from {', '.join(METHODS)}."
            )
        if method in ROUTED and not routed:
            raise MoesteerError(f"{method} looks at experts, and this model is dense: it has none.")
    if "behaviour-routing" in methods and behaviour is None:
        raise MoesteerError(
            "behaviour-routing needs a profile with scores of experts (--behaviour, from"
            " `moesteer detect`)."
        )
    if "behaviour-routing" in methods and behaviour is not None and behaviour.scores is None:
        raise MoesteerError(
            f"{behaviour.name} has no scores of experts; give a profile from `moesteer detect`."
        )
