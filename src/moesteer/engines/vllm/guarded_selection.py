"""The top-k of a vLLM router, guarded: what `exact` needs where lifted logits alone don't decide.

A selection bias may outweigh a lifted logit, and an expert outside the chosen groups is out
whatever its logit. vLLM's routers choose inside fused kernels that can't be reached, so the choice
is made here once more, in the same steps, with the guard of `moesteer.rules` before the last one:

    s = score(z)                        sigmoid or softmax of the (steered) logits, fp32
    c = s + bias                        what is chosen by; the bias is not part of the weights
    c = −inf outside the best groups    a group's score: the sum of its best two c (best one of s)
    top-k of c, guarded;  weights = s of the chosen, normalised and scaled as the router does

`Selection.of` reads these steps off a router object, and `agrees` tests that they are its own:
without a guard both must choose the same experts with the same weights, or the router is refused.
Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moesteer.rules import guarded_scores


@dataclass(frozen=True)
class Selection:
    """How a router chooses: `groups` of experts of which `groups_chosen` stay, no groups: 0."""

    top_k: int
    scoring: str
    bias: Float[Tensor, " expert"] | None
    groups: int
    groups_chosen: int
    renormalize: bool
    scale: float

    @classmethod
    def of(cls, router: Any) -> Self | None:
        """A router's steps; None where lifted logits decide: softmax, no bias, no groups."""
        grouped = getattr(router, "use_grouped_topk", hasattr(router, "num_expert_group"))
        groups = (getattr(router, "num_expert_group", None) or 0) if grouped else 0
        bias = getattr(router, "e_score_correction_bias", None)
        scoring = getattr(router, "scoring_func", "softmax")
        if bias is None and groups <= 1 and scoring == "softmax":
            return None
        return cls(
            top_k=router.top_k,
            scoring=scoring,
            bias=bias,
            groups=groups,
            groups_chosen=(getattr(router, "topk_group", None) or 0) if grouped else 0,
            renormalize=getattr(router, "renormalize", False),
            scale=getattr(router, "routed_scaling_factor", 1.0),
        )

    def select(
        self,
        logits: Float[Tensor, "token expert"],
        forced: Bool[Tensor, "token expert"],
        forbidden: Bool[Tensor, "token expert"],
    ) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
        """Weights (fp32) and indices of the chosen experts."""
        scores = _SCORES[self.scoring](logits.float())
        choice = scores if self.bias is None else scores + self.bias
        if self.groups > 1:
            choice = self._within_groups(choice)
        index = guarded_scores(choice, forced, forbidden).topk(self.top_k, -1, sorted=False)[1]
        weights = scores.gather(-1, index)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.scale, index

    def agrees(self, router: Any, logits: Float[Tensor, "token expert"]) -> bool:
        """Whether the router, left alone, chooses and weighs as these steps say.

        Asked in fp32: in half precision some routers round their scores, which moves close calls.
        """
        logits = logits.float()
        weights, index = router._compute_routing(logits, logits, None)
        nobody = torch.zeros_like(logits, dtype=torch.bool)
        ours = _dense(*self.select(logits, nobody, nobody), logits)
        return bool(torch.allclose(_dense(weights, index, logits), ours, atol=1e-5, rtol=1e-3))

    def _within_groups(self, choice: Float[Tensor, "token expert"]) -> Tensor:
        by_group = choice.view(choice.shape[0], self.groups, -1)
        best = by_group.topk(1 if self.bias is None else 2, -1)[0].sum(-1)
        chosen = torch.zeros_like(best, dtype=torch.bool)
        chosen.scatter_(-1, best.topk(self.groups_chosen, -1, sorted=False)[1], True)
        return by_group.masked_fill(~chosen.unsqueeze(-1), -torch.inf).view_as(choice)


_SCORES = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid}


def is_known(selection: Selection) -> bool:
    """Whether the router's scores are of a kind that can be computed here."""
    return selection.scoring in _SCORES


def _dense(weights: Tensor, index: Tensor, logits: Tensor) -> Float[Tensor, "token expert"]:
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, index.long(), weights.float())
