"""Which experts carry a behaviour: each switched off alone, and whether that goes beyond damage.

Intuition: losing any expert moves any decision a little, so that a small q says little (see
`detection/effects.py`). An expert is *named* only where its loss takes more of the behaviour away
than the loss of any expert moves decisions that are not about it:

    effect   mean over pairs of R − R(expert off), with R the log-odds of A's token against B's
             where the pair parts (`detection/decision.py`), in nats
    sham     the same for decisions within one side: after a pair's prompt, its own reply against
             another pair's reply of the same side, so that both show the behaviour or neither does
    reach    the largest |mean sham effect| of any expert
    named    q < 0.05, and the lower end of the effect's interval is beyond the reach

It *holds* where its interval is beyond the reach on held-out pairs, too. Beside it stands what is
no matter of nats: on how many of the pairs that the model decides for A it then decides for B.

The rule errs on the safe side: an expert that the whole model hangs on makes the reach so long that
nobody is named, and experts that stand in for each other have small effects alone, however much
they carry together. What happens when several are lost is in `robustness.py`.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float

from moesteer.auditing.concentration import Concentration, concentration
from moesteer.chat import tokenise_pairs
from moesteer.contrast import ContrastPair, Conversation, Message, Span, read_pairs
from moesteer.detection.decision import REMEDY, pair_readouts
from moesteer.detection.detect import detect, existing_experts
from moesteer.detection.effects import INTERVAL, effect_scores
from moesteer.detection.knocking import knock, knocking_cost
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.profile import Expert, Profile

if TYPE_CHECKING:
    from moesteer.chat import TokenisedPair
    from moesteer.engines.base import Engine
    from moesteer.engines.readouts import Readout
    from moesteer.runs import Run

KNOCK_OUT = "knock-out"
FALSE_DISCOVERIES = 0.05
DEV_SHARE = 0.25
"""Of the user's own pairs; on the others effects are measured."""
CHECKED = 10
"""So many experts of the largest effects are measured on held-out pairs, and all named ones."""

ChatOptions = Mapping[str, bool | int | float | str]


@dataclass(frozen=True)
class Held:
    """The effect on held-out pairs, in nats; `holds`: its interval is beyond the reach."""

    effect: float
    low: float
    high: float
    holds: bool


@dataclass(frozen=True)
class ExpertEffect:
    """What the loss of one expert does, in nats; `turned` pairs then go with B instead of A.

    `knock_in` is what its activation adds. `held` is None where it was not measured.
    """

    layer: int
    expert: int
    effect: float
    low: float
    high: float
    q: float
    sham: float
    knock_in: float
    turned: int
    named: bool
    held: Held | None

    @property
    def place(self) -> Expert:
        """(layer, expert)."""
        return self.layer, self.expert


@dataclass(frozen=True)
class Importance:
    """Experts by falling effect, measured on `pairs` pairs, of which the model decides `going` for
    A, and `shams` decisions that are not about the behaviour; `held_out` pairs check them.

    Experts of layers that were not gone into are left out.
    """

    source: str
    pairs: int
    going: int
    shams: int
    held_out: int
    reach: float
    reach_of: Expert
    experts: tuple[ExpertEffect, ...]
    behaviour: Concentration
    sham: Concentration

    @property
    def named(self) -> tuple[ExpertEffect, ...]:
        """The experts that carry the behaviour, by falling effect."""
        return tuple(expert for expert in self.experts if expert.named)


@dataclass(frozen=True)
class Decisions:
    """What is read: of fit pairs, of decisions made from them that are not about the behaviour, and
    of held-out pairs."""

    source: str
    pairs: Sequence[ContrastPair]
    readouts: "Sequence[tuple[Readout, ...]]"
    shams: "Sequence[tuple[Readout, ...]]"
    held_out: "Sequence[tuple[Readout, ...]]"

    def cost(self, engine: "Engine", into: int | None) -> str:
        """What switching every expert on and off takes, in words."""
        cost = knocking_cost(engine.facts.layers, self.readouts, _apart(self.shams), into)
        layers = len(engine.facts.layers)
        where = "all layers" if cost.layers == layers else f"{cost.layers} of {layers} layers"
        return (
            f"switching every expert of {where} off and on: {cost.texts:,} forward passes of one"
            f" text, {cost.tokens:,} tokens"
        )


def fit_and_dev(source: str) -> tuple[list[ContrastPair], list[ContrastPair]]:
    """Pairs to measure on, and pairs to see whether it holds.

    Of `testbed:BEHAVIOUR` its fit and dev split; of others a quarter is held out, by a hash of the
    prompt. MoesteerError where one of the two is empty.
    """
    if source.startswith("testbed:") and source.count(":") == 1:
        return read_pairs(source), read_pairs(f"{source}:dev")
    pairs = read_pairs(source)
    fit = [pair for pair in pairs if not _is_dev(pair)]
    dev = [pair for pair in pairs if _is_dev(pair)]
    if not fit or not dev:
        raise MoesteerError(
            f"{source}: of its {len(pairs)} pairs {len(fit)} would be measured on and {len(dev)}"
            " held out, by a hash of the prompt; give more pairs."
        )
    return fit, dev


