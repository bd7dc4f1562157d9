"""The guarded selection, against trying every set of experts and against vLLM's own router."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from moesteer.engines.vllm.guarded_selection import Selection

TOKENS, EXPERTS, K = 6, 8, 3


@dataclass(frozen=True)
class Case:
    selection: Selection
    logits: Tensor
    forced: Tensor
    forbidden: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A random router of eight experts, and for each token experts that must be in and out."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    biased = draw(st.booleans())
    groups = draw(st.sampled_from([0, 2, 4]))
    least = -(-K * groups // EXPERTS)  # what holds k experts
    selection = Selection(
        top_k=K,
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        bias=torch.randn(EXPERTS, generator=generator) if biased else None,
        groups=groups,
        groups_chosen=draw(st.integers(least, groups)),
        renormalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )
    logits = 2 * torch.randn(TOKENS, EXPERTS, generator=generator)
    forced, forbidden = torch.zeros(2, TOKENS, EXPERTS, dtype=torch.bool)
    for token in range(TOKENS):
        order = torch.randperm(EXPERTS, generator=generator)
        forced[token, order[: draw(st.integers(0, K))]] = True
        forbidden[token, order[EXPERTS - draw(st.integers(0, EXPERTS - K)) :]] = True
    return Case(selection, logits, forced, forbidden)


class Token:
    """One token of a case, with the choice worked out expert by expert."""

    def __init__(self, case: Case, token: int) -> None:
        s, z = case.selection, case.logits[token]
        self.score = (torch.sigmoid(z) if s.scoring == "sigmoid" else z.softmax(-1)).tolist()
        bias = [0.0] * EXPERTS if s.bias is None else s.bias.tolist()
        self.choice = [score + more for score, more in zip(self.score, bias, strict=True)]
        self.forced = set(case.forced[token].nonzero().flatten().tolist())
        self.forbidden = set(case.forbidden[token].nonzero().flatten().tolist())
        self.open = set(range(EXPERTS))
        if s.groups:
            size, best = EXPERTS // s.groups, 1 if s.bias is None else 2
            groups = [range(g * size, (g + 1) * size) for g in range(s.groups)]
            groups.sort(key=lambda g: -sum(sorted(self.choice[e] for e in g)[-best:]))
            self.open = {e for group in groups[: s.groups_chosen] for e in group}

    def worth(self, chosen: tuple[int, ...]) -> tuple[bool, int, int, float]:
        """What makes a set better: nobody forbidden, the forced, open groups, the scores.

        Of experts that are all out of the chosen groups, none is better.
        """
        inside = [e for e in chosen if e in self.open or e in self.forced]
        return (
            not self.forbidden & set(chosen),
            len(self.forced & set(chosen)),
            len(inside),
            round(sum(self.choice[e] for e in inside), 5),
        )


@given(cases())
@settings(max_examples=150, deadline=None)
def test_it_is_the_best_choice_that_keeps_to_the_guard(case: Case) -> None:
    s = case.selection
    weights, index = s.select(case.logits, case.forced, case.forbidden)
    for number, (experts, found) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        token = Token(case, number)
        assert len(set(experts)) == K
        best = max(map(token.worth, itertools.combinations(range(EXPERTS), K)))
        assert token.worth(tuple(experts)) == pytest.approx(best, abs=1e-4)
        total = sum(token.score[e] for e in experts) if s.renormalize else 1.0
        wanted = [token.score[e] / total * s.scale for e in experts]
        assert found == pytest.approx(wanted, rel=1e-4)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_unguarded_it_is_what_vllms_router_chooses(case: Case) -> None:
    """Without groups its CPU router drops a bias, and knows no sigmoid: neither goes unnoticed."""
    router = cpu_router(case.selection)
    selection = Selection.of(router)
    if case.selection.groups:
        assert selection is not None
        assert selection == case.selection
        assert selection.agrees(router, case.logits)
    elif selection is None:  # nothing to guard
        assert case.selection.bias is None
        assert case.selection.scoring == "softmax"
    elif case.selection.scoring == "sigmoid":
        with pytest.raises(AssertionError):
            selection.agrees(router, case.logits)
    else:
        assert not selection.agrees(router, case.logits)


@given(cases(), st.sampled_from(["renormalize", "scale", "groups_chosen", "top_k", "scoring"]))
@settings(max_examples=100, deadline=None)
def test_a_router_that_chooses_otherwise_is_told_apart(case: Case, what: str) -> None:
    s = case.selection
    other = {
        "renormalize": not s.renormalize,
        "scale": 3.0,
        "groups_chosen": 1,
        "top_k": K - 1,
        "scoring": "softmax" if s.scoring == "sigmoid" else "sigmoid",
    }
    if not s.groups or getattr(s, what) == other[what]:
        return
    selection = replace(s, **{what: other[what]})
    assert not selection.agrees(cpu_router(s), case.logits)


def cpu_router(selection: Selection) -> CPURouter:
    grouped = selection.groups > 0
    return CPURouter(
        top_k=selection.top_k,
        global_num_experts=EXPERTS,
        use_grouped_topk=grouped,
        renormalize=selection.renormalize,
        num_expert_group=selection.groups if grouped else None,
        topk_group=selection.groups_chosen if grouped else None,
        scoring_func=selection.scoring,
        routed_scaling_factor=selection.scale,
        e_score_correction_bias=selection.bias,
    )
