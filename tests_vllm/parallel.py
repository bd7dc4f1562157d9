"""The testbed on several workers: `python parallel.py OUT KEY=VALUE…`, options of the engine."""

import json
import sys
from pathlib import Path

import numpy as np
from engine import steerable
from saying import prompts

from moesteer import testbed
from moesteer.chat import TokenisedConversation
from moesteer.direction import Direction
from moesteer.engines.base import Engine
from moesteer.engines.evidence import DirectionEvidence
from moesteer.engines.readouts import Readout, Term
from moesteer.options import parse_options
from moesteer.profile import Profile

TEXTS = ["<|user|>How do I clean a copper lantern?<|assistant|>", "<|user|>Count to 3."] * 2

VECTOR = tuple(np.random.default_rng(0).normal(size=128).tolist())
LAYERS = range(4)
DIRECTED = Profile(
    directions=(
        Direction(VECTOR, tuple((n, "attention") for n in LAYERS), "ablate", window="prompt"),
        Direction(VECTOR[::-1], ((0, "mlp"), (3, "input")), coefficient=0.3),
        Direction(VECTOR, ((2, "mlp"),), coefficient=2.0, expert=5),
    )
)


def said_by(engine: Engine) -> dict[str, object]:
    """Counts, and replies, evidence and readouts of several profiles at once."""
    planted = testbed.ground_truth().behaviours["refusal"].planted
    profiles = [None, Profile(activated=planted), Profile(deactivated=planted), DIRECTED]
    texts = [TokenisedConversation(tuple(ids), (True,) * len(ids)) for ids in prompts()]
    generated = engine.generate(TEXTS, profiles, max_new_tokens=12)
    directed = [seen for seen in generated.evidence if isinstance(seen, DirectionEvidence)]
    readout = Readout(texts[1].ids, (Term(9, 7, 1.0), Term(17, 8, 1.0)))
    return {
        "counts": engine.count_selections(texts, "top-k").tolist(),
        "probabilities": np.round(engine.count_selections(texts, "probability"), 4).tolist(),
        "replies": generated.replies,
        "obeyed": sorted([e.layer, e.obeyed, e.tokens > 0] for e in generated.evidence),
        "moved": sorted(seen.measured for seen in directed if seen.expert is None),
        "read": engine.read([readout], profiles).tolist(),
        "divergence": engine.divergence(texts[1:2], Profile(activated=planted)).tolist(),
    }


def main(out: str, *options: str) -> None:
    given = parse_options(options, "engine option", "tensor_parallel_size=2")
    with steerable("testbed", [DIRECTED], **given) as engine:
        Path(out).write_text(json.dumps(said_by(engine)))


if __name__ == "__main__":
    main(*sys.argv[1:])
