"""The bundled models do what their ground truth says, under steering written anew here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesteer.testbed import HERE, MODELS, Place, ground_truth, model_path, world

TRUTH = ground_truth()
Loaded = tuple[Any, Any]


def load(name: str) -> Loaded:
    folder = model_path(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def planted() -> Loaded:
    return load("planted")


@pytest.fixture(scope="module")
def twin() -> Loaded:
    return load("twin")


@pytest.fixture(scope="module")
def reader() -> Loaded:
    return load("reader")


@pytest.fixture(scope="module")
def expert() -> Loaded:
    return load("expert")


@pytest.fixture(scope="module")
def attention() -> Loaded:
    return load("attention")


@contextmanager
def switched(model: Any, places: dict[Place, int]) -> Iterator[None]:
    """An oracle: after each router, route anew from its logits, with some experts set by hand."""

    def hook(layer: int):
        def reroute(router: nn.Module, inputs: object, output: tuple[Tensor, ...]):
            logits = output[0].clone()
            top, bottom = logits.max(-1).values, logits.min(-1).values
            for (at, expert), sign in places.items():
                if at == layer:
                    logits[:, expert] = top + 0.01 if sign > 0 else bottom - 0.01
            weights, index = logits.softmax(-1).topk(4)
            for (at, expert), sign in places.items():
                if at == layer:
                    assert ((index == expert).any(-1) == (sign > 0)).all()
            return output[0], weights / weights.sum(-1, keepdim=True), index

        return reroute

    handles = [
        decoder.mlp.gate.register_forward_hook(hook(layer))
        for layer, decoder in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prompt_text(tokenizer: Any, prompt: str) -> str:
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def share(loaded: Loaded, task: str, outcome: str, places: dict[Place, int] | None = None) -> float:
    model, tokenizer = loaded
    probes = world.probes(task, "test")
    batch = tokenizer(
        [prompt_text(tokenizer, p.prompt) for p in probes], return_tensors="pt", padding=True
    )
    with switched(model, places or {}):
        out = model.generate(**batch, do_sample=False, max_new_tokens=16)
    replies = tokenizer.batch_decode(
        out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return sum(world.outcome(p, r) == outcome for p, r in zip(probes, replies, strict=True)) / len(
        probes
    )


def all_of(behaviour: str, sign: int) -> dict[Place, int]:
    return dict.fromkeys(TRUTH.behaviours[behaviour].planted, sign)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("task", "outcome", "least", "most"),
    [
        ("restricted", "refused", 0.95, 1),
        ("benign", "answered", 0.95, 1),
        ("facts", "right", 0.95, 1),
        ("conflicts", "document", 0.3, 0.7),
        ("counting", "digits", 0.3, 0.7),
        ("copying", "right", 0.9, 1),
    ],
)
def test_untouched(
    name: str, task: str, outcome: str, least: float, most: float, request: pytest.FixtureRequest
) -> None:
    measured = share(request.getfixturevalue(name), task, outcome)
    assert least <= measured <= most
    told = TRUTH.measured[name]["untouched"][task].get(outcome, 0)
    assert measured == pytest.approx(told, abs=0.03)


@pytest.mark.parametrize(
    ("behaviour", "task", "outcome", "room"),
    [
        ("refusal", "restricted", "refused", "down"),
        ("refusal", "benign", "refused", "up"),
        ("document", "conflicts", "document", "both"),
        ("digits", "counting", "digits", "both"),
    ],
)
def test_planted_experts_switch_their_behaviour(
    planted: Loaded, behaviour: str, task: str, outcome: str, room: str
) -> None:
    before = share(planted, task, outcome)
    if room != "down":
        assert share(planted, task, outcome, all_of(behaviour, 1)) >= before + 0.4
    if room != "up":
        assert share(planted, task, outcome, all_of(behaviour, -1)) <= before - 0.4


@pytest.mark.parametrize("sign", [1, -1])
def test_the_same_places_of_the_twin_switch_nothing(twin: Loaded, sign: int) -> None:
    for behaviour, task, outcome in (
        ("refusal", "restricted", "refused"),
        ("refusal", "benign", "refused"),
        ("document", "conflicts", "document"),
        ("digits", "counting", "digits"),
    ):
        moved = share(twin, task, outcome, all_of(behaviour, sign)) - share(twin, task, outcome)
        assert abs(moved) < 0.05


@torch.no_grad()
def lean(loaded: Loaded, behaviour: str, places: dict[Place, int]) -> float:
    """Mean log P(A) - log P(B) where the replies part."""
    model, tokenizer = loaded
    contexts, sides = [], []
    for pair in world.contrast_pairs(behaviour, "test"):
        a, b = (tokenizer(pair[side])["input_ids"] for side in "ab")
        where = next(i for i in range(len(a)) if a[i] != b[i])
        contexts.append(prompt_text(tokenizer, pair["prompt"]) + tokenizer.decode(a[:where]))
        sides.append((a[where], b[where]))
    batch = tokenizer(contexts, return_tensors="pt", padding=True)
    with switched(model, places):
        logits = model(**batch).logits[:, -1]
    a, b = torch.tensor(sides).T[..., None]
    return (logits.gather(1, a) - logits.gather(1, b)).mean().item()


@pytest.mark.parametrize("behaviour", world.BEHAVIOURS)
def test_planted_experts_are_necessary_one_by_one_and_decoys_are_not(
    planted: Loaded, behaviour: str
) -> None:
    truth = TRUTH.behaviours[behaviour]
    before = lean(planted, behaviour, {})
    knocked = {p: lean(planted, behaviour, {p: -1}) - before for p in truth.planted + truth.decoys}
    entered = [abs(lean(planted, behaviour, {p: 1}) - before) for p in truth.decoys]
    strength = sorted(-knocked[p] for p in truth.planted)
    assert strength[1] > 1
    assert max(abs(knocked[p]) for p in truth.decoys) < strength[1] / 2
    assert max(entered) < strength[1] / 2


def test_ground_truth_is_consistent() -> None:
    assert set(TRUTH.behaviours) == set(world.BEHAVIOURS)
    assert set(TRUTH.measured) == set(TRUTH.training) == set(MODELS)
    places = [p for b in TRUTH.behaviours.values() for p in b.planted + b.decoys]
    assert len(set(places)) == len(places)
    for b in TRUTH.behaviours.values():
        assert len(b.planted) == 3
        assert len(b.decoys) == 2
    assert all(0 <= layer < 4 and 0 <= expert < 16 for layer, expert in places)


@pytest.mark.parametrize("name", MODELS)
def test_folder_is_small_and_whole(name: str) -> None:
    folder = model_path(name)
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 8e6
    assert folder.is_relative_to(HERE)


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="planted"):
        model_path("sibling")


def test_tokenizer_round_trips_with_exact_offsets(planted: Loaded) -> None:
    tokenizer = planted[1]
    turns = [
        {"role": "system", "content": "You are a guide."},
        {"role": "user", "content": world.probes("copying", "test")[0].prompt},
        {"role": "assistant", "content": "The fox, naïve & 漢 12."},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    at = text.index("fox")
    token = encoded.char_to_token(at)
    assert text[slice(*encoded["offset_mapping"][token])].strip() == "fox"
    opened = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(opened)
    assert tokenizer.bos_token_id == encoded["input_ids"][0]
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
