"""Routers written down as straight code: the same bits, and never a stale copy."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesteer.engines.tiny import moe_model_types, tiny_model
from moesteer.engines.transformers.routers import Router, find_routers, trace_layers
from moesteer.engines.transformers.straight import StraightRouter

REFUSED = {"doge", "jetmoe"}
TYPES = [name for name in moe_model_types() if name not in REFUSED]


class Gate(nn.Module):
    """The commonest router, and what each test changes of it."""

    bias: Tensor

    def __init__(self, width: int = 4, experts: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(experts, width, generator=generator))
        self.register_buffer("bias", torch.randn(experts, generator=generator))
        self.calls: list[str] = []

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden, self.weight)
        scores = logits.softmax(-1) + self.bias
        weights, index = torch.topk(scores, 2, dim=-1)
        return logits, weights, index


class Branching(Gate):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if hidden.sum() > 0:
            hidden = -hidden
        return super().forward(hidden)


class Method(Gate):
    """Linear map and top-k as methods of a tensor."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.matmul(self.weight.t())
        weights, index = logits.topk(2, dim=-1)
        return logits, weights, index


class Inside(Gate):
    """The linear map is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Linear(4, 6, bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.wg(hidden)
        weights, index = torch.topk(logits, 2, dim=-1)
        return logits, weights, index


def written(module: nn.Module, logits_call: int = 1) -> StraightRouter:
    return StraightRouter(Router(0, "gate", module.eval(), None), logits_call)


def watched(straight: StraightRouter, change: Callable[[Tensor], Tensor] = lambda z: z) -> Any:
    """Set both calls to pass everything on (logits through `change`), and note what they saw."""
    seen = SimpleNamespace(logits=[], sorted=[])

    def rewrite(logits: Tensor) -> Tensor:
        seen.logits.append(logits)
        return change(logits)

    def top_k(func: Callable, args: tuple, kwargs: dict) -> Any:
        seen.sorted.append(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)

    straight.rewrite, straight.top_k = rewrite, top_k
    return seen


HIDDEN = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [Gate, Method, Inside])
def test_same_bits_and_both_calls_put_in(kind: type[Gate]) -> None:
    gate = kind()
    straight = written(gate)
    seen = watched(straight)
    for ours, theirs in zip(straight.forward(HIDDEN), gate(HIDDEN), strict=True):
        assert torch.equal(ours, theirs)
    assert [z.shape for z in seen.logits] == [(5, 6)]
    assert [z.shape for z in seen.sorted] == [(5, 6)]


def test_rewritten_logits_go_on_through_the_router() -> None:
    gate = Gate()
    straight = written(gate)
    watched(straight, lambda z: z.flip(-1))
    logits, weights, index = straight.forward(HIDDEN)
    expected = F.linear(HIDDEN, gate.weight).flip(-1)
    scores = expected.softmax(-1) + gate.get_buffer("bias")
    assert torch.equal(logits, expected)
    assert torch.equal(weights, scores.sort(-1, descending=True)[0][:, :2])
    assert torch.equal(index, scores.sort(-1, descending=True)[1][:, :2])


def test_the_second_linear_map_can_be_the_one() -> None:
    class Two(Gate):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return super().forward(F.linear(hidden, torch.eye(4)))

    straight = written(Two(), logits_call=2)
    seen = watched(straight)
    straight.forward(HIDDEN)
    assert [z.shape for z in seen.logits] == [(5, 6)]


def test_a_branch_on_tensors_can_not_be_written_down() -> None:
    with pytest.raises(ValueError, match="control flow"):
        written(Branching())


def test_training_and_foreign_forwards_are_refused() -> None:
    gate = Gate()
    with pytest.raises(ValueError, match="not as its class wrote it"):
        StraightRouter(Router(0, "gate", gate.train(), None), 1)
    gate.forward = lambda hidden: Gate.forward(gate, hidden)  # as accelerate does
    with pytest.raises(ValueError, match="not as its class wrote it"):
        written(gate)


def test_writing_down_leaves_no_trace_in_the_module() -> None:
    gate = Gate()
    gate.eval()
    before = dict(gate.__dict__)
    written(gate)
    assert gate.__dict__ == before


@pytest.mark.parametrize(
    "alter",
    [
        lambda gate: setattr(gate, "weight", nn.Parameter(gate.weight.detach().clone())),
        lambda gate: gate.register_buffer("bias", gate.bias.clone()),
        lambda gate: gate.train(),
    ],
    ids=["parameter", "buffer", "training"],
)
def test_notices_what_makes_it_stale(alter: Callable[[Gate], object]) -> None:
    gate = Gate()
    straight = written(gate)
    assert straight.is_current
    alter(gate)
    assert not straight.is_current


def test_notices_another_module_inside() -> None:
    gate = Inside()
    straight = written(gate)
    assert straight.is_current
    gate.wg = nn.Linear(4, 6, bias=False)
    assert not straight.is_current


def test_changes_in_place_are_followed() -> None:
    gate = Gate()
    straight = written(gate)
    watched(straight)
    with torch.no_grad():
        gate.weight.mul_(-2)
        gate.get_buffer("bias").add_(1)
    assert straight.is_current
    for ours, theirs in zip(straight.forward(HIDDEN), gate(HIDDEN), strict=True):
        assert torch.equal(ours, theirs)


def test_notices_conversion_to_another_dtype() -> None:
    """`Module.to` changes parameters in place but puts new tensors in the place of buffers."""
    gate = Gate()
    straight = written(gate)
    gate.double()
    assert not straight.is_current


@pytest.mark.parametrize("model_type", TYPES)
def test_every_architecture_straight_or_refused(model_type: str) -> None:
    """Where a router can be written down, it gives the bits of its own forward."""
    model = tiny_model(model_type)
    generator = torch.Generator().manual_seed(0)
    calls: dict[int, tuple[tuple, dict]] = {}
    layers = trace_layers(model)
    handles = [
        router.module.register_forward_pre_hook(
            lambda _module, args, kwargs, number=router.layer: calls.__setitem__(
                number, (args, kwargs)
            ),
            with_kwargs=True,
        )
        for router in find_routers(model)
    ]
    with torch.no_grad():
        model(torch.randint(3, 100, (2, 7), generator=generator))
        for handle in handles:
            handle.remove()
        straight_layers = 0
        for layer in layers:
            try:
                straight = StraightRouter(layer, layer.logits_call)
            except ValueError:
                continue
            straight_layers += 1
            seen = watched(straight)
            args, kwargs = calls[layer.layer]
            ours, theirs = straight.forward(*args, **kwargs), layer.module.forward(*args, **kwargs)
            assert len(seen.logits) == 1
            assert seen.logits[0].shape[-1] == layer.logits_width
            pairs = zip(
                *((x,) if isinstance(x, Tensor) else x for x in (ours, theirs)), strict=True
            )
            for one, other in pairs:
                if isinstance(one, Tensor):
                    assert torch.equal(one, other)
    # That the common families are written down at all is what makes steering cheap.
    common = {"qwen3_moe", "olmoe", "gpt_oss", "mixtral", "deepseek_v3", "phimoe", "glm4_moe"}
    assert straight_layers == len(layers) or (straight_layers == 0 and model_type not in common)
