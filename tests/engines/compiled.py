"""Steering under torch.compile, run by a test in a process of its own.

In the tests' own process the seam's functions carry shape checks, which break graphs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch.testing import assert_close

from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers.steering import checked_layers, steer
from moesteer.profile import Profile


def counting(inner: str) -> tuple[Callable, list[int]]:
    """A backend, and a list that grows by one with each graph it is given."""
    graphs: list[int] = []
    compiler = lookup_backend(inner)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return compiler(graph, inputs)

    return backend, graphs


def check(name: str, inner: str, *, rows: bool = False) -> None:
    """Compile once while steered; other experts in the same layers need no new graph.

    With `rows` also profiles by row, and the compiled model after steering: two graphs more.
    """
    torch._dynamo.reset()
    model = tiny_model(name)
    layers = checked_layers(model)
    low, high = layers[0].layer, layers[1].layer
    one = Profile(((low, 1), (high, 2)), ((low, 3), (high, 4)), name="one")
    other = Profile(((low, 5), (low, 6), (high, 0)), name="other")
    ids = torch.randint(3, 100, (2, 10), generator=torch.Generator().manual_seed(0))

    unsteered = model(ids).logits
    expected = {}
    for profile in (one, other):
        with steer(model, profile, layers):
            expected[profile.name] = model(ids).logits

    def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
        assert_close(found, wanted, atol=1e-4, rtol=1e-4)

    backend, graphs = counting(inner)
    with steer(model, one, layers) as fired:
        compiled = torch.compile(model, backend=backend)
        compiled(ids)
        alone = len(graphs)
        assert alone
        for profile in (one, other, one):
            fired.replace(profile)
            close(compiled(ids).logits, expected[profile.name])
            assert len(graphs) == alone, (name, graphs)
            assert all(seen.tokens == ids.numel() and seen.obeyed for seen in fired.evidence())

        if rows:
            fired.replace([one, other])
            compiled(ids)
            by_row = len(graphs)
            fired.replace([other, one])
            logits = compiled(ids).logits
            assert len(graphs) == by_row, (name, graphs)
            close(logits[0], expected["other"][0])
            close(logits[1], expected["one"][1])
            assert all(seen.tokens == ids.shape[1] and seen.obeyed for seen in fired.evidence())
    if rows:
        close(compiled(ids).logits, unsteered)


if __name__ == "__main__":
    with torch.no_grad():
        check("qwen3_moe", "eager", rows=True)
        check("deepseek_v3", "aot_eager")
        check("gpt_oss", "inductor")
