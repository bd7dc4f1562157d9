"""Detectors side by side: does what routing shows agree with what interventions show?

Every detector that counts routing, and three that ask for causes, score the same experts on the
same pairs. Knock-out is the measure: a detector agrees with it as far as it ranks experts alike
(Spearman's ρ, of the scores and of their sizes) and names the same strongest ones. That counted
routing need not agree is a finding of arXiv 2606.10703 and 2606.04160 ("detection is not
response"). Where experts were planted, as in the testbed, it is also seen who finds them.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from moesteer.chat import TokenisedPair, tokenise_pairs
from moesteer.contrast import ContrastPair, Conversation, Message, Span
from moesteer.detection.decision import Over, pair_readouts, side_readout
from moesteer.detection.detect import detect, existing_experts
from moesteer.detection.detectors import DETECTORS
from moesteer.detection.effects import INTERVAL, effect_scores
from moesteer.detection.gate_gradient import gate_gradient
from moesteer.detection.knocking import Cost, knock, knocking_cost
from moesteer.detection.significance import false_discovery_rate
from moesteer.errors import MoesteerError
from moesteer.files import write_text
from moesteer.model_facts import LayerShape
from moesteer.profile import Expert, Profile, Scores
from moesteer.records import Record, Text, check_record, read_records

if TYPE_CHECKING:
    from moesteer.engines.base import Engine
    from moesteer.engines.readouts import Readout
    from moesteer.runs import Run
    from moesteer.testbed import PlantedBehaviour

KNOCK_OUT, KNOCK_IN, EITHER, GRADIENT = "knock-out", "knock-in", "larger-knock", "gate-gradient"
TITLES = {
    KNOCK_OUT: "knock-out",
    KNOCK_IN: "knock-in",
    EITHER: "the larger of the two",
    GRADIENT: "gate gradient",
} | {name: f"{detector.title} ({detector.counted})" for name, detector in DETECTORS.items()}

STRONGEST = 10
"""How many of the strongest experts are compared where none are known to be planted."""


@dataclass(frozen=True)
class Agreement:
    """A detector beside knock-out: ρ of the scores and of their sizes, and how many of the m
    strongest experts both name. None where a detector scores all experts alike."""

    signed: float | None
    size: float | None
    shared: int


@dataclass(frozen=True)
class Recovery:
    """Planted experts among as many of the strongest (precision and recall are equal there), and
    where planted ones and decoys rank, by size of score."""

    found: int
    precision: float
    recall: float
    planted: tuple[int, ...]
    decoys: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class DetectorComparison:
    """Scores of every detector, and what came of comparing them.

    `counted` is what counting found first, whose model and data are those of all; `entered` marks
    the experts that were knocked out and in; `beside` holds mean changes of other readouts in nats,
    [0] knocked out and [1] knocked in.
    """

    counted: Profile
    layers: tuple[LayerShape, ...]
    pairs: int
    over: Over
    strongest: int
    scores: Mapping[str, Scores]
    entered: Bool[np.ndarray, "layer expert"]
    beside: Mapping[str, Float[np.ndarray, "2 layer expert"]]
    agreement: Mapping[str, Agreement]
    recovery: Mapping[str, Recovery]


@dataclass(frozen=True)
class Measurement:
    """What causal detectors read: of each pair, and of others beside them, by name."""

    readouts: "list[tuple[Readout, ...]]"
    beside: "dict[str, list[tuple[Readout, ...]]]"


def measurement(
    engine: "Engine",
    pairs: Sequence[ContrastPair],
    *,
    over: Over = "decision",
    beside: Mapping[str, Sequence[ContrastPair]] | None = None,
    neutral: Sequence[ContrastPair] = (),
    chat_options: Mapping[str, bool | int | float | str] | None = None,
) -> Measurement:
    """The readouts of all pairs; MoesteerError where a pair has none of that kind.

    Of `neutral` texts (see `read_neutral`) it is the mean log-probability of their replies.
    """
    if not pairs:
        raise MoesteerError("there are no contrast pairs to compare detectors on.")

    def tokenised(some: Sequence[ContrastPair]) -> list[TokenisedPair]:
        options = dict(chat_options or {})
        return tokenise_pairs(
            some, engine.tokenizer, chat_options=options, max_tokens=engine.max_tokens
        )

    others = {
        name: [pair_readouts(pair, over) for pair in tokenised(some)]
        for name, some in (beside or {}).items()
    }
    if neutral:
        others["neutral"] = [(side_readout(text, "a"),) for text in tokenised(neutral)]
    return Measurement([pair_readouts(pair, over) for pair in tokenised(pairs)], others)


def compare_detectors(
    engine: "Engine",
    pairs: Sequence[ContrastPair],
    measured: Measurement,
    *,
    over: Over = "decision",
    into: int | None = None,
    truth: "PlantedBehaviour | None" = None,
    chat_options: Mapping[str, bool | int | float | str] | None = None,
    run: "Run | None" = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DetectorComparison:
    """Run every detector on the same pairs and compare them; `measured` is of these pairs.

    `into` layers are knocked (see `knock`), `truth` says what was planted. With a `run` the
    knocking is taken up where it was, and the result written to its folder.
    """
    shapes = engine.facts.layers
    profiles = {
        name: detect(engine, pairs, name, chat_options=chat_options, seed=seed)
        for name in DETECTORS
    }
    scores = {name: _checked(profile.scores) for name, profile in profiles.items()}
    first = next(iter(scores.values()))
    rates, exists = np.stack([first.rate_a, first.rate_b]), existing_experts(shapes)
    gradients = gate_gradient(engine, measured.readouts)
    effects = knock(
        engine, measured.readouts, beside=measured.beside, into=into, run=run, progress=progress
    )
    entered = exists & ~np.isnan(effects.knock_out[0])
    out = effect_scores(effects.knock_out, rates, exists, seed=seed)
    inward = effect_scores(effects.knock_in, rates, exists, seed=seed)
    causal = {KNOCK_OUT: out, KNOCK_IN: inward, EITHER: larger(out, inward, entered)}
    causal[GRADIENT] = effect_scores(gradients, rates, exists, seed=seed)
    scores = causal | scores
    strongest = min(len(truth.planted) if truth else STRONGEST, int(entered.sum()))
    result = DetectorComparison(
        next(iter(profiles.values())),
        shapes,
        len(pairs),
        over,
        strongest,
        scores,
        entered,
        effects.beside,
        {name: agreement(found, out, entered, strongest) for name, found in scores.items()},
        {name: recovery(found, shapes, truth) for name, found in scores.items()} if truth else {},
    )
    if run:
        text = json.dumps(as_json(result), ensure_ascii=False, indent=1)
        write_text(run.folder / "summary.json", text + "\n")
    return result


def causal_profiles(
    result: DetectorComparison, *, source: str, command: str = ""
) -> dict[str, Profile]:
    """The scores of knock-out, knock-in and gate gradient as profiles, to select experts by."""
    counted = result.counted
    assert counted.evidence is not None
    read = {"decision": "the token where the sides part", "span": "the whole targets"}[result.over]
    evidence = replace(
        counted.evidence,
        counted=None,
        source=source,
        interval=f"{INTERVAL}; read: {read}",
        stability=None,
        command=command,
    )
    return {
        name: replace(
            counted,
            evidence=replace(evidence, detector=name),
            scores=result.scores[name],
            name=f"{name} on {source}",
        )
        for name in (KNOCK_OUT, KNOCK_IN, GRADIENT)
    }


def larger(out: Scores, into: Scores, entered: Bool[np.ndarray, "layer expert"]) -> Scores:
    """Of each expert's knock-out and knock-in, the one of larger size; p counts for two tests."""
    chosen = np.abs(out.value) >= np.abs(into.value)

    def pick(key: str) -> np.ndarray:
        return np.where(chosen, getattr(out, key), getattr(into, key))

    p = np.minimum(1.0, 2 * np.minimum(out.p, into.p))
    q = false_discovery_rate(p, entered)
    return Scores(pick("value"), pick("low"), pick("high"), p, q, out.rate_a, out.rate_b)


