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
    logits: Float[Tensor, "*token expert"],
    activated: Bool[Tensor, "*#token expert"] | None,
    deactivated: Bool[Tensor, "*#token expert"] | None,
    *,
    paper: Bool[Tensor, "*#token 1"] | None = None,
    dose: Float[Tensor, "*#token 1"] | None = None,
) -> Float[Tensor, "*token expert"]:
    """Router logits with activated experts lifted and deactivated ones pushed down.

    A mask of None names no expert. `paper` marks the tokens that follow the paper's rule (None:
    none does); `dose` is the share of the way to go for each token (None: all of it). Tokens
    without a steered expert come back bit by bit. Source: SteerMoE, section 3.2.
    """
    masks = [mask for mask in (activated, deactivated) if mask is not None]
    if not masks:
        return logits
    base = logits
    if paper is not None:
        steered = torch.stack([mask.any(-1, keepdim=True) for mask in masks]).any(0)
        base = torch.where(paper & steered, logits.log_softmax(-1), logits)
    target = base
    if deactivated is not None:
        lowered = _beyond(base.amin(-1, keepdim=True), -1, paper)
        target = torch.where(deactivated, lowered, target)
    if activated is not None:
        lifted = _beyond(base.amax(-1, keepdim=True), 1, paper)
        target = torch.where(activated, lifted, target)
    if dose is None:
        return target
    arrived = (dose == 1) | (target == logits)  # the sum would turn −0 into 0
    return torch.where(arrived, target, logits + dose * (target - logits))


def _beyond(
    extreme: Float[Tensor, "*token 1"], sign: int, paper: Bool[Tensor, "*#token 1"] | None
) -> Float[Tensor, "*token 1"]:
    """One margin above (sign 1) or below (−1) each token's extreme logit."""
    step = 2 * torch.finfo(extreme.dtype).eps
    if step < 1e-5:
        return extreme + sign * MARGIN
    # Below fp32 a step of 0.01 may vanish beside the logit it is added to.
    visible = extreme.add(extreme.abs().clamp(min=MARGIN / step), alpha=sign * step)
    if paper is None:
        return visible
    return torch.where(paper, extreme + sign * MARGIN, visible)  # its ε is 0.01 in any dtype


def guarded_scores(
    scores: Float[Tensor, "*token expert"],
    forced: Bool[Tensor, "*#token expert"],
    forbidden: Bool[Tensor, "*#token expert"],
) -> Float[Tensor, "*token expert"]:
    """The scores that the top-k should sort: forced experts first, forbidden ones last.

    A forbidden expert ranks even behind experts that the model itself ruled out with −inf (those
    outside the chosen groups), which are therefore raised to the smallest finite score.
    """
    return scores.clamp(*guard_bounds(forced, forbidden, scores.dtype))


def guard_bounds(
    forced: Bool[Tensor, "*#token expert"],
    forbidden: Bool[Tensor, "*#token expert"],
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "*#token expert"], Float[Tensor, "*#token expert"]]:
    """The bounds that clamp scores into guarded ones: one operation where time counts.

    A floor of +inf forces an expert, a ceiling of −inf forbids it.
    """
    finite = torch.full_like(forced, torch.finfo(dtype).min, dtype=dtype)
    floor = finite.masked_fill(forced, torch.inf)
    ceiling = torch.full_like(finite, torch.inf).masked_fill(forbidden, -torch.inf)
    return floor, ceiling
