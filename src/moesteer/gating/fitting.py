"""A gate from two sets of prompts: those that are to open it, and those that are to keep it shut.

Both probes are linear in what is read of a prompt, x, and fitted to the fit prompts by the
difference of the sides' means:

    routing      x[l, e] = share of the prompt's tokens that select e in layer l
                 w = mean of x over A − mean of x over B, of the strongest experts alone: their risk
                 differences (as in SteerMoE, arXiv 2509.09660)
    direction    x[l] = what enters layer l at the prompt's last token
                 v = the same difference in one layer, of length 1 (Arditi et al. 2024, 2406.11717):
                 the layer where each half of the prompts best tells the other's sides apart

The threshold is chosen on the dev prompts (`threshold.py`), which also say how well the probe tells
them apart. Beside it stands what chance makes of it: the same fit where all labels are shuffled,
which shows what numbers so few prompts can give, and random probes, which show how little it may
take: two kinds of prompts that lie far apart do so along many directions.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float

from moesteer.engines.probing import BATCH, scores, selection_shares
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.gate import DirectionProbe, Gate, GateEvidence, Probe, RoutingProbe
from moesteer.gating.separation import area_under_curve, auc_with_interval, spread
from moesteer.gating.threshold import check_enough, choose_threshold, opened_of
from moesteer.provenance import installed_versions

if TYPE_CHECKING:
    from moesteer.directions.prompts import AskedPrompt, PromptSets
    from moesteer.engines.base import Engine
    from moesteer.model_facts import LayerShape

By = Literal["routing", "direction"]
Read = Float[np.ndarray, "_ layer number"]
"""What is read of some prompts: a number for each expert of each layer, or of the stream."""

STRONGEST = 32
"""Experts that a routing probe reads."""
POSITION = -1
"""Where a direction is read: the last token, which has heard all of the prompt."""
CONTROLS = 50
"""Shuffles of the labels, and random probes."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What was read of A's prompts, which are to open the gate, and of B's, on fit and on dev."""

    fit_a: Read
    fit_b: Read
    dev_a: Read
    dev_b: Read


def fit_gate(
    engine: "Engine",
    sets: "PromptSets",
    *,
    by: By = "routing",
    last: int | None = 1,
    false_alarms: float = 0.05,
    batch_size: int = BATCH,
    seed: int = 0,
    source: str = "",
    command: str = "",
    progress: Callable[[int], None] | None = None,
) -> Gate:
    """A gate that side A of the prompts opens, and at most `false_alarms` of side B's dev prompts.

    `last`: how many of a prompt's last tokens a routing probe reads, None: all.
    `progress` is told how many prompts were read since the last call; each is read once, and the
    dev prompts a second time. A MoesteerWarning says where the probe does no better than one that
    was fitted to shuffled labels. Raises MoesteerError where the dev prompts are too few, and where
    nothing of the sides differs.
    """
    check_enough(len(sets.validation.b), false_alarms)
    if by == "routing" and not engine.facts.layers:
        raise MoesteerError(
            f"{engine.facts.id} is a dense model, which routes nothing; make the gate by direction."
        )
    told = progress or (lambda number: None)
    read = {
        name: _read(engine, [prompt.ids for prompt in prompts], by, last, batch_size, told)
        for name, prompts in sets.parts.items()
    }
    parts = Parts(*(read[name] for name in ("fit_a", "fit_b", "validate_a", "validate_b")))
    weights = fitted(parts.fit_a, parts.fit_b, by)
    probe = _probe(weights, engine.facts.layers, by, last)
    a, b = (_scores(engine, side, probe, batch_size, told) for side in _dev(sets))
    threshold = choose_threshold(a, b, false_alarms)
    gate = Gate(probe, threshold)
    generators = [np.random.default_rng([seed, number]) for number in range(CONTROLS)]
    evidence = GateEvidence(
        source=source,
        data_hash=sets.data_hash,
        fit_opens=len(sets.fit.a),
        fit_keeps_shut=len(sets.fit.b),
        false_alarms=false_alarms,
        opens=opened_of([gate.opens(float(score)) for score in a]),
        keeps_shut=opened_of([gate.opens(float(score)) for score in b]),
        auc=auc_with_interval(a, b, seed),
        shuffled=spread(np.array([shuffled_auc(parts, by, g) for g in generators])),
        random=spread(np.array([random_auc(parts, by, weights, g) for g in generators])),
        seed=seed,
        versions=installed_versions(),
        command=command,
    )
    _warn_of_chance(evidence)
    return Gate(probe, threshold, evidence)


def fitted(a: Read, b: Read, by: By) -> Float[np.ndarray, "layer number"]:
    """The probe's weights, 0 where it does not look; MoesteerError where the sides are alike."""
    difference = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    if not difference.any():
        raise MoesteerError(
            "what is read of both sets of prompts is the same on average, so nothing can tell them"
            " apart. Do they differ?"
        )
    if by == "routing":
        size = np.abs(difference)
        least = np.sort(size, axis=None)[::-1][: STRONGEST + 1][-1] if size.size > STRONGEST else 0
        kept = np.where(size > least, difference, 0.0)
        return kept if kept.any() else difference  # all as strong
    there = difference.any(-1)  # where all prompts are read alike, there is no direction
    layer = int(np.argmax(np.where(there, _separations(a, b), -np.inf)))
    weights = np.zeros_like(difference)
    weights[layer] = difference[layer] / np.linalg.norm(difference[layer])
    return weights


