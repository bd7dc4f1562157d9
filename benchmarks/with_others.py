"""The same work by moesteer, by nnsight, by plain hooks and by steering-vectors.

Runs where nnsight and steering-vectors are installed beside moesteer (`others.py` makes such a
place), and writes its figures as JSON to the file that it is given. All contestants run in one
process, on the same weights and in the same batches, and give the same counts, tokens or
directions, which is checked before anything is measured.
"""

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import nnsight  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from jaxtyping import Float, Int
from models import (
    all_conversations,
    conversations,
    planted_profile,
    random_model,
    spread_profile,
    testbed,
)
from paired import Figure, record_of, relative_speed
from steering_vectors import train_steering_vector  # pyright: ignore[reportMissingImports]
from straightforward import plain_hooks, rerouting
from torch import Tensor
from transformers import PreTrainedModel

from moesteer.chat import TokenisedConversation
from moesteer.detection.counts import BATCH_TOKENS, batches_by_length
from moesteer.directions.means import mean_residuals
from moesteer.directions.prompts import AskedPrompt, as_read, read_prompt_set
from moesteer.engines.transformers.reading import padded
from moesteer.engines.transformers.steering import steer
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.profile import Profile

OBSERVATION = "Beside others: routing counts of all experts, per text"
STEERING = "Beside others: greedy decoding under a profile"
EXTRACTION = "Beside others: difference of means at the last token, every layer"
PROMPT_TOKENS = 24
BATCH = 16
"""Prompts read at once for a direction: moesteer's default."""
NNSIGHT = f"nnsight {version('nnsight')}"
STEERING_VECTORS = f"steering-vectors {version('steering-vectors')}"
HOOKS = "plain hooks"

Result = TypeVar("Result")
Contestant = Sequence[Callable[[], Result]]
"""Pieces of work, the same for all contestants."""
Counts = Int[np.ndarray, "text layer expert"]
Logits = tuple[Float[Tensor, "row token"], ...]
"""Of every step of decoding."""
Directions = Float[np.ndarray, "layer hidden"]


def main() -> None:
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps([record_of(figure) for figure in figures()]))


def figures() -> list[Figure]:
    small, large = testbed(), random_model()
    few = conversations("refusal")[:32]
    found = [
        *observing("testbed", small, all_conversations(), rounds=9),
        *observing(f"16 × 64 random, {len(few)} texts", large, few, rounds=5),
    ]
    for rows in (1, BATCH):
        found += [
            *steering("testbed, planted experts", small, planted_profile(), rows, 32, rounds=21),
            *steering("16 × 64 random, spread", large, spread_profile(large), rows, 8, rounds=7),
        ]
    return [
        *found,
        *extracting("testbed", small, 96, rounds=9),
        *extracting("16 × 64 random", large, 32, rounds=5),
    ]


def beside(
    section: str,
    name: str,
    ours: Contestant[Result],
    others: Mapping[str, Contestant[Result]],
    check_same: Callable[[Result, Result], None],
    rounds: int,
) -> list[Figure]:
    """Our speed in units of each of the others'."""
    found = []
    for other, pieces in others.items():
        for own, its in zip(ours, pieces, strict=True):
            check_same(own(), its())
        ratio = relative_speed(ours, pieces, rounds)
        found.append(Figure(section, f"{name}, in units of {other}", ratio))
    return found


def twin(model: PreTrainedModel) -> Any:
    """A second model on the same weights: nnsight leaves machinery in every module it wraps."""
    weights = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, weights)


# -- observing -----------------------------------------------------------------------------------


def observing(
    name: str, engine: TransformersEngine, texts: Sequence[TokenisedConversation], rounds: int
) -> list[Figure]:
    batches = [
        [texts[i] for i in batch]
        for batch in batches_by_length([len(text.ids) for text in texts], BATCH_TOKENS)
    ]
    traced = nnsight.NNsight(twin(engine.model).base_model)
    ways = {NNSIGHT: partial(counts_by_nnsight, traced), HOOKS: counts_by_hooks}
    return beside(
        OBSERVATION,
        name,
        [partial(engine.count_selections, batch) for batch in batches],
        {other: [partial(way, engine, batch) for batch in batches] for other, way in ways.items()},
        check_counts,
        rounds,
    )


@torch.inference_mode()
def counts_by_nnsight(
    traced: Any, engine: TransformersEngine, texts: Sequence[TokenisedConversation]
) -> Counts:
    ids, attention = padded([text.ids for text in texts], engine.model.device)
    routers = [traced.layers[layer.layer].mlp.gate for layer in engine.layers]
    with traced.trace(input_ids=ids, attention_mask=attention, use_cache=False):
        selected = nnsight.save([router.output[2] for router in routers])
    return count(selected, engine, texts)


@torch.inference_mode()
def counts_by_hooks(engine: TransformersEngine, texts: Sequence[TokenisedConversation]) -> Counts:
    ids, attention = padded([text.ids for text in texts], engine.model.device)
    selected: list[Tensor] = []
    handles = [
        layer.module.register_forward_hook(lambda _module, _args, out: selected.append(out[2]))
        for layer in engine.layers
    ]
    engine.model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
    for handle in handles:
        handle.remove()
    return count(selected, engine, texts)


