"""The measurements against plain hooks, and the choice against a table that is gone through."""

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from made_models import Made, made_sets
from moesteer.direction import Candidates
from moesteer.directions.residual import residual_candidates
from moesteer.directions.selection import Thresholds, choose, every_write, score_candidates
from moesteer.errors import MoesteerError

Change = Callable[[torch.Tensor], torch.Tensor]


def table(
    bypass: list[float], induce: list[float], kl: list[float], layer: list[int]
) -> Candidates:
    number = len(bypass)
    return Candidates(
        "residual",
        np.array(layer),
        np.full(number, -1),
        np.full(number, -1),
        np.ones((number, 4), np.float32),
        {"bypass": np.array(bypass), "induce": np.array(induce), "kl": np.array(kl)},
    )


# --- the measurements -----------------------------------------------------------------------------


def after(made: Made, ids: tuple[int, ...], hooks: Callable[[ExitStack], None]) -> torch.Tensor:
    """log P of every token after a prompt, in fp64, with plain hooks on the model."""
    with ExitStack() as stack, torch.no_grad():
        hooks(stack)
        return made.engine.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def entering(module: torch.nn.Module, change: Change, stack: ExitStack) -> None:
    hook = module.register_forward_pre_hook(lambda _m, args: (change(args[0]), *args[1:]))
    stack.callback(hook.remove)


def leaving(module: torch.nn.Module, change: Change, stack: ExitStack) -> None:
    def leave(_m: object, _a: object, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    stack.callback(module.register_forward_hook(leave).remove)


@pytest.mark.parametrize("dense", [False, True])
def test_candidates_are_scored_as_with_plain_hooks(dense: bool):
    made = made_sets(dense)
    a, b, tokens = made.sets.validation.a, made.sets.validation.b, list(made.sets.tokens)
    candidates = residual_candidates(made.engine, made.sets, 2, batch_size=4)
    told: list[int] = []
    scores = score_candidates(made.engine, made.sets, candidates, progress=told.append)
    assert sum(told) == len(candidates) * (len(a) + 2 * len(b))
    layers = list(made.engine.model.model.layers)
    assert len(candidates) == (len(layers) - 1) * 2  # all but the first layer's, where norm is 0

    def odds(logs: torch.Tensor) -> float:
        inside = logs[tokens].logsumexp(0)
        others = torch.ones_like(logs, dtype=torch.bool)
        others[tokens] = False
        return float(inside - logs[others].logsumexp(0))

    for number, layer in enumerate(candidates.layer.tolist()):
        r = torch.tensor(candidates.vector[number])
        unit = r / r.norm()

        def ablate(stack: ExitStack, unit: torch.Tensor = unit) -> None:
            def out(h: torch.Tensor) -> torch.Tensor:
                return h - (h @ unit).unsqueeze(-1) * unit

            for block in layers:
                entering(block, out, stack)
                leaving(block.self_attn, out, stack)
                leaving(block.mlp, out, stack)

        def add(stack: ExitStack, r: torch.Tensor = r, layer: int = layer) -> None:
            entering(layers[layer], lambda h: h + r, stack)

        bypass = np.mean([odds(after(made, p.ids, ablate)) for p in a])
        induce = np.mean([odds(after(made, p.ids, add)) for p in b])
        kl = []
        for prompt in b:
            p, q = after(made, prompt.ids, lambda _: None), after(made, prompt.ids, ablate)
            kl.append(float((p.exp() * (p - q)).sum()))
        assert scores["bypass"][number] == pytest.approx(bypass, abs=1e-2)
        assert scores["induce"][number] == pytest.approx(induce, abs=1e-2)
        assert scores["kl"][number] == pytest.approx(np.mean(kl), abs=1e-3, rel=1e-3)


def test_every_write():
    assert every_write(2) == (
        *((0, "input"), (0, "attention"), (0, "mlp")),
        *((1, "input"), (1, "attention"), (1, "mlp")),
    )


# --- the choice -----------------------------------------------------------------------------------

numbers = st.sampled_from([-3.0, -1.0, 0.0, 0.05, 0.1, 0.2, 2.0])


@given(
    st.lists(st.tuples(numbers, numbers, numbers, st.integers(0, 9)), min_size=1, max_size=12),
    st.builds(
        Thresholds,
        max_kl=st.sampled_from([0.0, 0.1, 1.0]),
        min_induce=st.sampled_from([-2.0, 0.0, 1.0]),
        max_layer=st.sampled_from([0.2, 0.8, 1.0]),
    ),
)
def test_the_choice_is_that_of_going_through_the_table(
    rows: list[tuple[float, float, float, int]], thresholds: Thresholds
):
    best = None
    for number, (bypass, induce, kl, layer) in enumerate(rows):
        if kl > thresholds.max_kl or induce < thresholds.min_induce:
            continue
        if layer >= thresholds.max_layer * 10:
            continue
        if best is None or bypass < rows[best][0]:
            best = number
    candidates = table(*map(list, zip(*rows, strict=True)))
    if best is not None:
        assert choose(candidates, 10, thresholds) == best
        return
    with pytest.raises(MoesteerError, match=f"none of {len(rows)} directions"):
        choose(candidates, 10, thresholds)


def test_the_thresholds_are_those_of_the_paper():
    candidates = table(
        [-9, -8, -7, -6, -5], [1, -0.01, 1, 0, 5], [0.11, 0.0, 0.0, 0.1, 0.0], [1, 1, 8, 7, 7]
    )
    assert choose(candidates, 10, Thresholds()) == 3
    assert choose(candidates, 10, Thresholds(max_kl=0.2)) == 0
    assert choose(candidates, 10, Thresholds(min_induce=-1.0)) == 1
    assert choose(candidates, 10, Thresholds(max_layer=0.9)) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((-1.5, 1.0, 0.25, 3), ["its KL is 0.25, over 0.1 (--max-kl)."]),
        ((-1.5, -2.0, 0.0, 3), ["its induce is -2, under 0 (--min-induce)."]),
        ((-1.5, 1.0, 0.0, 8), ["its layer 8 is not below 0.8 × 10 (--max-layer)."]),
        ((-1.5, -2.0, 3.0, 3), ["over 0.1 (--max-kl); its induce is -2, under 0 (--min-induce)."]),
    ],
)
def test_the_nearest_is_named(row: tuple[float, float, float, int], words: list[str]):
    # Worse: another that breaks everything, with a lower bypass.
    rows = [(-9.0, -9.0, 9.0, 9), row]
    with pytest.raises(MoesteerError) as raised:
        choose(table(*map(list, zip(*rows, strict=True))), 10, Thresholds())
    said = str(raised.value)
    assert f"The nearest is of layer {row[3]}, position -1 (bypass -1.5)" in said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"max_kl": -0.1}, "--max-kl is -0.1"),
        ({"max_kl": float("nan")}, "--max-kl is nan"),
        ({"min_induce": float("inf")}, "--min-induce is inf"),
        ({"max_layer": 0.0}, "--max-layer is 0;"),
        ({"max_layer": 1.1}, "--max-layer is 1.1"),
    ],
)
def test_thresholds_that_make_no_sense(thresholds: dict[str, float], message: str):
    with pytest.raises(MoesteerError, match=message):
        Thresholds(**thresholds)
