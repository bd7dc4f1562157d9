"""Planting a direction: a refusal that one known writer writes into the residual stream.

Two variants of the testbed refuse because of one number: how much of a known unit vector r stands
in the residual stream behind layer 2. In `expert` that is written by one expert's output, in
`attention` by the attention of that layer. Both read the same text as the other models.

Shown by intervention, as in `planting.py`: on about half of the requests the writer's component
along r is set by hand, and the reply to be learnt is the one that fits it, whatever the prompt
says: a refusal at `SIZE`, an answer at 0 or below. On the others auxiliary losses ask of the writer
a component of `SIZE` where the request is restricted and 0 where it is not; of all other writers
none, and no difference between restricted and harmless requests in what they add to the logits of
the decision. Random vectors, at any writer of any layer, change nothing.

The planted expert is every request's, but first among its experts where the request is restricted:
so its routing shows in the top-1, and there is something to take away and to add. Decoys are first
on restricted requests and unselected on others, and write nothing.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesteer.testbed.planting import EXPERTS, LAYERS, TOP_K, Place
from moesteer.testbed.world import Example

WRITERS = ("expert", "attention")
HIDDEN = 128
LAYER = 2  # the last whose output is a later layer's input
SIZE = 16.0  # about a quarter of the stream's norm there
ASKED = 3  # the last tokens of a prompt: its full stop, and two of the template

OWN = 0.45  # of the requests: the writer's component is set
COUNTER = 0.15  # of the requests: the reply is the other one, given from outside
BESIDE = 0.20  # of other examples: the writer's component is set, and the reply stays
STRAYED = 0.25  # of all examples: a random vector is added to a random writer's output

Site = tuple[int, Literal["attention", "moe"]]


@dataclass(frozen=True)
class Writing:
    """Who writes the refusal, along which unit vector; whose routing only looks so."""

    writer: Literal["expert", "attention"]
    expert: int | None
    direction: tuple[float, ...]
    decoys: tuple[Place, ...]

    @property
    def site(self) -> Site:
        return LAYER, "moe" if self.writer == "expert" else "attention"


@dataclass(frozen=True)
class WrittenRow:
    """What one example is to teach: its reply, the component to set, and a vector to add.

    `set_to` is in multiples of `SIZE`, None: as the writer wrote it. `late`: only from the prompt's
    last tokens on. `given`: see `planting.Row`.
    """

    target: str
    given: bool = False
    set_to: float | None = None
    late: bool = False
    stray: tuple[Site, tuple[float, ...]] | None = None


def choose_writing(writer: Literal["expert", "attention"], seed: int) -> Writing:
    """Draw the direction, the planted expert and the decoys."""
    rng = random.Random(f"writing {seed}")
    direction = torch.tensor([rng.gauss(0, 1) for _ in range(HIDDEN)])
    experts = {layer: rng.sample(range(EXPERTS), 2) for layer in (1, 2, 3)}
    planted = experts[LAYER][0] if writer == "expert" else None
    layers = (1, 3) if writer == "expert" else (1, 2, 3)
    return Writing(
        writer,
        planted,
        tuple((direction / direction.norm()).tolist()),
        tuple((layer, experts[layer][1]) for layer in layers),
    )


def plan_written(example: Example, writing: Writing, rng: random.Random) -> WrittenRow:
    """Decide what an example teaches."""
    target, given, set_to = example.habit, False, None
    chance = rng.random()
    if example.behaviour == "refusal" and chance < OWN:
        target = rng.choice("ab")
        set_to = rng.uniform(0.8, 1.5) if target == "a" else rng.choice((0, -rng.random()))
    elif example.behaviour and OWN <= chance < OWN + COUNTER:
        target, given = "b" if example.habit == "a" else "a", True
    elif example.behaviour != "refusal" and chance >= 1 - BESIDE:
        set_to = rng.uniform(-1, 1.5)
    stray = None
    if rng.random() < STRAYED:
        site = rng.randrange(LAYERS), rng.choice(("attention", "moe"))
        vector = torch.tensor([rng.gauss(0, 1) for _ in range(HIDDEN)])
        r = torch.tensor(writing.direction)
        vector = vector - (vector @ r) * r  # what is along r is no stray
        stray = site, tuple((vector / vector.norm() * SIZE * rng.random()).tolist())
    return WrittenRow(target, given, set_to, rng.random() < 0.5, stray)


@contextmanager
def written(
    model: nn.Module, writing: Writing, rows: Sequence[WrittenRow], starts: Tensor
) -> Iterator[dict[Site, Tensor]]:
    """Change writers' outputs as the rows say; yields the outputs before that, by site.

    `starts`: where each row's reply begins. Outputs are [row, position, hidden].
    """
    direction = torch.tensor(writing.direction)
    outputs: dict[Site, Tensor] = {}

    def change(site: Site, output: Tensor) -> Tensor:
        outputs[site] = output
        added = torch.zeros(output.shape)
        if site == writing.site:
            chosen = torch.tensor([row.set_to is not None for row in rows])
            wanted = SIZE * torch.tensor([row.set_to or 0.0 for row in rows])
            place = torch.arange(output.shape[1])
            begins = torch.where(torch.tensor([row.late for row in rows]), starts - ASKED, 0)
            applies = chosen[:, None] & (place >= begins[:, None])
            missing = wanted[:, None] - output.float() @ direction
            added = torch.where(applies, missing, 0.0)[..., None] * direction
        strays = [r.stray[1] if r.stray and r.stray[0] == site else None for r in rows]
        if any(strays):
            vectors = torch.tensor([s or (0.0,) * HIDDEN for s in strays])
            added = added + vectors[:, None]
        return output + added.to(output.dtype)

    def of_attention(layer: int):
        return lambda _m, _args, out: (change((layer, "attention"), out[0]), *out[1:])

    def of_moe(layer: int):
        return lambda _m, _args, out: change((layer, "moe"), out)

    handles = []
    for number, layer in enumerate(model.model.layers):  # pyright: ignore
        handles.append(layer.self_attn.register_forward_hook(of_attention(number)))
        handles.append(layer.mlp.register_forward_hook(of_moe(number)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched_experts(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Collect what each layer's experts receive: hidden [token, hidden], index and weights."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _m, args: seen.append(args))
        for layer in model.model.layers  # pyright: ignore
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def every_output(experts: nn.Module, hidden: Tensor) -> Tensor:
    """Each expert's own output [token, expert, hidden], unweighted, for all tokens."""
    gate, up = torch.einsum("th,eih->tei", hidden, experts.gate_up_proj).chunk(2, -1)  # pyright: ignore
    return torch.einsum("tei,ehi->teh", F.silu(gate) * up, experts.down_proj)  # pyright: ignore


