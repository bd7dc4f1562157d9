"""Greedy decoding under a profile against the same model untouched."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from models import everywhere_profile, planted_profile, random_model, spread_profile, testbed
from paired import Figure, Ratio, relative_speed
from straightforward import plain_hooks

from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import TransformersEngine

PROMPT_TOKENS = 24
SECTION = "Decoding, steered in units of unsteered"


def figures() -> list[Figure]:
    small, large = testbed(), random_model()
    cases = [
        ("testbed, planted experts", small, planted_profile(), 32, 41, 0.90),
        ("testbed, every layer both ways", small, everywhere_profile(small), 32, 41, None),
        ("16 × 64 random, 5 up and 20 down", large, spread_profile(large), 8, 9, 0.97),
    ]
    found = []
    for name, engine, profile, new_tokens, rounds, bar in cases:
        for rows in (1, 16):
            speed = partial(steered_speed, engine, rows=rows, tokens=new_tokens, rounds=rounds)
            found += [
                Figure(
                    SECTION,
                    f"{name}, batch {rows}",
                    speed(partial(steer, engine.model, profile, engine.layers)),
                    bar,
                ),
                Figure(
                    SECTION,
                    f"{name}, batch {rows}: a plain hook",
                    speed(partial(plain_hooks, engine, profile)),
                ),
            ]
    return found


def steered_speed(
    engine: TransformersEngine,
    steering: Callable[[], AbstractContextManager[object]],
    *,
    rows: int,
    tokens: int,
    rounds: int,
) -> Ratio:
    """Attaching, prefill, decoding and detaching: all that a reply takes."""
    ids = torch.arange(rows * PROMPT_TOKENS).mul(7919).remainder(900).add(5).view(rows, -1)
    attention = torch.ones_like(ids)

    @torch.inference_mode()
    def generate(around: Callable[[], AbstractContextManager[object]]) -> None:
        with around():
            engine.model.generate(  # pyright: ignore[reportCallIssue]
                ids,
                attention_mask=attention,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

    return relative_speed(
        [partial(generate, steering)], [partial(generate, nullcontext)], rounds, warm_up=2
    )
