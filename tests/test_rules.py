"""The steering rules, against the router's own top-k and against the paper's formula in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesteer.rules import MARGIN, guarded_scores, rewritten_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def mask(experts: int, *chosen: int) -> Tensor:
    row = torch.zeros(1, experts, dtype=torch.bool)
    row[0, list(chosen)] = True
    return row


def bits(tensor: Tensor) -> bytes:
    """What tells −0 from 0."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int, list[int], list[int]]:
    """Logits [token, expert], k, and experts to activate (at most k) and deactivate (k remain)."""
    experts = draw(st.integers(2, 12))
    k = draw(st.integers(1, experts))
    order = draw(st.permutations(range(experts)))
    up = draw(st.integers(0, k))
    down = draw(st.integers(0, experts - max(k, up)))
    value = st.one_of(
        st.floats(-1000, 1000, width=16),
        st.sampled_from([0.0, -0.0, 0.5, -0.5, 1000.0, -1000.0]),  # ties and extremes
    )
    rows = draw(
        st.lists(st.lists(value, min_size=experts, max_size=experts), min_size=1, max_size=4)
    )
    logits = torch.tensor(rows, dtype=draw(st.sampled_from(DTYPES)))
    return logits, k, order[:up], order[experts - down :]


def test_by_hand():
    logits = torch.tensor([[1.0, 3.0, -2.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    rewritten = rewritten_logits(logits, mask(4, 2), mask(4, 1))
    expected = torch.tensor([[1.0, -2.01, 3.01, 0.5], [0.0, -0.01, 0.01, 0.0]])
    torch.testing.assert_close(rewritten, expected, rtol=0, atol=1e-6)


def test_by_hand_with_a_margin_that_the_dtype_can_hold():
    # bfloat16 has 8 bits: beside 100 the next number is 100.5, and 100.01 would be 100 again.
    logits = torch.tensor([[100.0, 1.0, -100.0]], dtype=torch.bfloat16)
    rewritten = rewritten_logits(logits, mask(3, 1), mask(3, 0))
    assert rewritten[0, 1] > 100
    assert rewritten[0, 0] < -100
    assert rewritten[0, 2] == -100
    assert rewritten[0, 1] < 103  # lifted just above, not far


@given(routings())
def test_exact_puts_the_activated_in_and_the_deactivated_out(
    routing: tuple[Tensor, int, list[int], list[int]],
):
    logits, k, up, down = routing
    experts = logits.shape[-1]
    rewritten = rewritten_logits(logits, mask(experts, *up), mask(experts, *down))
    assert rewritten.dtype == logits.dtype
    assert torch.isfinite(rewritten).all()
    for chosen in rewritten.topk(k).indices.tolist():
        assert set(up) <= set(chosen)
        assert not set(down) & set(chosen)
    others = [e for e in range(experts) if e not in {*up, *down}]
    assert bits(rewritten[:, others]) == bits(logits[:, others])


@given(routings())
def test_untouched_experts_keep_their_order(routing: tuple[Tensor, int, list[int], list[int]]):
    # "Soft": the place that steering leaves goes to whom the model itself would send it to.
    logits, k, up, down = routing
    experts = logits.shape[-1]
    chosen = rewritten_logits(logits, mask(experts, *up), mask(experts, *down)).topk(k).indices
    others = [e for e in range(experts) if e not in {*up, *down}]
    for row, selected in zip(logits.tolist(), chosen.tolist(), strict=True):
        kept = [row[e] for e in selected if e in others]
        best = sorted((row[e] for e in others), reverse=True)
        assert sorted(kept, reverse=True) == best[: k - len(up)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_paper_rule_is_the_papers_formula(dtype: torch.dtype):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(50, 9)) * 4
    given_logits = torch.tensor(logits, dtype=dtype)
    up, down = [1, 4], [0, 7, 8]
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    rewritten = rewritten_logits(given_logits, mask(9, *up), mask(9, *down), paper=everywhere)

    z = given_logits.double().numpy()
    s = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = s.copy()
    expected[:, up] = s.max(-1, keepdims=True) + 0.01
    expected[:, down] = s.min(-1, keepdims=True) - 0.01
    step = 30 * torch.finfo(dtype).eps  # a few rounding steps at the size of these scores
    np.testing.assert_allclose(rewritten.double().numpy(), expected, atol=step)
    assert rewritten.dtype == dtype


def test_papers_margin_stays_the_papers_in_half_precision():
    # 0.01 vanishes beside −9 in bfloat16: then the paper's rule ties, and we must not mend it.
    logits = torch.tensor([[0.0, -9.0, -5.0]], dtype=torch.bfloat16)
    paper = torch.ones(1, 1, dtype=torch.bool)
    lowered = rewritten_logits(logits, mask(3), mask(3, 0), paper=paper)
    assert lowered[0, 0] == lowered[0, 1]
    exact = rewritten_logits(logits, mask(3), mask(3, 0))
    assert exact[0, 0] < exact[0, 1]


@given(routings(), st.sampled_from([None, 0.0, 0.3, 1.0]), st.booleans())
def test_tokens_without_steered_experts_come_back_bit_by_bit(
    routing: tuple[Tensor, int, list[int], list[int]], dose: float | None, paper: bool
):
    logits, _, up, down = routing
    tokens, experts = logits.shape
    both = torch.cat((logits, logits))  # the first half steered, the second not
    steered = torch.arange(2 * tokens).unsqueeze(-1) < tokens
    rewritten = rewritten_logits(
        both,
        mask(experts, *up) & steered,
        mask(experts, *down) & steered,
        paper=torch.tensor([[paper]]),
        dose=None if dose is None else torch.tensor([[dose]], dtype=logits.dtype),
    )
    assert bits(rewritten[tokens:]) == bits(logits)
    nothing = mask(experts)
    assert bits(rewritten_logits(logits, nothing, nothing)) == bits(logits)


def test_each_token_follows_its_own_rule_and_dose():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, 3)
    rewritten = rewritten_logits(
        logits,
        mask(3, 2),
        mask(3, 0),
        paper=torch.tensor([[False], [True], [False]]),
        dose=torch.tensor([[1.0], [1.0], [0.5]]),
    )
    exact = rewritten_logits(logits[:1], mask(3, 2), mask(3, 0))
    paper = rewritten_logits(logits[:1], mask(3, 2), mask(3, 0), paper=torch.tensor([[True]]))
    assert torch.equal(rewritten[:1], exact)
    assert torch.equal(rewritten[1:2], paper)
    assert torch.allclose(rewritten[2:], (logits[:1] + exact) / 2)


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dose_goes_that_share_of_the_way(paper: bool, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(40, 6, generator=generator) * 3).to(dtype)
    rule = torch.tensor([[paper]])

    def at(dose: float) -> Tensor:
        share = torch.tensor([[dose]], dtype=dtype)
        return rewritten_logits(logits, mask(6, 1), mask(6, 4), paper=rule, dose=share)

    full = rewritten_logits(logits, mask(6, 1), mask(6, 4), paper=rule)
    assert bits(at(0)) == bits(logits)
    assert bits(at(1)) == bits(full)
    for dose in (0.25, 0.5, 0.75):
        expected = logits.double() + dose * (full.double() - logits.double())
        np.testing.assert_allclose(at(dose).double(), expected, atol=40 * torch.finfo(dtype).eps)


@given(routings(), st.data())
def test_guard_decides_ties_and_ruled_out_groups(
    routing: tuple[Tensor, int, list[int], list[int]], data: st.DataObject
):
    logits, k, up, down = routing
    experts = logits.shape[-1]
    outside = data.draw(st.lists(st.integers(0, experts - 1), unique=True), label="ruled out")
    scores = torch.full_like(logits, 0.5) if data.draw(st.booleans(), label="all tied") else logits
    scores = scores.masked_fill(mask(experts, *outside), -torch.inf)
    guarded = guarded_scores(scores, mask(experts, *up), mask(experts, *down))
    for chosen in guarded.topk(k).indices.tolist():
        assert set(up) <= set(chosen)
        assert not set(down) & set(chosen)
    inside = [e for e in range(experts) if e not in {*up, *down, *outside}]
    assert bits(guarded[:, inside]) == bits(scores[:, inside])


def test_guard_prefers_the_models_own_group_to_a_ruled_out_one():
    scores = torch.tensor([[0.9, 0.1, -torch.inf, -torch.inf]])
    assert guarded_scores(scores, mask(4), mask(4, 0)).topk(1).indices.tolist() == [[1]]
    # With its own group forbidden, the model falls back on another rather than on a forbidden one.
    assert guarded_scores(scores, mask(4), mask(4, 0, 1)).topk(1).indices.tolist() in ([[2]], [[3]])
    assert guarded_scores(scores, mask(4, 3), mask(4, 0)).topk(1).indices.tolist() == [[3]]


def test_margin_is_the_papers():
    assert MARGIN == 0.01
