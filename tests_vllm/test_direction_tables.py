"""What the tables of directions do to a token, against loops over tokens."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moesteer.direction import Direction, Site
from moesteer.engines.vllm.directions import PHASES, Directed, changed, fused_change, vectors_of
from moesteer.engines.vllm.stream import Part, Stream
from moesteer.engines.vllm.tables import Tables
from moesteer.model_facts import LayerShape

HIDDEN, EXPERTS, ROWS, TOKENS, ROOM = 5, 4, 3, 14, 6
SITES: tuple[Site, ...] = ((0, "input"), (0, "attention"), (0, "mlp"))
STREAM = Stream(
    tuple(Part(site, nn.Identity(), routed=site[1] == "mlp") for site in SITES),
    {},
)


def drawn(generator: np.random.Generator) -> tuple[Direction, ...]:
    """Up to one ablation a site, additions, and additions of experts, in any window."""
    found, ablated = [], set()
    for _ in range(generator.integers(1, 4)):
        site = SITES[generator.integers(3)]
        vector = tuple(generator.normal(size=HIDDEN).tolist())
        window = ("prompt", "generation", "all")[generator.integers(3)]
        if generator.random() < 0.4 and site not in ablated:
            ablated.add(site)
            found.append(Direction(vector, (site,), "ablate", window=window))
        else:
            expert = int(generator.integers(EXPERTS)) if site[1] == "mlp" else None
            expert = expert if generator.random() < 0.7 else None
            found.append(
                Direction(vector, (site,), "add", float(generator.normal()), window, expert)
            )
    return tuple(found)


def by_hand(
    directions: Sequence[Direction], site: object, phase: int, h: Tensor, rest: Tensor, p: Tensor
) -> Tensor:
    """The formula of `moesteer.direction` for one token."""
    here = [d for d in directions if site in d.sites and phase in PHASES[d.window]]
    x, result = h + rest, h.clone()
    for direction in here:
        v = torch.tensor(direction.vector, dtype=torch.float64)
        if direction.operation == "ablate":
            result -= (v @ x) / (v @ v) * v
    for direction in here:
        v = torch.tensor(direction.vector, dtype=torch.float64)
        if direction.operation == "add":
            weight = 1.0 if direction.expert is None else p[direction.expert]
            result += direction.coefficient * weight * v
    return result


def tables(*, static: bool) -> Tables:
    layers = [LayerShape(0, EXPERTS, 1)]
    return Tables(layers, ROWS + 1, TOKENS, torch.device("cpu"), static=static)


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=150, deadline=None)
def test_each_token_is_changed_by_its_row_and_phase_and_measured(seed: int, static: bool) -> None:
    generator = np.random.default_rng(seed)
    directed = Directed(STREAM, tables(static=static), ROOM, HIDDEN)
    profiles = [drawn(generator) for _ in range(ROWS)]
    ready = [directed.ready(directions) for directions in profiles]
    for row, one in enumerate(ready, start=1):
        directed.write(row, ready[row % ROWS])  # of an earlier request
        directed.write(row, one)
    directed.use(ready)
    rows = torch.tensor(generator.integers(0, 2 * ROWS + 2, TOKENS))
    rows *= rows > 1
    directed.rows.copy_(rows)
    directed.tables.counting_rows.copy_(rows // 2)
    logits = torch.tensor(generator.normal(size=(TOKENS, EXPERTS)), dtype=torch.float32)
    directed.weigh(2, logits)
    p = logits.double().softmax(-1)
    shifts: dict[tuple[int, int], list[Tensor]] = {}
    for number, site in enumerate(SITES):
        h, rest = torch.tensor(generator.normal(size=(2, TOKENS, HIDDEN)), dtype=torch.float32)
        carried = site[1] == "input"
        after = directed.change(number, h, rest if carried else None)
        for token, row in enumerate(rows.tolist()):
            others = rest[token].double() if carried else torch.zeros(HIDDEN, dtype=torch.float64)
            own = profiles[row // 2 - 1] if row > 1 else ()
            wanted = by_hand(own, site, row % 2, h[token].double(), others, p[token])
            torch.testing.assert_close(after[token].double(), wanted, atol=1e-5, rtol=1e-5)
            if row < 2:
                assert torch.equal(after[token], h[token])
            for which, direction in enumerate(own):
                if site in direction.sites and row % 2 in PHASES[direction.window]:
                    shift = wanted - h[token].double()
                    shifts.setdefault((row // 2, which), []).append(shift)
    for row, one in enumerate(ready, start=1):
        told = {number: rest for number, *rest in directed.told(directed.take(row, one))}
        for which, direction in enumerate(profiles[row - 1]):
            layer, place, tokens, moved, expected, rounding, left, allowed = told[which]
            found = shifts.get((row, which), [])
            assert ((layer, place), tokens) == (direction.sites[0], len(found))
            assert left < 1e-4 < allowed < 2e-4
            assert 0 <= rounding < 1e-4
            if direction.operation == "add" and found and alone(profiles[row - 1], which):
                v = torch.tensor(direction.vector, dtype=torch.float64)
                along = torch.stack(found).sum(0) @ v / v.norm() * np.sign(direction.coefficient)
                assert moved == pytest.approx(float(along), abs=1e-4)
            assert moved == pytest.approx(expected, abs=1e-4)
        assert not any(any(numbers[3:-1]) for numbers in directed.told(directed.take(row, one)))


def alone(directions: Sequence[Direction], which: int) -> bool:
    """Whether nothing else is added with the same weight, so that the sum is its own."""
    own = directions[which]
    same = [d for d in directions if d.operation == "add" and d.sites == own.sites]
    return own.expert is not None or sum(d.expert is None for d in same) == 1


def test_a_vector_that_is_used_in_many_places_is_held_once() -> None:
    everywhere: tuple[Site, ...] = tuple((n, place) for n in range(9) for _, place in SITES)
    one = Direction((1.0, 2.0), everywhere, "ablate")
    other = Direction((3.0, 4.0), everywhere[:5], coefficient=2.0)
    assert len(vectors_of([one])) == 1
    held = vectors_of([one, other])
    assert len(held) == 2
    assert sorted(vector.norm().item() for vector in held.values()) == pytest.approx([1, 10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_for_graphs_the_change_is_the_same(dtype: torch.dtype) -> None:
    """Inductor's CPU kernels stand in for those that a GPU would run."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(6, HIDDEN, generator=generator)
    vectors[0] = 0
    vectors[5] /= vectors[5].norm()
    for tokens in (3, TOKENS):
        part, rest = torch.randn(2, tokens, HIDDEN, generator=generator).to(dtype)
        used = torch.arange(tokens) % 3 > 0
        added = torch.randint(0, 5, (tokens, 2), generator=generator)
        ablated = 5 * (torch.arange(tokens) % 2)
        weights = torch.rand(tokens, 2, generator=generator)
        given = (part, rest, used, vectors, added, ablated, weights)
        for ours, plain in zip(fused_change()(*given), changed(*given), strict=True):
            torch.testing.assert_close(
                ours, plain, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0.01
            )
        assert torch.equal(fused_change()(*given)[0][~used], part[~used])
