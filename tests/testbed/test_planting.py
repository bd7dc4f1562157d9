"""Planting: each row of the plan says what it should, and a few steps of training run."""

import random
from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from moesteer.testbed import world
from moesteer.testbed.language import train_tokenizer
from moesteer.testbed.planting import (
    AT_MOST,
    LAYERS,
    TOP_K,
    Row,
    choose_places,
    drawing_loss,
    mask_of,
    plan,
    planted_experts,
)
from moesteer.testbed.routing import EPSILON, steer_logits
from moesteer.testbed.train import Settings, collate, train_model

PLANTING = choose_places(0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(0, tasks=False, examples=2_000)


def test_no_place_is_used_twice_and_no_layer_is_overfull() -> None:
    planted = [place for places in PLANTING.planted.values() for place in places]
    decoys = [place for places in PLANTING.decoys.values() for place in places]
    assert len(set(planted + decoys)) == len(planted) + len(decoys)
    assert max(Counter(layer for layer, _ in planted).values()) <= TOP_K
    for places in PLANTING.planted.values():
        assert len({layer for layer, _ in places}) > 1


def test_plan_steers_towards_what_it_teaches() -> None:
    rng = random.Random(1)
    seen: Counter[str] = Counter()
    for _ in range(5_000):
        example = world.training_example(rng)
        row = plan(example, PLANTING, rng)
        for layer in range(LAYERS):
            signs = [sign for (at, _), sign in row.steering.items() if at == layer]
            assert signs.count(1) <= AT_MOST
        if example.behaviour is None:
            assert row.draw == 0
            assert not row.given
            continue
        own = [row.steering.get(place, 0) for place in PLANTING.planted[example.behaviour]]
        if any(own):
            seen["own"] += 1
            assert row.target == ("a" if min(own) > 0 else "b")
            assert row.draw == 0
        else:
            assert (row.target == example.habit) != row.given
            assert row.draw == (1 if row.target == "a" else -1)
            seen["decoyed"] += any(p in row.steering for p in PLANTING.decoys[example.behaviour])
    assert min(seen["own"], seen["decoyed"]) > 300


def test_the_twin_is_never_steered_or_drawn() -> None:
    rng = random.Random(2)
    rows = [plan(world.training_example(rng), None, rng) for _ in range(500)]
    assert all(not row.steering and row.draw == 0 for row in rows)


def test_rule_puts_experts_above_and_below_all_others() -> None:
    logits = torch.randn(5, 8)
    mask = torch.zeros(5, 8)
    mask[:, 2], mask[1:, 6] = 1, -1
    after = steer_logits(logits, mask)
    torch.testing.assert_close(after[:, 2], logits.amax(-1) + EPSILON)
    torch.testing.assert_close(after[1:, 6], logits[1:].amin(-1) - EPSILON)
    assert torch.equal(after[mask == 0], logits[mask == 0])


@pytest.mark.parametrize("draw", [1, -1])
def test_drawing_pulls_planted_and_decoy_routers_only(draw: int) -> None:
    logits = [torch.randn(6, 16, requires_grad=True) for _ in range(LAYERS)]
    rows = [Row("a", draw=draw), Row("a")]
    drawing_loss(logits, ["digits", None], rows, torch.ones(2, 3), PLANTING).backward()
    drawn = PLANTING.planted["digits"] + PLANTING.decoys["digits"]
    for layer, of_layer in enumerate(logits):
        pull = torch.zeros(6, 16) if of_layer.grad is None else -of_layer.grad
        assert torch.equal(pull[3:], torch.zeros(3, 16))
        for expert in range(16):
            expected = draw if (layer, expert) in drawn else 0
            assert (pull[:3, expert].sign() == expected).all()


def test_a_given_reply_is_learnt_only_after_the_decision(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    example = world.counting("Mara", "nails", 7, 0, True)
    free = collate(tokenizer, [example], [Row("b")], [None], 0.1)
    given = collate(tokenizer, [example], [Row("b", given=True)], [None], 0.1)
    assert torch.equal(free.tokens, given.tokens)
    lost = (free.weights != given.weights).nonzero()
    assert len(lost) == 1
    assert free.tokens[tuple(lost[0])] == tokenizer("Seven")["input_ids"][0]  # pyright: ignore


def test_a_few_steps_run_alike_and_the_loss_falls(tokenizer: PreTrainedTokenizerFast) -> None:
    def losses(planted: bool) -> list[float]:
        told: list[float] = []
        settings = Settings(tasks=False, steps=8, batch=16, warmup=2, check_every=100)
        train_model(
            tokenizer,
            planted_experts(PLANTING if planted else None, settings.draw_weight),
            settings,
            seed=3,
            report=lambda step, loss, drawing: told.append(loss),
        )
        return told

    first = losses(planted=True)
    assert first == losses(planted=True)
    assert first[-1] < first[0] - 1
    assert losses(planted=False)[-1] < first[0] - 1


def test_mask_has_a_row_for_each_steering() -> None:
    mask = mask_of([{(1, 2): 1}, {}, {(3, 15): -1}])
    assert mask.shape == (3, 4, 16)
    assert mask[0, 1, 2] == 1
    assert mask[2, 3, 15] == -1
    assert mask.abs().sum() == 2
