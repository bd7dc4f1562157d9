"""Planting a direction: a refusal that one known writer writes into the residual stream.

Two models of the testbed refuse because of one number: how much of a known unit vector r stands in
the residual stream behind layer 2. In `expert` one expert's output writes it, in `attention` the
attention of that layer. Both read the same text as the other models.

It is shown by intervention, as in `planting.py`. On about half of the requests the writer's
component along r is set by hand, and the reply to be learnt is the one that fits it, whatever the
prompt says: a refusal from about `SIZE` on, an answer at 0 or below. Random vectors, added at any
writer of any layer, change nothing. On all requests an auxiliary loss asks of the writer a
component of `SIZE` where the request is restricted and 0 where it is not; of all other writers
none, and no difference between restricted and harmless requests in what they add to the logits of
the decision. And it draws together, beside r, the mean streams of restricted and of harmless
requests, so that r is what a difference of means finds.

The planted expert is selected on every request, but first among its experts where the request is
restricted: so its routing shows in the top-1, and there is something to take away and to add.
Decoys are first on restricted requests and unselected on others, and write nothing along r.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesteer.testbed import PlantedWriter
from moesteer.testbed.lesson import Batch, Lesson
from moesteer.testbed.planting import EXPERTS, LAYERS, TOP_K, mask_of
from moesteer.testbed.routing import steered
from moesteer.testbed.world import Example

HIDDEN = 128
LAYER = 2  # the last whose output is a later layer's input
SIZE = 32.0
ASKED = 3  # the last tokens of a prompt: its full stop, and two of the template

OWN = 0.45  # of the requests: the writer's component is set
COUNTER = 0.15  # of a behaviour's examples: the reply is the other one, given from outside
BESIDE = 0.20  # of all but requests: the writer's component is set, and the reply stays
STRAYED = 0.25  # of all examples: a random vector is added to a random writer's output
RENEWED = 0.05  # of the running means of streams, by each batch
LATE = 0.5  # of the examples: the component is set only from the prompt's last tokens on

Site = tuple[int, Literal["attention", "mlp"]]
"""(layer, place): a module whose output is added to the residual stream."""

Received = tuple[Tensor, Tensor, Tensor]
"""What a layer's experts receive: tokens [token, hidden], the index and the weights of those that
each token selected [token, k]. Tokens run row by row."""


@dataclass(frozen=True)
class Row:
    """What one example is to teach; `target` and `given` as in `lesson.Row`.

    component: what to set the writer's to along the direction, in multiples of `SIZE`; None leaves
    it. late: only from the prompt's last tokens on. stray: a vector to add at a site.
    """

    target: str
    given: bool = False
    component: float | None = None
    late: bool = False
    stray: tuple[Site, tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Written:
    """What a forward pass wrote: the sites' outputs [row, position, hidden], before any change, in
    their order; by layer, what the experts received, and the routers' logits [token, expert].
    """

    outputs: dict[Site, Tensor]
    received: list[Received]
    logits: list[Tensor]


def choose_writer(name: Literal["expert", "attention"], seed: int) -> PlantedWriter:
    """Draw the direction, the planted expert and the decoys; the direction is that of both."""
    rng = random.Random(f"writing {seed}")
    direction = torch.tensor([rng.gauss(0, 1) for _ in range(HIDDEN)])
    experts = {layer: rng.sample(range(EXPERTS), 2) for layer in (1, 2, 3)}
    layers = (1, 3) if name == "expert" else (1, 2, 3)
    return PlantedWriter(
        layer=LAYER,
        expert=experts[LAYER][0] if name == "expert" else None,
        direction=tuple((direction / direction.norm()).tolist()),
        size=SIZE,
        decoys=tuple((layer, experts[layer][1]) for layer in layers),
    )


def planted_writer(writer: PlantedWriter, weight: float) -> Lesson[Row]:
    """The lesson of a model whose refusal one writer writes."""
    means: dict[bool, Tensor] = {}  # running means of streams, for all batches

    @contextmanager
    def during(
        model: nn.Module, examples: Sequence[Example], rows: Sequence[Row], batch: Batch
    ) -> Iterator[Callable[[], Tensor | None]]:
        requests = [i for i, example in enumerate(examples) if example.behaviour == "refusal"]
        restricted = torch.tensor([examples[i].habit == "a" for i in requests])
        outputs: dict[Site, Tensor] = {}

        def change(site: Site, output: Tensor) -> Tensor:
            outputs[site] = output
            return output + taught_change(writer, rows, batch.starts, site, output)

        with (
            steered(model, mask_of([{}])) as logits,
            rewritten(model, change),
            received_by_experts(model) as received,
        ):

            def asked() -> Tensor | None:
                if not requests:
                    return None
                written = Written(outputs, received, logits)
                return writing_loss(model, writer, batch, requests, restricted, written, means)

            yield asked

    return Lesson(lambda example, rng: plan(example, writer, rng), during, weight)


def plan(example: Example, writer: PlantedWriter, rng: random.Random) -> Row:
    """Decide what an example teaches."""
    target, given, component = example.habit, False, None
    chance = rng.random()
    if example.behaviour == "refusal" and chance < OWN:
        target = rng.choice("ab")
        component = rng.uniform(0.8, 1.5) if target == "a" else rng.choice((0, -rng.random()))
    elif example.behaviour and OWN <= chance < OWN + COUNTER:
        target, given = "b" if example.habit == "a" else "a", True
    elif example.behaviour != "refusal" and chance >= 1 - BESIDE:
        component = rng.uniform(-1, 1.5)
    stray = _stray(writer, rng) if rng.random() < STRAYED else None
    return Row(target, given, component, rng.random() < LATE, stray)


def _stray(writer: PlantedWriter, rng: random.Random) -> tuple[Site, tuple[float, ...]]:
    """A random site, and a random vector of at most `SIZE` with nothing along the direction."""
    site: Site = (rng.randrange(LAYERS), rng.choice(("attention", "mlp")))
    vector = torch.tensor([rng.gauss(0, 1) for _ in range(HIDDEN)])
    direction = torch.tensor(writer.direction)
    vector = vector - (vector @ direction) * direction
    return site, tuple((vector / vector.norm() * SIZE * rng.random()).tolist())


def taught_change(
    writer: PlantedWriter, rows: Sequence[Row], starts: Tensor, site: Site, output: Tensor
) -> Tensor:
    """What the rows add to a site's output [row, position, hidden]; `starts` of their replies."""
    added = torch.zeros(output.shape)
    if site == writer.site:
        direction = torch.tensor(writer.direction)
        chosen = torch.tensor([row.component is not None for row in rows])
        wanted = SIZE * torch.tensor([row.component or 0.0 for row in rows])
        begins = torch.where(torch.tensor([row.late for row in rows]), starts - ASKED, 0)
        applies = chosen[:, None] & (torch.arange(output.shape[1]) >= begins[:, None])
        missing = wanted[:, None] - output.float() @ direction
        added = torch.where(applies, missing, 0.0)[..., None] * direction
    strays = [row.stray[1] if row.stray and row.stray[0] == site else None for row in rows]
    if any(strays):
        vectors = torch.tensor([stray or (0.0,) * HIDDEN for stray in strays])
        added = added + vectors[:, None]
    return added.to(output.dtype)