def read_decisions(
    engine: "Engine",
    source: str,
    fit: Sequence[ContrastPair],
    dev: Sequence[ContrastPair],
    chat_options: ChatOptions,
) -> Decisions:
    """The readouts of pairs to measure on and of held-out ones; `source` names both.

    Raises MoesteerError where the replies of a pair don't part, and where all replies of a side
    are alike, so that there are no decisions that are not about the behaviour.
    """
    readouts = _readouts(engine, fit, chat_options)
    towards_a = _values(engine, readouts) > 0
    shams = _sham_readouts(engine, fit, towards_a.tolist(), chat_options)
    if not shams:
        raise MoesteerError(
            f"{source}: all replies of a side are alike in the {len(fit)} pairs that are used, so"
            " there are no decisions that are not about the behaviour to compare with; give pairs"
            " with more than one reply of a side, or use more of them (--pairs-used)."
        )
    return Decisions(source, fit, readouts, shams, _readouts(engine, dev, chat_options))


def measure_importance(
    engine: "Engine",
    decisions: Decisions,
    *,
    into: int | None,
    run: "Run",
    chat_options: ChatOptions,
    command: str,
    progress: Callable[[int, int], None] | None,
) -> tuple[Importance, Profile]:
    """Every expert's effect, who is named, and how concentrated it is; and the effects as a profile
    with scores. What the run holds is not measured again."""
    with warnings.catch_warnings():
        # Targets of unequal length mislead counts; here they only say how often experts are used.
        warnings.simplefilter("ignore", MoesteerWarning)
        counted = detect(
            engine, decisions.pairs, chat_options=chat_options, source=decisions.source
        )
    assert counted.scores is not None
    found = knock(
        engine,
        decisions.readouts,
        beside=_apart(decisions.shams),
        into=into,
        run=run,
        progress=progress,
    )
    rates = np.stack([counted.scores.rate_a, counted.scores.rate_b])
    exists = existing_experts(engine.facts.layers)
    scores = effect_scores(found.knock_out, rates, exists)
    entered = exists & ~np.isnan(found.knock_out).any(0)
    # A group of one sham decision each: its mean change is the decision's own.
    sham = -np.stack([change[0] for change in found.beside.values()])
    mean_sham = sham.mean(0)
    furthest = np.unravel_index(
        np.argmax(np.where(entered, np.abs(mean_sham), -1)), mean_sham.shape
    )
    reach = float(abs(mean_sham[furthest]))
    unsteered = _values(engine, decisions.readouts)
    off = unsteered[:, None, None] - found.knock_out
    turned = ((unsteered > 0)[:, None, None] & (off < 0)).sum(0)
    layers = engine.facts.layers
    experts = [
        ExpertEffect(
            layers[row].layer,
            expert,
            *(float(getattr(scores, key)[row, expert]) for key in ("value", "low", "high", "q")),
            sham=float(mean_sham[row, expert]),
            knock_in=float(found.knock_in[:, row, expert].mean()),
            turned=int(turned[row, expert]),
            named=bool(
                scores.q[row, expert] < FALSE_DISCOVERIES and scores.low[row, expert] > reach
            ),
            held=None,
        )
        for row, expert in zip(*map(np.ndarray.tolist, np.nonzero(entered)), strict=True)
    ]
    experts.sort(key=lambda expert: (-expert.effect, expert.place))
    importance = Importance(
        decisions.source,
        len(decisions.readouts),
        int((unsteered > 0).sum()),
        len(sham),
        len(decisions.held_out),
        reach,
        (layers[int(furthest[0])].layer, int(furthest[1])),
        tuple(_checked(engine, experts, decisions, reach, run)),
        concentration(found.knock_out[:, entered]),
        concentration(sham[:, entered]),
    )
    assert counted.evidence is not None
    evidence = replace(
        counted.evidence,
        detector=KNOCK_OUT,
        counted=None,
        interval=f"{INTERVAL}; read: the token where the sides part",
        stability=None,
        command=command,
    )
    name = f"{KNOCK_OUT} on {decisions.source}"
    return importance, replace(counted, evidence=evidence, scores=scores, name=name)


