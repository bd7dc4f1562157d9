"""A compiled decoding step under a profile against the same step compiled without one."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from models import everywhere_profile, random_model, spread_profile, testbed
from paired import Figure, Ratio, relative_speed
from transformers import PreTrainedModel, StaticCache

from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.profile import Profile

PROMPT_TOKENS, NEW_TOKENS = 24, 32
SECTION = "Compiled decoding step, steered in units of unsteered"


def figures() -> list[Figure]:
    small, large = testbed(), random_model()
    return [
        Figure(
            SECTION,
            "testbed, every layer both ways",
            compiled_speed(small, everywhere_profile(small), rounds=31),
        ),
        Figure(
            SECTION,
            "16 × 64 random, 5 up and 20 down",
            compiled_speed(large, spread_profile(large), rounds=11),
            bar=0.99,
        ),
    ]


def compiled_speed(engine: TransformersEngine, profile: Profile, rounds: int) -> Ratio:
    """Two models over the same weights, each compiled once: one steered first, one not."""
    bare = _twin(engine.model)
    unsteered = _decoder(bare)
    with steer(engine.model, profile, engine.layers), torch.inference_mode():
        steered = _decoder(engine.model)
        return relative_speed([steered], [unsteered], rounds, warm_up=2)


def _decoder(model: PreTrainedModel) -> Callable[[], None]:
    """Decode greedily with a static cache; the step of one token is compiled."""
    step = torch.compile(model.forward, dynamic=False)
    prompt = torch.arange(PROMPT_TOKENS).mul(7919).remainder(900).add(5).unsqueeze(0)

    def decode() -> None:
        cache = StaticCache(model.config, max_cache_len=PROMPT_TOKENS + NEW_TOKENS)
        run = partial(model.forward, past_key_values=cache, use_cache=True)
        token = run(input_ids=prompt).logits[:, -1:].argmax(-1)
        for _ in range(NEW_TOKENS):
            token = step(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = token[:, -1:].argmax(-1)

    return decode


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's modules over the very same weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return deepcopy(model, shared)