def agreement(
    found: Scores, out: Scores, entered: Bool[np.ndarray, "layer expert"], strongest: int
) -> Agreement:
    """How far a detector agrees with knock-out on the experts that were knocked."""
    one, other = found.value[entered], out.value[entered]
    tops = [set(np.argsort(-np.abs(v), kind="stable")[:strongest].tolist()) for v in (one, other)]
    return Agreement(
        _spearman(one, other), _spearman(np.abs(one), np.abs(other)), len(tops[0] & tops[1])
    )


def recovery(found: Scores, layers: Sequence[LayerShape], truth: "PlantedBehaviour") -> Recovery:
    """Who ranks where by size of score; equal ones in layer and expert order."""
    size = {
        (shape.layer, expert): abs(float(found.value[row, expert]))
        for row, shape in enumerate(layers)
        for expert in range(shape.experts)
    }
    order = sorted(size, key=lambda place: (-size[place], place))
    rank = {place: number for number, place in enumerate(order, start=1)}
    planted = tuple(sorted(rank[place] for place in truth.planted))
    hits = sum(number <= len(planted) for number in planted)
    share = hits / len(planted)
    return Recovery(hits, share, share, planted, tuple(sorted(rank[d] for d in truth.decoys)))


def as_json(result: DetectorComparison) -> dict[str, Any]:
    """All of it for programs: of each detector every expert's score, and how it compares."""

    def experts(found: Scores, causal: bool) -> list[dict[str, Any]]:
        return [
            {"layer": layer, "expert": expert}
            | {k: float(getattr(found, k)[row, expert]) for k in ("value", "low", "high", "p", "q")}
            for row, layer, expert in cells(result)
            if result.entered[row, expert] or not causal
        ]

    beside = {
        name: [
            {"layer": layer, "expert": expert}
            | {KNOCK_OUT: float(table[0, row, expert]), KNOCK_IN: float(table[1, row, expert])}
            for row, layer, expert in cells(result)
            if result.entered[row, expert]
        ]
        for name, table in result.beside.items()
    }
    knocked = (KNOCK_OUT, KNOCK_IN, EITHER)
    detectors = {
        name: {
            "title": TITLES[name],
            "scores": experts(found, name in knocked),
            "agreement": asdict(result.agreement[name]),
            "recovery": asdict(result.recovery[name]) if name in result.recovery else None,
        }
        for name, found in result.scores.items()
    }
    facts = {"pairs": result.pairs, "over": result.over, "strongest": result.strongest}
    return facts | {"detectors": detectors, "beside": beside}


