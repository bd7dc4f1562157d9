"""What an engine says of the testbed: one number or text for each thing that it can do."""

from collections.abc import Callable
from typing import Any

import numpy as np

from moesteer import testbed
from moesteer.chat import TokenisedConversation
from moesteer.direction import Direction
from moesteer.engines.base import Engine
from moesteer.engines.readouts import Readout, Term
from moesteer.profile import Profile

TEXT = "<|user|>How do I clean a copper lantern? Then count to 3.<|assistant|>"
PLANTED = testbed.ground_truth().behaviours["refusal"].planted
UP, DOWN = Profile(activated=PLANTED, name="up"), Profile(deactivated=PLANTED, name="down")
VECTOR = tuple(np.random.default_rng(0).normal(size=128).tolist())
DIRECTED = Profile(
    directions=(
        Direction(VECTOR, tuple((n, "attention") for n in range(4)), "ablate"),
        Direction(VECTOR, ((2, "mlp"),), coefficient=2.0, expert=5),
    ),
    name="directed",
)


def routing(engine: Engine) -> dict[str, Any]:
    """Counts, replies, what the profiles did, log-probabilities, and the stream."""
    ids = tuple(engine.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    texts = [TokenisedConversation(ids, (True,) * len(ids))]
    texts.append(TokenisedConversation(ids[:9], (False,) * 4 + (True,) * 5))
    generated = engine.generate([TEXT] * 4, [None, UP, DOWN, DIRECTED], max_new_tokens=8)
    return {
        "counts": engine.count_selections(texts, "top-k"),
        "first": engine.count_selections(texts, "top-1"),
        "probabilities": engine.count_selections(texts, "probability"),
        "replies": generated.replies,
        "obeyed": [(seen.layer, seen.obeyed, seen.tokens) for seen in generated.evidence],
        "read": engine.read([readout(ids)], [None, UP, DOWN, DIRECTED]),
        "divergence": engine.divergence(texts, UP),
        "residuals": engine.residuals([ids], 3),
        "forced": engine.forced_outputs([ids], 2, 2),
        "own": engine.own_outputs([ids], 2, 2)[0],
        "contributions": engine.contributions([ids], 2, VECTOR).experts,
        "gates": engine.gate_gradients([readout(ids)]),
    }


def attribution(engine: Engine) -> dict[str, Any]:
    """What rationales are made of."""
    ids = tuple(engine.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    asked = [readout(ids)]
    return {
        "gradients": [g.gradient.numpy() for _, g in engine.token_gradients(asked, DOWN)],
        "again": [g.gradient.numpy() for _, g in engine.token_gradients(asked, checkpointing=True)],
        "maps": [found.numpy() for _, found in engine.attention_maps(asked)],
        "integrated": [
            found.numpy() for _, found, _ in engine.integrated_gradients(asked, [[1, 2]], steps=8)
        ],
        "weighed": engine.weigh_selections([ids], np.arange(64.0).reshape(4, 16)),
    }


def readout(ids: tuple[int, ...]) -> Readout:
    return Readout(ids, (Term(9, 7, 1.0), Term(len(ids), 8, -0.5)))


def check_alike(
    ours: dict[str, Any], theirs: dict[str, Any], same: Callable[[Any, Any, str], object]
) -> None:
    assert list(ours) == list(theirs)
    for what, mine in ours.items():
        if what in ("replies", "obeyed", "counts", "first"):  # never but exactly
            assert np.array_equal(np.array(mine), np.array(theirs[what])), what
        elif isinstance(theirs[what], list):
            for one, other in zip(mine, theirs[what], strict=True):
                same(one, other, what)
        else:
            same(mine, theirs[what], what)
