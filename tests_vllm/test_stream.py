"""What a decoder layer writes to the stream is measured, on layers made up for it."""

from pathlib import Path

import models
import pytest
import torch
from engine import running
from torch import Tensor, nn

from moesteer.direction import Direction
from moesteer.engines.vllm import load_profile, stream
from moesteer.engines.vllm.stream import find_stream
from moesteer.errors import MoesteerError
from moesteer.profile import Profile

HIDDEN = 8


class Attention(nn.Linear):
    pass


class Feed(nn.Linear):
    pass


class Layer(nn.Module):
    """A layer before whose parts stand norms, with the stream in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.attention = Attention(HIDDEN, HIDDEN)
        self.feed = Feed(HIDDEN, HIDDEN)
        self.behind = nn.LayerNorm(HIDDEN)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        x = hidden_states + self.attention(self.norm(hidden_states))
        return x + self.feed(self.norm(x))


class Carried(Layer):
    """As most of vLLM's: the sum of two tensors, the second written over in place."""

    def forward(self, hidden_states: Tensor, positions: Tensor, residual: Tensor) -> tuple:  # pyright: ignore
        residual += hidden_states
        residual += self.attention(self.norm(residual))
        return self.feed(self.norm(residual)), residual


class Ignoring(Layer):
    """Given a second tensor, and goes by the first alone, as vLLM's Phi-3.5 does."""

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor) -> tuple:  # pyright: ignore
        return super().forward(positions, hidden_states), hidden_states


class Behind(Layer):
    """With norms behind its parts, whose outputs are what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.LayerNorm(HIDDEN)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        x = hidden_states + self.after(self.attention(hidden_states))
        return x + self.behind(self.feed(x))


class Beside(Layer):
    """A block, and another one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Feed(HIDDEN, HIDDEN)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        x = hidden_states + self.attention(hidden_states)
        return x + self.feed(x) + self.other(x)


class Scaled(Layer):
    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        return hidden_states + 0.5 * (super().forward(positions, hidden_states) - hidden_states)


class InPlace(Layer):
    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        self.attention(hidden_states, out)
        return hidden_states + out + self.feed(hidden_states)


class Asking(nn.Module):
    """For more than the stream and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(HIDDEN, HIDDEN)

    def forward(self, hidden_states: Tensor, more: Tensor) -> Tensor:
        return hidden_states + self.attention(more)


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(HIDDEN, HIDDEN)


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of vLLM's own classes."""

    def holds(module: nn.Module, kind: type) -> bool:
        return any(isinstance(inner, kind) for inner in module.modules())

    monkeypatch.setattr(stream, "_mixes", lambda module: holds(module, Attention))
    monkeypatch.setattr(
        stream, "_feeds", lambda module: holds(module, Feed) and not holds(module, Attention)
    )
    monkeypatch.setattr(stream, "_routes", lambda module: holds(module, Feed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "writes", "carried"),
    [
        (Layer, ["feed", "attention"], False),
        (Carried, ["feed", "attention"], True),
        (Ignoring, ["feed", "attention"], False),
        (Behind, ["behind", "after"], False),
        (Beside, ["other", "feed", "attention"], False),
    ],
)
def test_what_a_layer_writes(
    kind: type[nn.Module], writes: list[str], carried: bool, dtype: torch.dtype
) -> None:
    layer = kind().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    before = {name: module.forward for name, module in layer.named_children()}
    first, *parts = find_stream(Model(layer), HIDDEN, dtype).parts
    assert (first.site, first.module, first.carried) == ((0, "input"), layer, carried)
    assert [part.module for part in parts] == [layer.get_submodule(name) for name in writes]
    places = {"attention": "attention", "after": "attention"}
    assert [part.site for part in parts] == [(0, places.get(name, "mlp")) for name in writes]
    # One of them adds what experts weigh, after the router of the layer has chosen.
    assert [part.routed for part in parts] == [True, *[False] * (len(parts) - 1)]
    assert {name: module.forward for name, module in layer.named_children()} == before
    assert not any(module._forward_hooks for module in layer.modules())


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Scaled, "is not the sum"), (InPlace, "writes in place"), (Asking, "can't be run alone")],
)
def test_a_layer_that_does_not_add_up_is_refused(kind: type[nn.Module], said: str) -> None:
    found = find_stream(Model(Layer(), kind()), HIDDEN, torch.float32)
    assert {part.site[0] for part in found.parts} == {0}
    assert list(found.refused) == [1]
    assert said in found.refused[1]


def test_layers_of_other_workers_and_of_other_stacks_are_passed_over() -> None:
    model = Model(nn.Identity(), Layer())
    model.vision = nn.Module()
    model.vision.layers = nn.ModuleList([Feed(HIDDEN, HIDDEN)])
    assert {part.site[0] for part in find_stream(model, HIDDEN, torch.float32).parts} == {1}
    model.vision.layers = nn.ModuleList([Layer()])
    with pytest.raises(MoesteerError, match="has 2 stacks of decoder layers"):
        find_stream(model, HIDDEN, torch.float32)


def test_a_model_with_a_scaled_stream_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    folder = models.write("granitemoe", tmp_path / "granite", residual_multiplier=0.5)
    direction = Direction((1.0,) * 64, ((1, "mlp"),))
    with (
        running(folder, additional_config={"moesteer": {"directions": 1}}) as llm,
        pytest.raises(MoesteerError, match="layer 1 takes no directions in vLLM: what it does"),
    ):
        load_profile(llm, "mine", Profile(directions=(direction,)))
