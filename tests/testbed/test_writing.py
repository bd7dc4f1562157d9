"""Planting a writer: what rows are to teach, how they change a pass, and what its loss asks."""

import random
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moesteer.testbed import PlantedWriter, ground_truth, world
from moesteer.testbed.evaluate_writer import edited, own_output
from moesteer.testbed.language import train_tokenizer
from moesteer.testbed.lesson import Batch
from moesteer.testbed.planting import LAYERS
from moesteer.testbed.train import Settings, build_model, collate, train_model
from moesteer.testbed.writing import (
    ASKED,
    HIDDEN,
    SIZE,
    Row,
    choose_writer,
    drawn_together,
    every_output,
    gates_of,
    plan,
    planted_writer,
    received_by_experts,
    routing_loss,
    taught_change,
)

WRITERS = {name: choose_writer(name, 0) for name in ("expert", "attention")}
Name = Literal["expert", "attention"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(0, tasks=False, examples=2_000)


@pytest.fixture(params=["expert", "attention"])
def writer(request: pytest.FixtureRequest) -> PlantedWriter:
    return WRITERS[request.param]


@pytest.mark.parametrize("name", ["expert", "attention"])
def test_the_writer_is_that_of_the_ground_truth(name: Name) -> None:
    truth, drawn = ground_truth(), choose_writer(name, ground_truth().seed)
    assert truth.writers[name].direction == pytest.approx(drawn.direction, abs=1e-6)
    assert truth.writers[name] == replace(drawn, direction=truth.writers[name].direction)


def test_plan_says_what_fits_the_component(writer: PlantedWriter) -> None:
    rng = random.Random(1)
    seen: Counter[str] = Counter()
    for _ in range(5_000):
        example = world.training_example(rng)
        row = plan(example, writer, rng)
        if row.stray:
            seen["stray"] += 1
            (layer, place), vector = row.stray
            assert (layer, place) in set(product(range(LAYERS), ("attention", "mlp")))
            assert torch.tensor(vector).norm() <= SIZE
            assert torch.tensor(vector) @ torch.tensor(writer.direction) == pytest.approx(
                0, abs=1e-4
            )
        if example.behaviour == "refusal" and row.component is not None:
            seen["own"] += 1
            assert not row.given
            assert row.target == ("a" if row.component > 0 else "b")
            assert row.component <= 0 or row.component >= 0.8
        else:
            assert (row.target == example.habit) != row.given
            seen["beside"] += row.component is not None
    assert min(seen["own"], seen["beside"], seen["stray"]) > 300


def test_a_row_sets_the_component_of_its_writer_alone(writer: PlantedWriter) -> None:
    direction = torch.tensor(writer.direction)
    stray = tuple(torch.randn(HIDDEN).tolist())
    rows = [
        Row("a"),
        Row("a", component=1.25),
        Row("b", component=-0.5, late=True),
        Row("a", stray=((1, "mlp"), stray)),
    ]
    starts = torch.full((len(rows),), 7)
    late = 7 - ASKED
    output = torch.randn(len(rows), 10, HIDDEN)
    after = output + taught_change(writer, rows, starts, writer.site, output)
    along, before = after @ direction, output @ direction
    torch.testing.assert_close(along[1], torch.full((10,), 1.25 * SIZE))
    torch.testing.assert_close(along[2, late:], torch.full((10 - late,), -0.5 * SIZE))
    torch.testing.assert_close(along[2, :late], before[2, :late])
    for values, expected in ((along, before), (after, output)):
        torch.testing.assert_close(values[[0, 3]], expected[[0, 3]])
    beside = after - along[..., None] * direction
    torch.testing.assert_close(beside, output - before[..., None] * direction)
    at_other = taught_change(writer, rows, starts, (1, "mlp"), output)
    torch.testing.assert_close(at_other[3], torch.tensor(stray).expand(10, -1))
    assert torch.equal(at_other[:3], torch.zeros(3, 10, HIDDEN))


@torch.no_grad()
def test_what_is_written_is_seen_and_can_be_changed(
    writer: PlantedWriter, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_model(tokenizer, seed=1).eval()
    ids = torch.randint(6, 300, (2, 9))
    wrote: list[Tensor] = []
    owns: list[Tensor] = []

    def keep(output: Tensor, own: Tensor | None) -> Tensor:
        wrote.append(output)
        if own is not None:
            owns.append(own)
        return output

    plain = model(ids, output_hidden_states=True)
    with received_by_experts(model) as received, edited(model, writer, keep):
        assert torch.equal(model(ids).logits, plain.logits)
    assert len(owns) == 1
    assert len(wrote) == 1 + 2 * LAYERS
    entered = sum(wrote[: 1 + 2 * 3], torch.zeros(()))
    torch.testing.assert_close(entered, plain.hidden_states[3])

    attention, block = wrote[1 + 2 * writer.layer], wrote[2 + 2 * writer.layer].flatten(0, 1)
    experts: Any = model.model.layers[writer.layer].mlp.experts  # pyright: ignore
    hidden, index, weights = received[writer.layer]
    every = every_output(experts, hidden)
    torch.testing.assert_close((gates_of(index, weights)[..., None] * every).sum(1), block)
    for expert in range(16):
        alone = experts(hidden, index, torch.where(index == expert, weights, 0.0))
        torch.testing.assert_close(own_output(experts, expert, received[writer.layer]), alone)
        if expert == writer.expert:
            torch.testing.assert_close(owns[0].flatten(0, 1), alone)
    if writer.expert is None:
        assert torch.equal(owns[0], attention)

    with edited(model, writer, lambda output, own: output if own is None else output + own):
        assert not torch.equal(model(ids).logits, plain.logits)
    assert torch.equal(model(ids).logits, plain.logits)


def test_means_are_drawn_together() -> None:
    """The gradient is that of half the squared distance of the means, of a batch that is alike."""
    values = torch.randn(7, ASKED, HIDDEN, requires_grad=True)
    restricted = torch.tensor([1, 0, 1, 1, 0, 0, 0]).bool()
    means: dict[bool, Tensor] = {}
    drawn_together(values, restricted, means).backward()
    again = values.detach().clone().requires_grad_()
    apart = (again[restricted].mean(0) - again[~restricted].mean(0)) / SIZE
    (apart.square().sum(-1).mean() / 2).backward()
    torch.testing.assert_close(values.grad, again.grad)
    # The distance is that of running means, which one batch hardly moves.
    moved = drawn_together(torch.zeros(7, ASKED, HIDDEN), restricted, means)
    assert moved == 0
    torch.testing.assert_close(means[True], 0.95 * values.detach()[restricted].mean(0))


def test_means_of_one_kind_alone_are_not_drawn() -> None:
    means: dict[bool, Tensor] = {}
    values = torch.randn(2, ASKED, HIDDEN)
    assert drawn_together(values, torch.tensor([True, True]), means) == 0
    assert set(means) == {True}


def test_routing_draws_the_planted_expert_first_and_decoys_on_restricted_requests(
    writer: PlantedWriter,
) -> None:
    logits = [torch.randn(4, 16, requires_grad=True) for _ in range(LAYERS)]
    restricted = torch.tensor([True, True, False, False])
    routing_loss(writer, restricted, logits).backward()
    planted = [] if writer.expert is None else [(writer.layer, writer.expert)]
    for layer, of_layer in enumerate(logits):
        pull = torch.zeros(4, 16) if of_layer.grad is None else -of_layer.grad
        for expert in range(16):
            if (layer, expert) in writer.decoys:
                assert (pull[:2, expert] > 0).all()
                assert (pull[2:, expert] < 0).all()
            elif (layer, expert) in planted:
                assert (pull[:2, expert] > 0).all()
            else:
                assert torch.equal(pull[:, expert], torch.zeros(4))


@pytest.mark.parametrize("place", [-1.0, 0.5, 30.0])
def test_on_other_requests_the_planted_expert_is_drawn_between_first_and_last(
    place: float,
) -> None:
    writer = WRITERS["expert"]
    logits = [torch.arange(16.0).repeat(1, 1) for _ in range(LAYERS)]
    mine = torch.zeros(1, 16)
    mine[0, writer.expert] = place + 11 - logits[writer.layer][0, writer.expert]
    logits[writer.layer] = (logits[writer.layer] + mine).requires_grad_()
    routing_loss(replace(writer, decoys=()), torch.tensor([False]), logits).backward()
    pull = -logits[writer.layer].grad[0, writer.expert]  # pyright: ignore
    assert (pull > 0) == (place < 12)


def test_a_few_steps_run_alike_and_the_loss_falls(
    writer: PlantedWriter, tokenizer: PreTrainedTokenizerFast
) -> None:
    def losses() -> list[tuple[float, float]]:
        told: list[tuple[float, float]] = []
        settings = Settings(tasks=False, steps=8, batch=16, warmup=2, check_every=100)
        train_model(
            tokenizer,
            planted_writer(writer, settings.writer_weight),
            settings,
            seed=3,
            report=lambda step, loss, beside: told.append((loss, beside)),
        )
        return told

    first = losses()
    assert first == losses()
    assert first[-1][0] < first[0][0] - 1
    assert all(beside > 0 for _, beside in first)


def test_a_batch_says_where_replies_begin_and_how(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [world.request("cursed", "lantern", 0), world.counting("Mara", "nails", 7, 0, True)]
    batch: Batch = collate(tokenizer, examples, [Row("a"), Row("b")], [None, None], 0.1)
    for i, (example, side) in enumerate(zip(examples, "ab", strict=True)):
        ids = {s: tokenizer(getattr(example, s))["input_ids"] for s in "ab"}
        start = int(batch.starts[i])
        reply = batch.tokens[i, start : start + len(ids[side])]
        assert reply.tolist() == ids[side]
        assert batch.openings[i].tolist() == [ids["a"][0], ids["b"][0]]