def shuffled_auc(parts: Parts, by: By, generator: np.random.Generator) -> float:
    """The AUC of a probe fitted in the same way where the labels of all prompts are shuffled.

    Those of the dev prompts, too: a direction that is fitted to wrong labels still lies where the
    prompts differ most, and tells the right ones apart, either way round.
    """
    fit, dev = (
        _dealt(a, b, generator) for a, b in ((parts.fit_a, parts.fit_b), (parts.dev_a, parts.dev_b))
    )
    return _auc(dev, fitted(*fit, by))


def random_auc(
    parts: Parts,
    by: By,
    weights: Float[np.ndarray, "layer number"],
    generator: np.random.Generator,
) -> float:
    """The AUC of the same weights dealt to random experts, or of a random vector in the same layer,
    either of them turned the way that suits the fit prompts."""
    if by == "routing":
        drawn = generator.permuted(weights.ravel()).reshape(weights.shape)
    else:
        drawn = np.where(weights.any(-1, keepdims=True), generator.normal(size=weights.shape), 0)
    suits = _auc((parts.fit_a, parts.fit_b), drawn) >= 0.5
    return _auc((parts.dev_a, parts.dev_b), drawn if suits else -drawn)


def _dealt(a: Read, b: Read, generator: np.random.Generator) -> tuple[Read, Read]:
    """Two sides of the same sizes, of which neither is one of these."""
    pooled = generator.permutation(np.concatenate([a, b]))
    return pooled[: len(a)], pooled[len(a) :]


def _auc(sides: tuple[Read, Read], weights: Float[np.ndarray, "layer number"]) -> float:
    return area_under_curve(*(_linear(side, weights) for side in sides))


def _separations(a: Read, b: Read) -> Float[np.ndarray, " layer"]:
    """By layer: how far apart the sides of one half of the prompts lie along the difference of the
    other half's means, in standard deviations; the mean of both ways round."""
    found = []
    halves = (slice(0, None, 2), slice(1, None, 2))
    for one, other in (halves, halves[::-1]):
        line = a[one].mean(0, dtype=np.float64) - b[one].mean(0, dtype=np.float64)
        along = [np.einsum("plh,lh->pl", side[other], line) for side in (a, b)]
        apart = along[0].mean(0) - along[1].mean(0)
        width = np.sqrt((along[0].var(0) + along[1].var(0)) / 2)
        found.append(np.divide(apart, width, out=np.zeros_like(apart), where=width > 0))
    return np.mean(found, axis=0)


def _linear(read: Read, weights: Float[np.ndarray, "layer number"]) -> Float[np.ndarray, " prompt"]:
    return np.einsum("plh,lh->p", read, weights)


def _read(
    engine: "Engine",
    prompts: Sequence[Sequence[int]],
    by: By,
    last: int | None,
    batch_size: int,
    told: Callable[[int], None],
) -> Read:
    """What the unsteered model makes of prompts; those of similar length share a batch."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [prompts[number] for number in chosen]
        if by == "routing":
            read = selection_shares(engine, batch, last)
        else:
            read = engine.residuals(batch, -POSITION)[:, :, 0]
        if not np.isfinite(read).all():
            raise MoesteerError(
                f"what {engine.facts.id} computes of a prompt is NaN or infinite; load it in"
                " another dtype (--dtype float32 or bfloat16)."
            )
        found |= dict(zip(chosen, read, strict=True))
        told(len(chosen))
    return np.stack([found[number] for number in range(len(prompts))])


def _probe(
    weights: Float[np.ndarray, "layer number"],
    layers: "Sequence[LayerShape]",
    by: By,
    last: int | None,
) -> Probe:
    if by == "routing":
        rows, experts = np.nonzero(weights)
        places = [(layers[int(row)].layer, int(e)) for row, e in zip(rows, experts, strict=True)]
        return RoutingProbe(tuple(places), tuple(weights[rows, experts].tolist()), last)
    layer = int(np.abs(weights).sum(-1).argmax())
    return DirectionProbe(layer, POSITION, tuple(weights[layer].tolist()))


def _dev(sets: "PromptSets") -> "tuple[tuple[AskedPrompt, ...], ...]":
    return sets.validation.a, sets.validation.b


def _scores(
    engine: "Engine",
    prompts: "Sequence[AskedPrompt]",
    probe: Probe,
    batch_size: int,
    told: Callable[[int], None],
) -> Float[np.ndarray, " prompt"]:
    """As the gate will score them, which is not how they were read to fit it."""
    found = scores(engine, [prompt.ids for prompt in prompts], probe, batch_size)
    told(len(prompts))
    return found


def _warn_of_chance(seen: GateEvidence) -> None:
    if seen.auc.value <= seen.shuffled.high:
        warnings.warn(
            "the gate tells the dev prompts apart no better than one whose prompts had shuffled"
            f" labels: AUC {seen.auc.value:.2f}, with these up to {seen.shuffled.high:.2f}.",
            MoesteerWarning,
            stacklevel=3,
        )
    if not seen.opens.opened:
        warnings.warn(
            f"none of the {seen.opens.prompts} dev prompts that are to open the gate does: nothing"
            " like them will be steered.",
            MoesteerWarning,
            stacklevel=3,
        )
