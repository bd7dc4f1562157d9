"""Directions: reading the residual stream, expert by expert, and decoding with one added."""

from collections.abc import Sequence
from functools import partial

import torch
from decoding import steered_speed
from models import conversations, random_model, testbed
from paired import Figure, Ratio, Work, relative_speed

from moesteer.detection.counts import BATCH_TOKENS, batches_by_length
from moesteer.direction import Direction
from moesteer.directions.means import RunningMean
from moesteer.directions.selection import every_write
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.profile import Profile

SECTION = "Directions"
PROMPTS, LAST = 256, 5


def figures() -> list[Figure]:
    small, large = testbed(), random_model()
    found = [
        Figure(
            SECTION,
            f"testbed: means of the stream over {PROMPTS} prompts, in units of the bare forward",
            extraction_speed(small, prompts(PROMPTS), rounds=15),
            0.85,
        ),
        Figure(
            SECTION,
            f"16 × 64 random: the same over {PROMPTS // 4} prompts",
            extraction_speed(large, prompts(PROMPTS // 4), rounds=5),
            0.85,
        ),
    ]
    for name, profile in profiles(large).items():
        for rows in (1, 16):
            steering = partial(steer, large.model, profile, large.layers, large.stream)
            found.append(
                Figure(
                    SECTION,
                    f"16 × 64 random, decoding, {name}, batch {rows}, in units of unsteered",
                    steered_speed(large, steering, rows=rows, tokens=8, rounds=9),
                    0.95,
                )
            )
    return found


def prompts(number: int) -> list[tuple[int, ...]]:
    return [conversation.ids for conversation in conversations("refusal")[:number]]


def profiles(engine: TransformersEngine) -> dict[str, Profile]:
    hidden, layers = engine.facts.hidden, engine.facts.decoder_layers
    drawn = torch.randn(hidden, generator=torch.Generator().manual_seed(0))
    vector = tuple((drawn / drawn.norm() * 0.1).tolist())
    return {
        "one direction added": Profile(directions=(Direction(vector, ((8, "input"),)),)),
        "one expert's added": Profile(directions=(Direction(vector, ((8, "mlp"),), expert=3),)),
        "ablated at all 48 writes": Profile(
            directions=(Direction(vector, every_write(layers), "ablate"),)
        ),
    }


def extraction_speed(
    engine: TransformersEngine, texts: Sequence[tuple[int, ...]], rounds: int
) -> Ratio:
    """Batch by batch: read, moved to fp64 and averaged, against the forward pass alone."""
    means = RunningMean()
    ours: list[Work] = []
    bare: list[Work] = []
    for batch in batches_by_length([len(text) for text in texts], BATCH_TOKENS):
        chosen = [texts[i] for i in batch]
        longest = max(map(len, chosen))
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in chosen])
        attention = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in chosen])
        ours.append(lambda chosen=chosen: means.add(engine.residuals(chosen, LAST)))
        bare.append(lambda ids=ids, attention=attention: _bare(engine, ids, attention))
    return relative_speed(ours, bare, rounds)


@torch.inference_mode()
def _bare(engine: TransformersEngine, ids: torch.Tensor, attention: torch.Tensor) -> None:
    engine.model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