def cells(result: DetectorComparison) -> list[tuple[int, int, int]]:
    """(row of the tables, layer, expert) of every expert there is."""
    return [(row, s.layer, e) for row, s in enumerate(result.layers) for e in range(s.experts)]


def cost_of(engine: "Engine", measured: Measurement, into: int | None) -> Cost:
    """What the knocking will take."""
    return knocking_cost(engine.facts.layers, measured.readouts, measured.beside, into)


def drawn(pairs: Sequence[ContrastPair], number: int | None) -> list[ContrastPair]:
    """`number` of the pairs at random, always the same; all without one or where there are no more.

    At random, because pairs in a file often take turns: every fourth may be all of one kind.
    Raises MoesteerError for a number below 1.
    """
    if number is not None and number < 1:
        raise MoesteerError(f"{number} pairs are to be used; give at least 1.")
    if number is None or number >= len(pairs):
        return list(pairs)
    chosen = sorted(random.Random(0).sample(range(len(pairs)), number))
    return [pairs[i] for i in chosen]


def read_neutral(source: str) -> list[ContrastPair]:
    """Texts on which no behaviour shows: `{"prompt": …, "reply": …}` a line; both sides the same.

    Raises MoesteerError, with file and line, where one is malformed.
    """
    texts = []
    for where, record in read_records(source, required=("prompt", "reply")):
        read = check_record(_PromptAndReply, record, where)
        reply = read.reply.strip()
        messages = (Message("user", read.prompt), Message("assistant", reply))
        text = Conversation(messages, "reply", (Span(1, 0, len(reply)),))
        texts.append(ContrastPair(text, text, where))
    return texts


def planted_in(model: str, pairs: str) -> "PlantedBehaviour | None":
    """What is known of the experts behind `testbed:BEHAVIOUR` pairs in the planted testbed."""
    from moesteer.testbed import ground_truth

    if model != "testbed" or not pairs.startswith("testbed:"):
        return None
    return ground_truth().behaviours.get(pairs.split(":")[1])


def marks_of(truth: "PlantedBehaviour | None") -> dict[Expert, str]:
    """A word for each expert of which something is known."""
    if truth is None:
        return {}
    return dict.fromkeys(truth.planted, "planted") | dict.fromkeys(truth.decoys, "decoy")


class _PromptAndReply(Record):
    prompt: Text
    reply: Text


def _checked(scores: Scores | None) -> Scores:
    assert scores is not None, "detection gives scores"
    return scores


def _spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    from scipy.stats import spearmanr

    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(spearmanr(one, other)[0])  # pyright: ignore[reportArgumentType]