def _checked(
    engine: "Engine",
    experts: Sequence[ExpertEffect],
    decisions: Decisions,
    reach: float,
    run: "Run",
) -> list[ExpertEffect]:
    """The experts, the named and the first of them with their effects on held-out pairs."""
    chosen = [e for rank, e in enumerate(experts) if e.named or rank < CHECKED]
    known = {(r["layer"], r["expert"]): r["effects"] for r in run.lines("held")}
    missing = [expert for expert in chosen if expert.place not in known]
    if missing:
        without = [Profile(deactivated=(e.place,), name=f"without {e.place}") for e in missing]
        values = _values(engine, decisions.held_out, [None, *without])
        for expert, effects in zip(missing, values[0] - values[1:], strict=True):
            known[expert.place] = effects.tolist()
            about = {"layer": expert.layer, "expert": expert.expert}
            run.add("held", [about | {"effects": effects.tolist()}])
    table = np.array([known[expert.place] for expert in chosen]).T[:, None, :]
    scores = effect_scores(table, np.zeros((2, *table.shape[1:])), np.ones(table.shape[1:], bool))
    held = {
        expert.place: Held(value, low, high, low > reach)
        for expert, value, low, high in zip(
            chosen,
            scores.value[0].tolist(),
            scores.low[0].tolist(),
            scores.high[0].tolist(),
            strict=True,
        )
    }
    return [replace(expert, held=held.get(expert.place)) for expert in experts]


# -- readouts ------------------------------------------------------------------------------------


def _readouts(
    engine: "Engine", pairs: Sequence[ContrastPair], chat_options: ChatOptions
) -> "list[tuple[Readout, ...]]":
    try:
        return [pair_readouts(pair) for pair in _tokenised(engine, pairs, chat_options)]
    except MoesteerError as error:
        need = "An audit reads where replies part: give pairs of one prompt and two replies."
        raise MoesteerError(str(error).replace(REMEDY, need)) from error.__cause__


def _sham_readouts(
    engine: "Engine",
    pairs: Sequence[ContrastPair],
    towards_a: Sequence[bool],
    chat_options: ChatOptions,
) -> "list[tuple[Readout, ...]]":
    """A decision within a side for each pair that has one: where it can be, the side that the model
    goes with, as there it has something to lose."""
    found = []
    for number, goes in enumerate(towards_a):
        sides: tuple[Literal["a", "b"], ...] = ("a", "b") if goes else ("b", "a")
        others = [*pairs[number + 1 :], *pairs[:number]]
        candidates = (
            readout
            for side in sides
            for other in _distinct(getattr(pairs[number], side), [getattr(o, side) for o in others])
            if (readout := _sham(engine, getattr(pairs[number], side), other, chat_options))
        )
        found += [readout] if (readout := next(candidates, None)) else []
    return found


def _sham(
    engine: "Engine", own: Conversation, other: Conversation, chat_options: ChatOptions
) -> "tuple[Readout, ...] | None":
    """Own reply against another's after the same prompt; None where they part in no token."""

    def after_own_prompt(reply: str) -> Conversation:
        messages = (*own.messages[:-1], Message("assistant", reply))
        return Conversation(messages, "reply", (Span(len(messages) - 1, 0, len(reply)),))

    a, b = (after_own_prompt(side.messages[-1].content.strip()) for side in (own, other))
    try:
        (pair,) = _tokenised(engine, [ContrastPair(a, b, "sham")], chat_options)
        return pair_readouts(pair)
    except MoesteerError:
        return None


def _distinct(own: Conversation, others: Sequence[Conversation]) -> list[Conversation]:
    """One conversation for each of the others' replies that is not the own one."""
    by_reply = {other.messages[-1].content.strip(): other for other in reversed(others)}
    by_reply.pop(own.messages[-1].content.strip(), None)
    return list(reversed(by_reply.values()))


def _tokenised(
    engine: "Engine", pairs: Sequence[ContrastPair], chat_options: ChatOptions
) -> "list[TokenisedPair]":
    options = dict(chat_options)
    return tokenise_pairs(
        pairs, engine.tokenizer, chat_options=options, max_tokens=engine.max_tokens
    )


def _values(
    engine: "Engine",
    readouts: "Sequence[tuple[Readout, ...]]",
    profiles: "Sequence[Profile | None]" = (None,),
) -> Float[np.ndarray, "*some pair"]:
    """Of each pair's one readout; without profiles no axis for them."""
    values = engine.read([readout for (readout,) in readouts], profiles)
    return values if len(profiles) > 1 else values[0]


def _apart(shams: "Sequence[tuple[Readout, ...]]") -> "dict[str, list[tuple[Readout, ...]]]":
    """Each a group of its own, so that its own effects are kept."""
    return {f"sham {number}": [sham] for number, sham in enumerate(shams)}


def _is_dev(pair: ContrastPair) -> bool:
    asked = [message for message in pair.a.messages if message.role != "assistant"]
    digest = hashlib.blake2b(repr(asked).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < DEV_SHARE