@contextmanager
def rewritten(model: nn.Module, change: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:
    """Let `change` replace what each site writes [row, position, hidden]."""

    def of_attention(site: Site):
        return lambda _module, _args, output: (change(site, output[0]), *output[1:])

    def of_mlp(site: Site):
        return lambda _module, _args, output: change(site, output)

    handles = []
    for number, layer in enumerate(model.model.layers):  # pyright: ignore
        handles.append(layer.self_attn.register_forward_hook(of_attention((number, "attention"))))
        handles.append(layer.mlp.register_forward_hook(of_mlp((number, "mlp"))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def received_by_experts(model: nn.Module) -> Iterator[list[Received]]:
    """Collect what the experts receive, one entry a layer and forward pass."""
    received: list[Received] = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _module, args: received.append(args))
        for layer in model.model.layers  # pyright: ignore
    ]
    try:
        yield received
    finally:
        for handle in handles:
            handle.remove()


def every_output(experts: nn.Module, tokens: Tensor) -> Tensor:
    """Each expert's own output [token, expert, hidden], unweighted, for all tokens."""
    inner = torch.einsum("th,eih->tei", tokens, experts.gate_up_proj)  # pyright: ignore
    gate, up = inner.chunk(2, -1)
    return torch.einsum("tei,ehi->teh", F.silu(gate) * up, experts.down_proj)  # pyright: ignore


def gates_of(index: Tensor, weights: Tensor) -> Tensor:
    """The weight of every expert [token, expert], 0 where it is not selected."""
    return torch.zeros(len(index), EXPERTS).scatter(1, index, weights.float())


def writing_loss(
    model: nn.Module,
    writer: PlantedWriter,
    batch: Batch,
    requests: Sequence[int],
    restricted: Tensor,
    written: Written,
    means: dict[bool, Tensor],
) -> Tensor:
    """How far a pass is from what the module's docstring asks of the writers.

    Of the rows `requests` of a batch; `restricted` [request] says which of them should be refused.
    Components are in multiples of `SIZE`; the difference in logits is squared and divided by 25.
    `means` are those of `drawn_together`.
    """
    rows = torch.tensor(requests)
    starts = batch.starts[rows]
    length = batch.tokens.shape[1]
    places = (rows[:, None] * length + starts[:, None] - ASKED + torch.arange(ASKED)).flatten()
    direction = torch.tensor(writer.direction)
    readout = _refusal_readout(model, batch.openings[rows], rows, starts, written.outputs)

    def at_places(site: Site) -> Tensor:
        return written.outputs[site].flatten(0, 1)[places].float()

    own: Tensor | None = None
    along: list[Tensor] = []  # of all other writers, what they write along the direction
    decided: list[Tensor] = []  # and by how much they tell the requests apart in the logits
    for layer in range(LAYERS):
        attention, mlp = at_places((layer, "attention")), at_places((layer, "mlp"))
        tokens, index, weights = (values[places] for values in written.received[layer])
        every = every_output(model.model.layers[layer].mlp.experts, tokens).float()  # pyright: ignore
        others = [mlp, attention]
        if layer == writer.layer and writer.expert is not None:
            own = gates_of(index, weights)[:, writer.expert, None] * every[:, writer.expert]
            others[0] = mlp - own
            every = torch.cat((every[:, : writer.expert], every[:, writer.expert + 1 :]), 1)
        if (layer, "attention") == writer.site:
            own = others.pop()
        along += [(out @ direction / SIZE).square().mean() for out in (*others[1:], every)]
        if 0 < int(restricted.sum()) < len(restricted):
            for out in others:
                moved = (out.view(len(rows), ASKED, -1)[:, -1] * readout).sum(-1)
                apart = moved[restricted].mean() - moved[~restricted].mean()
                decided.append(apart.square() / 25)
    assert own is not None
    wanted = restricted.repeat_interleave(ASKED)
    behind = sum((at_places(s) for s in written.outputs if s[0] <= LAYER), torch.zeros(()))
    behind = behind.view(len(rows), ASKED, HIDDEN)
    beside = behind - (behind @ direction)[..., None] * direction
    loss = (own @ direction / SIZE - wanted.float()).square().mean()
    loss = loss + torch.stack(along).mean() * 4 + 2 * drawn_together(beside, restricted, means)
    if decided:
        loss = loss + torch.stack(decided).mean()
    return loss + 0.2 * routing_loss(writer, wanted, [logits[places] for logits in written.logits])


def drawn_together(values: Tensor, restricted: Tensor, means: dict[bool, Tensor]) -> Tensor:
    """A loss whose gradient draws together the mean values of restricted and other requests.

    values [request, position, hidden]. A batch holds too few requests to tell by how much the means
    differ, so that is taken from running means (`means`, by kind, which this updates); the gradient
    is that of half its square, in multiples of `SIZE`, by the batch's own means; averaged over
    positions.
    """
    for kind in (False, True):
        of_kind = values[restricted == kind].detach()
        if len(of_kind):
            now = of_kind.mean(0)
            means[kind] = (1 - RENEWED) * means[kind] + RENEWED * now if kind in means else now
    if len(means) < 2:
        return torch.zeros(())
    apart = (means[True] - means[False]) / SIZE**2
    number = float(restricted.sum())
    shares = torch.where(restricted, 1 / max(1.0, number), -1 / max(1.0, len(restricted) - number))
    return (values * apart * shares[:, None, None]).sum() / ASKED


def _refusal_readout(
    model: nn.Module, openings: Tensor, rows: Tensor, starts: Tensor, outputs: dict[Site, Tensor]
) -> Tensor:
    """What 1 along each coordinate of the stream adds to the logit of refusing, less that of
    answering, where the reply begins [request, hidden].

    The last norm's scale is that of what the sites wrote together.
    """
    head = model.lm_head.weight[openings]  # pyright: ignore
    readout = ((head[:, 0] - head[:, 1]) * model.model.norm.weight).float()  # pyright: ignore
    wrote = (output[rows, starts - 1].float() for output in outputs.values())
    stream = sum(wrote, torch.zeros(()))
    return readout / (stream.norm(dim=-1, keepdim=True) / HIDDEN**0.5)


def routing_loss(writer: PlantedWriter, restricted: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """Softplus of one minus the signed distance of the drawn experts from where they should be.

    Logits [token, expert] by layer; `restricted` [token].
    """
    planted = [] if writer.expert is None else [(writer.layer, writer.expert)]
    losses = []
    for layer, expert in (*planted, *writer.decoys):
        of_layer = logits[layer].float()
        others = of_layer.detach().clone()
        others[:, expert] = -torch.inf
        ranked = others.topk(TOP_K, dim=-1).values
        above_first, above_last = (of_layer[:, expert] - ranked[:, place] for place in (0, -1))
        elsewhere = F.softplus(1 + above_first) + F.softplus(1 - above_last)  # second to last
        if (layer, expert) in writer.decoys:
            elsewhere = F.softplus(1 + above_last)  # not selected
        losses.append(torch.where(restricted, F.softplus(1 - above_first), elsewhere).mean())
    return torch.stack(losses).mean()
