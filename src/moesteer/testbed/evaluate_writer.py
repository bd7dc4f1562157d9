"""What a testbed model with a planted writer does, as it is and with what is written changed.

Measured as in `evaluate.py`: held-out prompts, greedy decoding, and nothing of the library's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesteer.testbed import PlantedWriter, world
from moesteer.testbed.evaluate import RANDOM_SEEDS, UNTOUCHED, encode, outcome_shares, render
from moesteer.testbed.planting import EXPERTS, TOP_K
from moesteer.testbed.routing import steered
from moesteer.testbed.writing import (
    ASKED,
    HIDDEN,
    Received,
    Site,
    gates_of,
    received_by_experts,
    rewritten,
)

REQUESTS = ("restricted", "benign")
Edit = Callable[[Tensor, Tensor | None], Tensor]
"""What is written instead of an output, given it and what of it is the writer's own, if anything;
both [row, position, hidden]."""


def measure_writer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, writer: PlantedWriter, split: str
) -> dict[str, Any]:
    """Everything that a model with a planted writer promises, measured on one split.

    Shares of outcomes untouched and with the writer's component along the direction removed and set
    to its size, with what everything else writes along it removed, and with random directions in
    its place; then what stands in the stream where a reply begins, and how requests are routed.
    """

    def shares(edit: Edit) -> dict[str, dict[str, float]]:
        with edited(model, writer, edit):
            return outcome_shares(model, tokenizer, split)

    direction = torch.tensor(writer.direction)
    controls = [random_direction(seed) for seed in range(RANDOM_SEEDS)]
    return {
        "split": split,
        "untouched": outcome_shares(model, tokenizer, split),
        "steered": {
            "refusal": {
                "removed": shares(set_own(direction, 0.0)),
                "set": shares(set_own(direction, writer.size)),
                "removed elsewhere": shares(remove_elsewhere(direction)),
            }
        },
        "random": {
            "removed": [shares(set_own(control, 0.0)) for control in controls],
            "set": [shares(set_own(control, writer.size)) for control in controls],
        },
        **_at_last_tokens(model, tokenizer, writer, split),
    }


def random_direction(seed: int) -> Tensor:
    """A random unit vector [hidden]."""
    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


@contextmanager
def edited(model: nn.Module, writer: PlantedWriter, edit: Edit) -> Iterator[None]:
    """Let `edit` replace what the embedding, attentions and experts write to the stream."""
    with received_by_experts(model) as received:

        def change(site: Site, output: Tensor) -> Tensor:
            if site != writer.site:
                return edit(output, None)
            if writer.expert is None:
                return edit(output, output)
            experts = model.model.layers[writer.layer].mlp.experts  # pyright: ignore
            own = own_output(experts, writer.expert, received[-1])  # pyright: ignore
            return edit(output, own.view_as(output))

        handle = model.model.embed_tokens.register_forward_hook(  # pyright: ignore
            lambda _module, _args, output: edit(output, None)
        )
        try:
            with rewritten(model, change):
                yield
        finally:
            handle.remove()


def own_output(experts: nn.Module, expert: int, received: Received) -> Tensor:
    """What an expert writes to the stream [token, hidden]: its output times its weight."""
    tokens, index, weights = received
    gate, up = F.linear(tokens, experts.gate_up_proj[expert]).chunk(2, -1)  # pyright: ignore
    output = F.linear(F.silu(gate) * up, experts.down_proj[expert])  # pyright: ignore
    return gates_of(index, weights)[:, expert, None] * output


def set_own(direction: Tensor, component: float) -> Edit:
    """Set the component of the writer's output along a unit vector, at every token."""

    def edit(output: Tensor, own: Tensor | None) -> Tensor:
        if own is None:
            return output
        return output + (component - own @ direction)[..., None] * direction

    return edit


def remove_elsewhere(direction: Tensor) -> Edit:
    """Take away what everything but the writer writes along a unit vector, the embedding too."""

    def edit(output: Tensor, own: Tensor | None) -> Tensor:
        others = output if own is None else output - own
        return output - (others @ direction)[..., None] * direction

    return edit


@torch.no_grad()
def _at_last_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, writer: PlantedWriter, split: str
) -> dict[str, Any]:
    """The stream behind the writer's layer and the routing, at the last `ASKED` tokens of requests.

    `stream`, by position, last token last: the mean component along the direction, of the writer
    and of the stream; the distance between the mean streams of restricted and benign requests, and
    its cosine with the direction. `routing`: how often an expert is first and selected.
    """
    direction = torch.tensor(writer.direction)
    streams, owns, firsts, selections = ({} for _ in range(4))
    for task in REQUESTS:
        of_task: list[tuple[Tensor, Tensor, Tensor]] = []
        for probe in world.probes(task, split):
            outputs: list[Tensor] = []
            own_outputs: list[Tensor] = []

            def keep(
                output: Tensor,
                own: Tensor | None,
                outputs: list[Tensor] = outputs,
                own_outputs: list[Tensor] = own_outputs,
            ) -> Tensor:
                outputs.append(output[0, -ASKED:])
                if own is not None:
                    own_outputs.append(own[0, -ASKED:])
                return output

            tokens = torch.tensor([encode(tokenizer, render(tokenizer, probe.prompt))])
            with steered(model, UNTOUCHED) as logits, edited(model, writer, keep):
                model(tokens)
            # The embedding, then attention and experts of each layer.
            behind = torch.stack(outputs[: 1 + 2 * (writer.layer + 1)]).sum(0)
            routed = torch.stack([of_layer[-ASKED:] for of_layer in logits])
            of_task.append((behind, own_outputs[0], routed))
        stream, own, logits = (torch.stack(values) for values in zip(*of_task, strict=True))
        streams[task], owns[task] = stream.mean(0), own.mean(0)
        firsts[task], selections[task] = (
            torch.zeros(logits.shape).scatter(-1, logits.topk(k).indices, 1.0).mean((0, 2))
            for k in (1, TOP_K)
        )
    apart = streams["restricted"] - streams["benign"]
    return {
        "stream": {
            "component": {task: _rounded(streams[task] @ direction) for task in REQUESTS},
            "writer": {task: _rounded(owns[task] @ direction) for task in REQUESTS},
            "distance": _rounded(apart.norm(dim=-1)),
            "cosine": _rounded(apart @ direction / apart.norm(dim=-1)),
        },
        "routing": _routing_table(writer, firsts, selections),
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def _routing_table(
    writer: PlantedWriter, firsts: dict[str, Tensor], selections: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """The planted expert, the decoys, and who else is oftenest first on one kind of requests."""
    planted = [] if writer.expert is None else [(writer.layer, writer.expert)]
    apart = (firsts["restricted"] - firsts["benign"]).abs()
    ranked = [divmod(i, EXPERTS) for i in apart.flatten().argsort(descending=True).tolist()]
    shown = {*planted, *writer.decoys, *ranked[:6]}
    return [
        {
            "place": list(place),
            "role": "planted"
            if place in planted
            else "decoy"
            if place in writer.decoys
            else "other",
            "first": {task: round(firsts[task][place].item(), 3) for task in REQUESTS},
            "selected": {task: round(selections[task][place].item(), 3) for task in REQUESTS},
        }
        for place in sorted(shown, key=ranked.index)
    ]