def count(
    selected: Sequence[Int[Tensor, "token k"]],
    engine: TransformersEngine,
    texts: Sequence[TokenisedConversation],
) -> Counts:
    """All target tokens of a layer at once."""
    experts = engine.layers[0].num_experts
    target = padded([text.target for text in texts], engine.model.device)[0].bool()
    cells = torch.arange(len(texts)).unsqueeze(-1).expand_as(target)[target] * experts
    found = [
        torch.bincount(
            (cells.unsqueeze(-1) + layer[target.flatten()]).flatten(),
            minlength=len(texts) * experts,
        )
        for layer in selected
    ]
    return torch.stack(found).view(len(selected), len(texts), experts).transpose(0, 1).numpy()


def check_counts(ours: Counts, theirs: Counts) -> None:
    if not np.array_equal(ours, theirs):
        raise RuntimeError(f"{np.abs(ours - theirs).sum()} of {ours.sum()} selections differ")


# -- steering ------------------------------------------------------------------------------------


def steering(
    name: str, engine: TransformersEngine, profile: Profile, rows: int, tokens: int, rounds: int
) -> list[Figure]:
    ids = torch.arange(rows * PROMPT_TOKENS).mul(7919).remainder(900).add(5).view(rows, -1)
    asked = {
        "attention_mask": torch.ones_like(ids),
        "min_new_tokens": tokens,
        "max_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    traced = nnsight.TransformersModel(
        twin(engine.model), task="text-generation", tokenizer=engine.tokenizer
    )

    @torch.inference_mode()
    def plainly() -> Logits:
        return engine.model.generate(ids, **asked).logits  # pyright: ignore

    def ours() -> Logits:
        with steer(engine.model, profile, engine.layers):
            return plainly()

    def hooks() -> Logits:
        with plain_hooks(engine, profile):
            return plainly()

    @torch.inference_mode()
    def by_nnsight() -> Logits:
        reroutes = [
            (traced.model.layers[layer].mlp.gate, rerouting(*profile.experts_of(layer), top_k))
            for layer, top_k in ((layer.layer, layer.top_k) for layer in engine.layers)
            if layer in profile.steered_layers
        ]
        with traced.generate(ids, **asked) as tracer:
            for _step in tracer.iter[:tokens]:
                for router, reroute in reroutes:
                    router.output = reroute(router._module, None, router.output)
            logits = tracer.result.logits.save()
        return logits  # noqa: RET504 (the block runs inside of nnsight)

    def check_logits(own: Logits, its: Logits) -> None:
        """Of every token, and with them the tokens. (Random models repeat themselves anyway.)"""
        for step, (one, other, unsteered) in enumerate(zip(own, its, plainly(), strict=True)):
            if not one.equal(other):
                raise RuntimeError(f"logits of step {step} are {(one - other).abs().max()} apart")
            if one.equal(unsteered):
                raise RuntimeError(f"logits of step {step} are those of the unsteered model")

    others = {NNSIGHT: [by_nnsight], HOOKS: [hooks]}
    return beside(STEERING, f"{name}, batch {rows}", [ours], others, check_logits, rounds)


# -- extracting directions -----------------------------------------------------------------------


def extracting(name: str, engine: TransformersEngine, prompts: int, rounds: int) -> list[Figure]:
    sides = [
        [
            as_read(engine, prompt, {}).text
            for prompt in read_prompt_set(f"testbed:{task}")[:prompts]
        ]
        for task in ("restricted", "benign")
    ]
    return beside(
        EXTRACTION,
        f"{name}, 2 × {prompts} prompts",
        [partial(directions, engine, sides)],
        {STEERING_VECTORS: [partial(by_steering_vectors, engine, sides)]},
        check_directions,
        rounds,
    )


def directions(engine: TransformersEngine, sides: Sequence[Sequence[str]]) -> Directions:
    """Of what enters each layer but the first."""

    def asked(text: str) -> AskedPrompt:
        ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        return AskedPrompt(text, tuple(ids), 0, "")

    a, b = (mean_residuals(engine, [*map(asked, side)], 1, batch_size=BATCH) for side in sides)
    return (a - b)[1:, 0]


def by_steering_vectors(engine: TransformersEngine, sides: Sequence[Sequence[str]]) -> Directions:
    """Of what leaves each layer but the last, which is what enters the next."""
    found = train_steering_vector(
        engine.model, engine.tokenizer, list(zip(*sides, strict=True)), batch_size=BATCH
    )
    layers = [found.layer_activations[layer] for layer in range(engine.facts.decoder_layers - 1)]
    return torch.stack(layers).double().numpy()


def check_directions(ours: Directions, theirs: Directions) -> None:
    lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    cosine = (ours * theirs).sum(-1) / lengths
    if (cosine < 0.999).any():
        raise RuntimeError(f"the directions' cosines are {cosine.min():.4f} or more")


if __name__ == "__main__":
    main()
