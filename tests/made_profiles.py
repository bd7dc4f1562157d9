"""Profiles made by hand: one of experts with scores, one of directions with candidates."""

from dataclasses import replace

import numpy as np

from moesteer.direction import Candidates, Direction
from moesteer.model_facts import LayerShape, ModelFacts
from moesteer.profile import Evidence, Profile, Scores

# A dense layer 0, then routed layers of unequal width.
LAYERS = (LayerShape(1, 4, 2), LayerShape(2, 4, 2), LayerShape(5, 3, 1))
MODEL = ModelFacts(
    id="org/model",
    revision="abc",
    model_type="qwen3_moe",
    config_hash="c0",
    tokenizer_hash="t0",
    family="softmax → top-k",
    layers=LAYERS,
    router_norms=(1.0, 2.0, 3.0),
)
EVIDENCE = Evidence(
    detector="risk-difference",
    counted="top-k",
    pairs=7,
    source="pairs.jsonl",
    data_hash="d0",
    target="reply",
    tokens_a=70,
    tokens_b=60,
    seed=3,
    interval="95% percentile bootstrap",
    spans="matched",
    stability=0.75,
    versions={"python": "3.11"},
    command="moesteer detect …",
)


def scores() -> Scores:
    generator = np.random.default_rng(0)
    value, width, p, q, rate_a, rate_b = generator.uniform(0, 1, (6, 3, 4))
    return Scores(value, value - width, value + width, p, q, rate_a, rate_b)


def full() -> Profile:
    return Profile(
        activated=((5, 2), (1, 0)),
        deactivated=((1, 3), (2, 1), (5, 0)),
        rule="paper",
        dose=0.5,
        toward="b",
        chat_options={"enable_thinking": False, "effort": "low", "depth": 2, "share": 0.5},
        model=MODEL,
        evidence=EVIDENCE,
        scores=scores(),
        name="full.safetensors",
    )


def directed() -> Profile:
    """Experts and directions, with candidates that these were chosen from."""
    line = Direction((3.0, 0.0, 4.0), ((0, "input"), (0, "mlp")), "ablate", window="generation")
    along = Direction((0.1, 0.2, 0.3), ((5, "mlp"),), coefficient=-2.5, expert=2)
    found = Candidates(
        "own",
        np.array([5, 5]),
        np.array([-1, -2]),
        np.array([2, 0]),
        np.array([[0.1, 0.2, 0.3], [1, 2, 3]], dtype=np.float32),
        {"kl": np.array([0.25, 1.5])},
    )
    model = replace(MODEL, decoder_layers=6, hidden=3)
    return Profile(((1, 0),), directions=(line, along), model=model, candidates=found)
