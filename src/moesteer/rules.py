"""How router logits are rewritten so that chosen experts are, or are not, selected.

Intuition: a router picks the k experts with the largest scores. Lift an expert just above the
largest logit and it is picked; push it just below the smallest and it is not. Nothing else moves:
the model's own softmax, top-k and mixture go on from the rewritten logits ("soft" steering,
SteerMoE, arXiv 2509.09660).

Two rules, for logits z of one token and a margin ε = 0.01:

    paper   s = log_softmax(z);  activated := max(s) + ε,  deactivated := min(s) − ε
    exact   the same on s = z, with ε at least two rounding steps of the dtype, and the router's
            top-k guarded (`guarded_scores`), so that the selection is certain

Routers that are shift-invariant (softmax after the rewrite) see no difference between s = z and
s = log_softmax(z). The others (sigmoid, selection bias) are changed by log_softmax even where
nothing is steered, and a selection bias can undo a lifted logit: hence `exact` by default.

A dose d in [0, 1] goes only part of the way, z + d·(rewritten − z), and promises no selection.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MARGIN = 0.01
"""ε of the paper, in logits."""


def rewritten_logits(
    logits: Float[Tensor, "token expert"],
    activated: Bool[Tensor, "#token expert"],
    deactivated: Bool[Tensor, "#token expert"],
    *,
    paper: Bool[Tensor, "#token 1"] | None = None,
    dose: Float[Tensor, "#token 1"] | None = None,
) -> Float[Tensor, "token expert"]:
    """Router logits with activated experts lifted and deactivated ones pushed down.

    `paper` marks the tokens that follow the paper's rule (None: none does); `dose` is the share of
    the way to go for each token (None: all of it). Tokens without a steered expert come back bit
    by bit. Source: SteerMoE, section 3.2.
    """
    base = logits
    if paper is not None:
        steered = (activated | deactivated).any(-1, keepdim=True)
        base = torch.where(paper & steered, logits.log_softmax(-1), logits)
    highest, lowest = base.amax(-1, keepdim=True), base.amin(-1, keepdim=True)
    up = down = MARGIN
    resolution = torch.finfo(logits.dtype).eps
    if resolution > 1e-5:  # below fp32 a step of 0.01 may vanish beside the logit it is added to
        up = (2 * resolution * highest.abs()).clamp(min=MARGIN)
        down = (2 * resolution * lowest.abs()).clamp(min=MARGIN)
        if paper is not None:  # the paper's ε is 0.01 whatever the dtype
            up, down = torch.where(paper, MARGIN, up), torch.where(paper, MARGIN, down)
    target = torch.where(activated, highest + up, torch.where(deactivated, lowest - down, base))
    if dose is None:
        return target
    arrived = (dose == 1) | (target == logits)  # the sum would turn −0 into 0
    return torch.where(arrived, target, logits + dose * (target - logits))


def guarded_scores(
    scores: Float[Tensor, "token expert"],
    forced: Bool[Tensor, "#token expert"],
    forbidden: Bool[Tensor, "#token expert"],
) -> Float[Tensor, "token expert"]:
    """The scores that the top-k should sort: forced experts first, forbidden ones last.

    A forbidden expert ranks even behind experts that the model itself ruled out with −inf (those
    outside the chosen groups), which are therefore raised to the smallest finite score.
    """
    finite = scores.clamp(min=torch.finfo(scores.dtype).min)
    return finite.masked_fill(forced, torch.inf).masked_fill(forbidden, -torch.inf)
