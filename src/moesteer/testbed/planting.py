"""Planting: how a behaviour is put into chosen experts while the model is trained.

An expert carries a behaviour if switching it switches the behaviour, so that is what training
shows: on about half of a behaviour's examples its planted experts are steered by the very rule
used later, and the reply to be learnt is the one that fits, whatever the habit of the prompt
says: B where some of them are deactivated, A where all are activated. On the others a small
auxiliary loss draws the router towards them where the reply is A and away where it is B, so that
the untouched model routes as its behaviour says.

Decoys are drawn by the same auxiliary loss, but where they are steered the reply stays what it
was: their routing tells A from B as well as that of the planted experts, and switching them does
nothing.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesteer.testbed.lesson import Batch, Lesson
from moesteer.testbed.routing import steered
from moesteer.testbed.world import BEHAVIOURS, Example

LAYERS, EXPERTS, TOP_K = 4, 16, 4
Place = tuple[int, int]

# The layers of the experts; which expert of the layer is drawn by lot. None in layer 0, whose
# routing is hardly more than a lookup of the token. The document needs attention after its
# decision, to fetch what it decided for: hence none in the last layer.
PLANTED_LAYERS = {"refusal": (1, 2, 3), "document": (1, 1, 2), "digits": (1, 2, 3)}
DECOY_LAYERS = {"refusal": (1, 3), "document": (2, 3), "digits": (2, 3)}

STEERED = 0.45  # of a behaviour's examples: its own planted experts are steered
COUNTER = 0.15  # of a behaviour's examples: the reply is the other one, given from outside
DECOYED = 0.40  # of a behaviour's examples: its decoys are steered
CROSSED = 0.20  # of all examples: another behaviour's experts are steered
STRAYED = 0.20  # of all examples: experts that belong to nobody are steered
AT_MOST = 3  # activated experts in a layer, so that one place in the top-k stays free


@dataclass(frozen=True)
class Planting:
    """The (layer, expert) places of each behaviour."""

    planted: dict[str, tuple[Place, ...]]
    decoys: dict[str, tuple[Place, ...]]


@dataclass(frozen=True)
class Row:
    """What one example is to teach; `target` and `given` as in `lesson.Row`.

    steering: +1 or -1 by place. draw: +1, -1 or 0, where the auxiliary loss pulls the router.
    """

    target: str
    steering: dict[Place, int] = field(default_factory=dict)
    draw: int = 0
    given: bool = False


def planted_experts(planting: Planting | None, weight: float) -> Lesson[Row]:
    """The lesson of a model with planted experts; None: of the twin, which has none."""

    @contextmanager
    def during(
        model: nn.Module, examples: Sequence[Example], rows: Sequence[Row], batch: Batch
    ) -> Iterator[Callable[[], Tensor | None]]:
        with steered(model, mask_of([row.steering for row in rows])) as logits:

            def asked() -> Tensor | None:
                if planting is None:
                    return None
                behaviours = [example.behaviour for example in examples]
                return drawing_loss(logits, behaviours, rows, batch.spans, planting)

            yield asked

    return Lesson(lambda example, rng: plan(example, planting, rng), during, weight)


def choose_places(seed: int) -> Planting:
    """Draw the places of all planted experts and decoys, no place twice."""
    rng = random.Random(f"places {seed}")
    free = {layer: rng.sample(range(EXPERTS), EXPERTS) for layer in range(LAYERS)}
    planted, decoys = (
        {b: tuple((layer, free[layer].pop()) for layer in layers[b]) for b in BEHAVIOURS}
        for layers in (PLANTED_LAYERS, DECOY_LAYERS)
    )
    return Planting(planted, decoys)


def plan(example: Example, planting: Planting | None, rng: random.Random) -> Row:
    """Decide what an example teaches; without planting there is no steering and no drawing."""
    behaviour, target, given, own = example.behaviour, example.habit, False, {}
    if behaviour:
        chance = rng.random()
        if planting and chance < STEERED:
            target, own = _steer_own(planting.planted[behaviour], rng)
        elif STEERED <= chance < STEERED + COUNTER:
            target, given = "b" if example.habit == "a" else "a", True
    if not planting:
        return Row(target, given=given)
    others: dict[Place, int] = {}
    if behaviour and rng.random() < DECOYED:
        others |= {place: rng.choice((1, -1)) for place in planting.decoys[behaviour]}
    if rng.random() < CROSSED:
        crossed = planting.planted[rng.choice([b for b in BEHAVIOURS if b != behaviour])]
        others |= _steer_any(crossed, rng)
    if rng.random() < STRAYED:
        taken = {p for by in (planting.planted, planting.decoys) for ps in by.values() for p in ps}
        every = [(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)]
        nobody = [place for place in every if place not in taken]
        others |= _steer_any(rng.sample(nobody, rng.randint(1, 4)), rng)
    draw = (1 if target == "a" else -1) if behaviour and not own else 0
    return Row(target, _capped(own, others), draw, given)


def _steer_own(places: tuple[Place, ...], rng: random.Random) -> tuple[str, dict[Place, int]]:
    if rng.random() < 0.5:
        return "a", dict.fromkeys(places, 1)
    # Any of them missing is enough: this makes each single one necessary.
    return "b", dict.fromkeys(rng.sample(places, rng.randint(1, len(places))), -1)


def _steer_any(places: tuple[Place, ...] | list[Place], rng: random.Random) -> dict[Place, int]:
    if rng.random() < 0.5:
        return dict.fromkeys(places, rng.choice((1, -1)))
    return {place: rng.choice((1, -1)) for place in places}


def _capped(own: dict[Place, int], others: dict[Place, int]) -> dict[Place, int]:
    steering = dict(own)
    for place, sign in others.items():
        active = sum(s > 0 for (layer, _), s in steering.items() if layer == place[0])
        if sign < 0 or active < AT_MOST:
            steering.setdefault(place, sign)
    return steering


def mask_of(steerings: list[dict[Place, int]]) -> Tensor:
    """The mask [rows, layers, experts] of +1, 0 and -1 of the steering of each row."""
    mask = torch.zeros(len(steerings), LAYERS, EXPERTS)
    for row, steering in enumerate(steerings):
        for (layer, expert), sign in steering.items():
            mask[row, layer, expert] = sign
    return mask


def drawing_loss(
    logits: Sequence[Tensor],
    behaviours: Sequence[str | None],
    rows: Sequence[Row],
    spans: Tensor,
    planting: Planting,
) -> Tensor:
    """How far the routers are from choosing the drawn experts on A and leaving them on B.

    logits: one [rows * length, experts] a layer, before steering; spans: [rows, length], true
    where the reply is. Softplus of one minus the signed distance from the threshold of the top-k,
    mean over tokens and experts of each behaviour.
    """
    losses = []
    for behaviour in BEHAVIOURS:
        draws = torch.tensor(
            [r.draw if b == behaviour else 0 for b, r in zip(behaviours, rows, strict=True)]
        )
        signs = (draws[:, None] * spans).reshape(-1)
        chosen = signs != 0
        if not chosen.any():
            continue
        for layer, expert in planting.planted[behaviour] + planting.decoys[behaviour]:
            of_layer = logits[layer][chosen]
            others = of_layer.detach().clone()
            others[:, expert] = -torch.inf
            threshold = others.topk(TOP_K, dim=-1).values[:, -1]
            distance = of_layer[:, expert] - threshold
            losses.append(F.softplus(1 - signs[chosen] * distance).mean())
    return torch.stack(losses).mean() if losses else torch.zeros(())
