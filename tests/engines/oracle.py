"""A second opinion on routing, sharing nothing with what it judges.

`watch` reads a model with hooks of its own. `ROUTINGS` recomputes, token by token and in double
precision, what each family's router decides: written down from the formulas, not from the models'
code, and with the exact rule of steering added where its description says. Both say the same thing
in the same form: a table [token, expert] of weights, 0 where an expert is not selected.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

WIDTH = 12
"""Experts of the widest tiny model; narrower ones leave the last columns empty."""

MARGIN = 0.01


# -- watching ------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What went through one layer: the router's input [token, hidden] and the weights chosen."""

    inputs: list[Tensor] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)

    @property
    def weights(self) -> Tensor:
        """The weight of each expert for each token, [token, WIDTH]."""
        return torch.cat(self.tables)

    @property
    def selected(self) -> Tensor:
        return self.weights != 0

    @property
    def hidden(self) -> Tensor:
        return torch.cat(self.inputs)


def layer_number(name: str) -> int:
    found = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    assert found, name
    return int(found[1])


@contextmanager
def watch(model: PreTrainedModel) -> Iterator[dict[int, Seen]]:
    """Collect what the model's routed layers receive, by layer, until the block ends."""
    seen: dict[int, Seen] = {}
    handles = []

    def experts_hook(layer: int) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            _, index, weights = (*args, *(kwargs[key] for key in list(kwargs)))[:3]
            table = torch.zeros(index.shape[0], WIDTH, dtype=torch.float64)
            table.scatter_add_(1, index.long(), weights.double())
            seen.setdefault(layer, Seen()).tables.append(table)

        return hook

    def router_hook(layer: int, dense: bool) -> Callable:
        def hook(_module: nn.Module, args: tuple, output: Any) -> None:
            into = seen.setdefault(layer, Seen())
            into.inputs.append(args[0].detach().flatten(0, -2).clone())
            if dense:  # llama4: scores of all experts, those not selected are sigmoid(-inf) = 0
                scores = output[0].double()
                into.tables.append(nn.functional.pad(scores, (0, WIDTH - scores.shape[1])))

        return hook

    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("Experts") and name.endswith(".experts") and kind != "Llama4TextExperts":
            hook = experts_hook(layer_number(name))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        elif name.endswith((".gate", ".router")) and kind.endswith("Router"):
            hook = router_hook(layer_number(name), dense=kind == "Llama4Router")
            handles.append(module.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# -- recomputing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steered:
    """Experts of one layer that the exact rule acts on."""

    activated: tuple[int, ...] = ()
    deactivated: tuple[int, ...] = ()

    def logits(self, z: np.ndarray) -> np.ndarray:
        """Activated experts just above the largest logit, deactivated just below the smallest."""
        steered = z.copy()
        steered[list(self.activated)] = z.max() + MARGIN
        steered[list(self.deactivated)] = z.min() - MARGIN
        return steered

    def top(self, scores: np.ndarray, k: int) -> list[int]:
        """The k experts to select: activated first, deactivated last, by score in between."""

        def rank(expert: int) -> tuple[bool, bool, float]:
            return expert in self.activated, expert not in self.deactivated, scores[expert]

        return sorted(range(len(scores)), key=rank, reverse=True)[:k]


Parameters = dict[str, np.ndarray]
Chosen = tuple[Sequence[int], np.ndarray]
Routing = Callable[[np.ndarray, Parameters, Any, Steered], Chosen]
"""Hidden state of one token, the router's parameters, the config: the experts and their weights."""


def routed(
    hidden: Tensor, router: nn.Module, config: Any, routing: Routing, steered: Steered
) -> np.ndarray:
    """The table of weights that a layer's router gives these tokens."""
    state = {name: value.double().numpy() for name, value in router.state_dict().items()}
    table = np.zeros((hidden.shape[0], WIDTH))
    for token, h in enumerate(hidden.double().numpy()):
        experts, weights = routing(h, state, config, steered)
        table[token, list(experts)] = weights
    return table


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def softmax_then_top_k(h: np.ndarray, p: Parameters, config: Any, steered: Steered) -> Chosen:
    """Qwen3-MoE, OLMoE: probabilities over all experts, renormalised only where the config says."""
    probabilities = softmax(steered.logits(p["weight"] @ h))
    best = steered.top(probabilities, config.num_experts_per_tok)
    weights = probabilities[best]
    return best, weights / weights.sum() if config.norm_topk_prob else weights


def mixtral(h: np.ndarray, p: Parameters, config: Any, steered: Steered) -> Chosen:
    """A softmax over the selected logits alone, which is what renormalising comes to."""
    z = steered.logits(p["weight"] @ h)
    best = steered.top(z, config.num_experts_per_tok)
    return best, softmax(z[best])


def gpt_oss(h: np.ndarray, p: Parameters, config: Any, steered: Steered) -> Chosen:
    """The bias belongs to the logits: it moves the weights as well as the selection."""
    z = steered.logits(p["weight"] @ h + p["bias"])
    best = steered.top(z, config.num_experts_per_tok)
    return best, softmax(z[best])


def dbrx(h: np.ndarray, p: Parameters, config: Any, steered: Steered) -> Chosen:
    """Probabilities of the selected experts divided by their p-norm."""
    probabilities = softmax(steered.logits(p["layer.weight"] @ h))
    best = steered.top(probabilities, config.ffn_config.moe_top_k)
    order = config.ffn_config.moe_normalize_expert_weights
    return best, probabilities[best] / np.linalg.norm(probabilities[best], ord=order)


def in_best_groups(scores: np.ndarray, strength: np.ndarray, config: Any) -> np.ndarray:
    """For each expert whether its group is among the `topk_group` strongest."""
    kept = np.argsort(-strength)[: config.topk_group]
    return np.isin(np.arange(len(scores)) // (len(scores) // config.n_group), kept)


def deepseek_v3(h: np.ndarray, p: Parameters, config: Any, steered: Steered) -> Chosen:
    """Sigmoid scores; selected by score + bias within the groups with the best pairs of experts."""
    scores = sigmoid(steered.logits(p["weight"] @ h))
    biased = scores + p["e_score_correction_bias"]
    pairs = np.sort(biased.reshape(config.n_group, -1))[:, -2:].sum(-1)
    allowed = np.where(in_best_groups(biased, pairs, config), biased, -np.inf)
    best = steered.top(allowed, config.num_experts_per_tok)
    return best, scores[best] / scores[best].sum() * config.routed_scaling_factor


def deepseek_v2(h: np.ndarray, p: Parameters, config: Any, steered: Steered) -> Chosen:
    """Softmax scores; with groups, those outside of the strongest score 0."""
    scores = softmax(steered.logits(p["weight"] @ h))
    if config.topk_method == "group_limited_greedy":
        strongest = scores.reshape(config.n_group, -1).max(-1)
        scores = np.where(in_best_groups(scores, strongest, config), scores, 0.0)
    best = steered.top(scores, config.num_experts_per_tok)
    return best, scores[best] * config.routed_scaling_factor


def ernie4_5_moe(h: np.ndarray, p: Parameters, config: Any, steered: Steered) -> Chosen:
    """Selected by probability + bias, weighted by the probability alone."""
    scores = softmax(steered.logits(p["weight"] @ h))
    bias = p["moe_statics.e_score_correction_bias"].reshape(-1)
    best = steered.top(scores + bias, config.num_experts_per_tok)
    return best, scores[best] / max(scores[best].sum(), config.moe_norm_min)


def llama4(h: np.ndarray, p: Parameters, config: Any, steered: Steered) -> Chosen:
    z = steered.logits(p["weight"] @ h)
    best = steered.top(z, config.num_experts_per_tok)
    return best, sigmoid(z[best])


def phimoe(h: np.ndarray, p: Parameters, config: Any, steered: Steered) -> Chosen:
    """Sparsemixer: each of two experts weighs its share among those nearly as good as itself."""
    z = steered.logits(p["weight"] @ h)
    experts, weights, left = [], [], z.copy()
    for _ in range(2):
        best = int(left.argmax())
        near = (left[best] - left) / np.maximum(np.abs(z), left[best])
        near = near <= 2 * config.router_jitter_noise
        experts.append(best)
        weights.append(np.exp(left[best]) / np.exp(left[near]).sum())
        left[best] = -np.inf
    return experts, np.array(weights)


def deepseek_v4(h: np.ndarray, p: Parameters, config: Any, steered: Steered) -> Chosen:
    """Scores √softplus(z); a bias for the selection only."""
    scores = np.sqrt(np.log1p(np.exp(steered.logits(p["weight"] @ h))))
    best = steered.top(scores + p["e_score_correction_bias"], config.num_experts_per_tok)
    return best, scores[best] / scores[best].sum() * config.routed_scaling_factor


ROUTINGS: dict[str, Routing] = {
    "qwen3_moe": softmax_then_top_k,
    "olmoe": softmax_then_top_k,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "dbrx": dbrx,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v4": deepseek_v4,
    "ernie4_5_moe": ernie4_5_moe,
    "llama4_text": llama4,
    "phimoe": phimoe,
}