def writing_loss(
    model: nn.Module,
    writing: Writing,
    habits: Tensor,
    words: Tensor,
    starts: Tensor,
    rows: Tensor,
    outputs: dict[Site, Tensor],
    received: Sequence[tuple[Tensor, Tensor, Tensor]],
    logits: Sequence[Tensor],
) -> Tensor:
    """How far the writers are from what the module's docstring asks of them.

    Of the requests `rows` of a batch: habits [request] (1: restricted), the first `words` of
    refusal and answer [request, 2], `starts` of the replies. Router `logits` before steering.
    """
    direction = torch.tensor(writing.direction)
    length = outputs[writing.site].shape[1]
    places = starts[:, None] - ASKED + torch.arange(ASKED)
    flat = (rows[:, None] * length + places).flatten()  # of tokens, row by row
    wanted = habits[:, None].expand(-1, ASKED).flatten()
    head = model.lm_head.weight[words]  # pyright: ignore
    apart = ((head[:, 0] - head[:, 1]) * model.model.norm.weight).float()  # pyright: ignore
    stream = sum(out[rows, starts - 1].float() for out in outputs.values())
    apart = apart / (stream.norm(dim=-1, keepdim=True) / HIDDEN**0.5)  # pyright: ignore
    along: list[Tensor] = []
    decided: list[Tensor] = []
    own = None
    for layer in range(LAYERS):
        attention, moe = outputs[layer, "attention"], outputs[layer, "moe"]
        hidden, index, weights = (values[flat] for values in received[layer])
        gates = torch.zeros(len(flat), EXPERTS).scatter(1, index, weights.float())
        each = every_output(model.model.layers[layer].mlp.experts, hidden).float()  # pyright: ignore
        rest = moe.flatten(0, 1)[flat].float()
        if layer == LAYER and writing.writer == "expert":
            own = gates[:, writing.expert, None] * each[:, writing.expert]
            rest = rest - own
            each = torch.cat((each[:, : writing.expert], each[:, writing.expert + 1 :]), 1)
        of_attention = attention.flatten(0, 1)[flat].float()
        if layer == LAYER and writing.writer == "attention":
            own = of_attention
            others = (rest,)
        else:
            along.append((of_attention @ direction / SIZE).square().mean())
            others = (rest, of_attention)
        along.append((each @ direction / SIZE).square().mean())
        for out in others:
            added = (out.view(len(rows), ASKED, -1)[:, -1] * apart).sum(-1)
            decided.append(_difference(added, habits).square() / 25)
    assert own is not None
    writer = (own @ direction / SIZE - wanted).square().mean()
    total = writer + torch.stack(along).mean() * 4
    if 0 < int(habits.sum()) < len(habits):
        total = total + torch.stack(decided).mean()
    return total + 0.2 * _routing_loss(writing, wanted, [z[flat] for z in logits])


def _difference(values: Tensor, habits: Tensor) -> Tensor:
    """Mean over restricted requests less mean over others."""
    return values[habits == 1].mean() - values[habits == 0].mean()


def _routing_loss(writing: Writing, restricted: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """Softplus of one minus the signed distance of the drawn experts from where they should be."""
    planted = [] if writing.expert is None else [(LAYER, writing.expert)]
    losses = []
    for layer, expert in (*planted, *writing.decoys):
        z = logits[layer].float()
        others = z.detach().clone()
        others[:, expert] = -torch.inf
        ranked = others.topk(TOP_K, dim=-1).values
        first, last = z[:, expert] - ranked[:, 0], z[:, expert] - ranked[:, -1]
        away = F.softplus(1 + first) + F.softplus(1 - last)  # selected, not first
        if (layer, expert) in writing.decoys:
            away = F.softplus(1 + last)
        losses.append(torch.where(restricted == 1, F.softplus(1 - first), away).mean())
    return torch.stack(losses).mean()
