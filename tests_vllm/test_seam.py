"""What the seam does to logits and choices, layer alone, against loops over tokens."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesteer.engines.vllm.guarded_selection import Selection
from moesteer.engines.vllm.seam import (
    RoutedLayer,
    fused_rewrite,
    guarded_routing,
    own_tokens,
    rewrite,
    steered_dispatch,
)
from moesteer.engines.vllm.tables import Tables
from moesteer.model_facts import LayerShape
from moesteer.profile import Profile

EXPERTS, K, TOKENS = 6, 2, 16
SHAPE = LayerShape(3, EXPERTS, K)
# By row of the tables
PROFILES = {
    1: Profile(activated=((3, 1),), deactivated=((3, 4),)),
    2: Profile(activated=((3, 0),), rule="paper"),
    3: Profile(deactivated=((3, 2),), dose=0.25),
    4: Profile(activated=((3, 5),), deactivated=((3, 0),), rule="paper", dose=0.5),
}


def make_layer(selection: Selection | None = None, *, static: bool = False) -> RoutedLayer:
    tables = Tables([SHAPE], 5, TOKENS, torch.device("cpu"), static=static)
    for row, profile in PROFILES.items():
        activated, deactivated = profile.experts_of(3)
        tables.activated[0, row, activated] = True
        tables.deactivated[0, row, deactivated] = True
        tables.promised[row] = profile.rule == "exact" and profile.dose == 1
        tables.paper[row] = profile.rule == "paper"
        tables.dose[row] = profile.dose
    tables.lifted_layers = tables.lowered_layers = frozenset([0])
    tables.any_paper = tables.any_partial = tables.any_counted = True
    return RoutedLayer(0, SHAPE, tables, selection)


def logits(tokens: int = TOKENS, width: int = EXPERTS, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def steered_by_hand(z: list[float], row: int) -> list[float]:
    if row not in PROFILES:
        return z
    profile = PROFILES[row]
    activated, deactivated = profile.experts_of(3)
    base = z
    if profile.rule == "paper":
        total = math.log(sum(map(math.exp, z)))
        base = [x - total for x in z]
    target = list(base)
    for expert in activated:
        target[expert] = max(base) + 0.01
    for expert in deactivated:
        target[expert] = min(base) - 0.01
    return [x + profile.dose * (t - x) for x, t in zip(z, target, strict=True)]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("width", [EXPERTS, EXPERTS + 2])  # some models append shared experts
def test_each_token_is_steered_by_its_row(width: int, static: bool) -> None:
    layer = make_layer(static=static)
    rows = torch.arange(TOKENS) % 5
    layer.tables.steering_rows.copy_(rows)
    z = logits(width=width)
    found = layer.steer(z)
    for token, row in enumerate(rows.tolist()):
        wanted = steered_by_hand(z[token, :EXPERTS].tolist(), row)
        assert found[token, :EXPERTS].tolist() == pytest.approx(wanted, abs=1e-5)
        assert torch.equal(found[token, EXPERTS:], z[token, EXPERTS:])
    assert torch.equal(found[rows == 0], z[rows == 0])


def test_a_layer_that_nobody_steers_costs_nothing() -> None:
    layer = make_layer()
    layer.tables.lifted_layers = layer.tables.lowered_layers = frozenset()
    z = logits()
    assert layer.steer(z) is z


def test_probabilities_are_those_before_steering() -> None:
    layer = make_layer()
    layer.tables.steering_rows.fill_(1)
    layer.tables.counting_rows[:4] = 2
    layer.tables.any_probability = True
    z = logits()
    layer.steer(z)
    assert torch.allclose(layer.tables.probability[2, 0], z[:4].softmax(-1).sum(0))


def top_k(hidden: Any, z: Tensor, _type: Any) -> tuple[Tensor, Tensor]:
    """A sigmoid router that keeps to a bias, unguarded."""
    scores = z.sigmoid()
    index = (scores + BIAS).topk(K, -1)[1]
    return scores.gather(-1, index), index.int()


BIAS = torch.tensor([-3.0, -3.0, 3.0, 0.0, 3.0, 0.0])
SELECTION = Selection(K, "sigmoid", BIAS, 0, 0, renormalize=False, scale=1.0)


def test_the_choice_is_guarded_where_a_profile_promises_it_and_recorded() -> None:
    layer = make_layer(SELECTION)
    rows = torch.arange(TOKENS) % 5
    layer.tables.steering_rows.copy_(rows)
    z = layer.steer(logits())
    weights, index = guarded_routing(top_k, layer)(None, z, None)
    plain_weights, plain = top_k(None, z, None)
    for token, row in enumerate(rows.tolist()):
        if row == 1:  # the one that promises
            assert index[token].tolist() == pytest.approx([1, 2]) or index[token].tolist() == [2, 1]
            assert torch.equal(weights[token], z[token].sigmoid()[index[token].long()])
        else:
            assert torch.equal(index[token], plain[token])
            assert torch.equal(weights[token], plain_weights[token])
    assert torch.equal(layer.tables.chosen[0, :TOKENS], index)
    assert torch.equal(layer.tables.weights[0, :TOKENS], weights)


def test_directions_of_experts_see_the_logits_before_steering() -> None:
    layer = make_layer()
    layer.tables.steering_rows.fill_(1)
    seen = []
    layer.weigh = seen.append
    z = logits(width=EXPERTS + 2)
    assert not torch.equal(layer.steer(z), z)
    assert torch.equal(seen[0], z[:, :EXPERTS])


# -- tokens of several ranks ---------------------------------------------------------------------


class Rank:
    """One of two ranks that gather each other's tokens before they choose experts."""

    def __init__(self, number: int, tokens: int) -> None:
        self.number, self.tokens = number, tokens
        self.layer = make_layer(SELECTION)
        rows = (torch.arange(tokens) + number) % 5
        self.layer.tables.steering_rows[:tokens] = rows
        self.hidden = torch.full((tokens, 1), float(number))
        self.logits = logits(tokens, seed=number)
        self.runner = SimpleNamespace(moesteer_layer=self.layer, do_naive_dispatch_combine=True)
        self.sent: Tensor | None = None

    def dispatch(self, gathered: list[Tensor] | None) -> Any:
        def original(_runner: Any, hidden: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            self.sent = z
            everything = z if gathered is None else torch.cat(gathered)
            return hidden, everything

        return steered_dispatch(original, self.runner, self.hidden, self.logits)


def test_gathered_tokens_are_guarded_by_their_own_ranks_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = [Rank(0, 5), Rank(1, 7)]
    counts = torch.tensor([rank.tokens for rank in ranks])
    stub = SimpleNamespace(dp_metadata=SimpleNamespace(num_tokens_across_dp_cpu=counts))
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: stub)
    group = SimpleNamespace(rank_in_group=0)
    monkeypatch.setattr("vllm.distributed.get_dp_group", lambda: group)
    for rank in ranks:
        rank.dispatch(None)
    sent = [rank.sent for rank in ranks if rank.sent is not None]
    choices = []
    for rank in ranks:
        group.rank_in_group = rank.number
        _, z = rank.dispatch(sent)
        steered = torch.cat([r.layer.steer(r.logits) for r in ranks])
        assert torch.equal(z, steered)
        assert z.is_contiguous()
        weights, index = guarded_routing(top_k, rank.layer)(None, z, None)
        choices.append((weights, index))
    (weights, index), (other_weights, other) = choices
    assert torch.equal(weights, other_weights)
    assert torch.equal(index, other)
    alone = []
    for rank in ranks:  # what it would choose by itself
        layer, z = make_layer(SELECTION), rank.layer.steer(rank.logits)
        layer.tables.steering_rows.copy_(rank.layer.tables.steering_rows)
        alone.append(guarded_routing(top_k, layer)(None, z, None)[1])
    assert torch.equal(index, torch.cat(alone))
    for rank, part in zip(ranks, index.split([5, 7]), strict=True):
        recorded = rank.layer.tables.chosen[0]
        assert torch.equal(recorded[: rank.tokens], part)
        assert not recorded[rank.tokens :].any()


def test_tokens_that_were_not_gathered_are_all_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = SimpleNamespace(dp_metadata=None)
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: stub)
    assert own_tokens(4, 4) == slice(0, 4)


def test_a_layer_that_is_not_ours_is_left_alone() -> None:
    runner = SimpleNamespace()
    z = logits()
    assert steered_dispatch(lambda _runner, hidden, z: (hidden, z), runner, z, z)[1] is z


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_for_graphs_the_rewrite_is_the_same(dtype: torch.dtype) -> None:
    """Inductor's CPU kernels stand in for those that a GPU would run."""
    layer = make_layer(static=True)
    for tokens in (3, TOKENS):
        z, rows = logits(tokens).to(dtype), torch.arange(tokens) % 5
        tables = layer.tables
        masks = (layer.activated, layer.deactivated, tables.paper, tables.dose)
        ours, plain = fused_rewrite()(z, rows, *masks), rewrite(z, rows, *masks)
        assert torch.equal(ours[rows == 0], z[rows == 0])
        assert torch.equal(ours[rows == 1], plain[rows == 1])  # the rule that promises a selection
        torch.testing.assert_close(
            ours, plain, atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0
        )
        assert not torch.equal(ours, z)
