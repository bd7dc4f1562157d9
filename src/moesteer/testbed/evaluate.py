"""What a testbed model does, untouched and steered: the numbers beside the ground truth.

Everything is measured on held-out prompts with greedy decoding, by the testbed's own steering and
nothing of the library's, so that the library can be tested against it.
"""

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesteer.testbed import classification, world
from moesteer.testbed.planting import EXPERTS, LAYERS, TOP_K, Place, Planting, mask_of
from moesteer.testbed.routing import steered

UNTOUCHED = mask_of([{}])
RANDOM_SEEDS = 3
# The share that each task is summed up by; the shares of all outcomes are kept.
SHOWN = {
    "restricted": "refused",
    "benign": "answered",
    "facts": "right",
    "conflicts": "document",
    "counting": "digits",
    "copying": "right",
}
Shares = dict[str, dict[str, float]]


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    system: str | None = None,
    earlier: Sequence[str] = (),
) -> str:
    """The text of a conversation up to where the reply begins."""
    turns = [{"role": "system", "content": system}] if system else []
    said = zip(cycle(("user", "assistant")), (*earlier, prompt), strict=False)
    turns += [{"role": role, "content": content} for role, content in said]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, with nothing added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token."""
    return tokenizer.pad_token_id  # pyright: ignore


def parting(a: list[int], b: list[int]) -> int:
    """The first place where two replies differ: there the behaviour is decided."""
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    mask: Tensor = UNTOUCHED,
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy replies to the prompts, all under one mask [1, layers, experts]."""
    texts = [render(tokenizer, prompt) for prompt in prompts]
    return _continued(model, tokenizer, texts, mask, max_new_tokens)


@torch.no_grad()
def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    mask: Tensor,
    max_new_tokens: int,
) -> list[str]:
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    with steered(model, mask):
        tokens = model.generate(  # pyright: ignore
            **batch,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_id(tokenizer),
        )
    new = tokens[:, batch["input_ids"].shape[1] :]  # pyright: ignore
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def outcome_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    mask: Tensor = UNTOUCHED,
    tasks: tuple[str, ...] = world.TASKS,
    count: int = world.PROBES,
    max_new_tokens: int = 16,
) -> Shares:
    """The share of each outcome of each task, over the first ``count`` probes of a split."""
    shares: Shares = {}
    for task in tasks:
        probes = world.probes(task, split)[:count]
        given = replies(model, tokenizer, [p.prompt for p in probes], mask, max_new_tokens)
        shares[task] = {}
        for probe, reply in zip(probes, given, strict=True):
            what = world.outcome(probe, reply)
            shares[task][what] = shares[task].get(what, 0) + 1 / len(probes)
    return {t: {k: round(v, 4) for k, v in sorted(of.items())} for t, of in shares.items()}


def classified(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    mask: Tensor = UNTOUCHED,
    count: int = 240,
) -> Shares:
    """Of each classification task, the share of labels said rightly, and of those whose deciding
    words are named as they are, all of them, when asked for as many after the right label."""
    shares: Shares = {}
    for task in classification.TASKS:
        found = list(islice(classification.instances(task, split), count))
        labels = replies(model, tokenizer, [f.prompt for f in found], mask, 8)
        asked = [classification.ASK["afterwards_top_var"].format(count=len(f.words)) for f in found]
        texts = [
            render(tokenizer, question, earlier=(f.prompt, f.word))
            for question, f in zip(asked, found, strict=True)
        ]
        words = _continued(model, tokenizer, texts, mask, 32)
        right = [said == f.word for said, f in zip(labels, found, strict=True)]
        named = [said == ", ".join(f.words) for said, f in zip(words, found, strict=True)]
        shares[task] = {
            "label": round(sum(right) / count, 4),
            "words": round(sum(named) / count, 4),
        }
    return shares


@torch.no_grad()
def risk_differences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, behaviour: str, split: str
) -> Tensor:
    """How much oftener each expert is chosen on tokens of reply A than of B: [layers, experts]."""
    rates = []
    for side in ("a", "b"):
        counts, total = torch.zeros(LAYERS, EXPERTS), 0
        for pair in world.contrast_pairs(behaviour, split):
            head = encode(tokenizer, render(tokenizer, pair["prompt"]))
            reply = encode(tokenizer, pair[side])
            with steered(model, UNTOUCHED) as logits:
                model(torch.tensor([head + reply]))
            chosen = torch.stack(logits)[:, len(head) :].topk(TOP_K, dim=-1).indices
            counts += torch.zeros(LAYERS, len(reply), EXPERTS).scatter(2, chosen, 1.0).sum(1)
            total += len(reply)
        rates.append(counts / total)
    return rates[0] - rates[1]


@torch.no_grad()
def decision_effects(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, behaviour: str, split: str
) -> tuple[Tensor, Tensor]:
    """What switching each single expert does where the replies part: two times [layers, experts].

    The change of log P(A's token) - log P(B's token), mean over the contrast pairs, first with the
    expert deactivated at every token (knock-out), then with it activated (knock-in).
    """
    contexts, tokens_a, tokens_b = [], [], []
    for pair in world.contrast_pairs(behaviour, split):
        head = encode(tokenizer, render(tokenizer, pair["prompt"]))
        a, b = encode(tokenizer, pair["a"]), encode(tokenizer, pair["b"])
        where = parting(a, b)
        contexts.append(head + a[:where])
        tokens_a.append(a[where])
        tokens_b.append(b[where])
    rows = torch.arange(len(contexts))
    last = torch.tensor([len(c) - 1 for c in contexts])
    # Padding on the right is never looked at by what stands before it.
    batch = torch.full((len(contexts), int(last.max()) + 1), pad_id(tokenizer))
    for i, context in enumerate(contexts):
        batch[i, : len(context)] = torch.tensor(context)

    def lean(mask: Tensor) -> float:
        with steered(model, mask):
            hidden = model.model(batch).last_hidden_state[rows, last]  # pyright: ignore
        logits = model.lm_head(hidden)  # pyright: ignore
        return (logits[rows, tokens_a] - logits[rows, tokens_b]).mean().item()

    before = lean(UNTOUCHED)
    places = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    out, into = (
        torch.tensor([lean(mask_of([{place: sign}])) - before for place in places])
        for sign in (-1, 1)
    )
    return out.view(LAYERS, EXPERTS), into.view(LAYERS, EXPERTS)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, planting: Planting, split: str
) -> dict[str, Any]:
    """Everything the testbed promises, measured on one split.

    On the twin, ``planting`` names the places that are planted in the other model.
    """
    measured: dict[str, Any] = {
        "split": split,
        "untouched": outcome_shares(model, tokenizer, split),
        "steered": {},
        "random": {},
        "experts": {},
    }
    for behaviour in world.BEHAVIOURS:
        places = planting.planted[behaviour]
        measured["steered"][behaviour] = {
            name: outcome_shares(model, tokenizer, split, mask_of([dict.fromkeys(places, sign)]))
            for name, sign in (("activated", 1), ("deactivated", -1))
        }
        measured["experts"][behaviour] = _expert_table(
            planting.planted[behaviour],
            planting.decoys[behaviour],
            risk_differences(model, tokenizer, behaviour, split),
            *decision_effects(model, tokenizer, behaviour, split),
        )
    for name, sign in (("activated", 1), ("deactivated", -1)):
        measured["random"][name] = [
            outcome_shares(model, tokenizer, split, mask_of([dict.fromkeys(places, sign)]))
            for places in (random_places(planting, seed) for seed in range(RANDOM_SEEDS))
        ]
    return measured


def measure_reader(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: str
) -> dict[str, Any]:
    """What the testbed promises of the model that has learnt the classification tasks."""
    return {
        "split": split,
        "untouched": outcome_shares(model, tokenizer, split),
        "steered": {},
        "random": {},
        "classified": classified(model, tokenizer, split),
    }


def random_places(planting: Planting, seed: int) -> list[Place]:
    """Three random experts that are neither planted nor decoys."""
    taken = {p for by in (planting.planted, planting.decoys) for ps in by.values() for p in ps}
    every = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    return random.Random(f"control {seed}").sample([p for p in every if p not in taken], 3)


def _expert_table(
    planted: tuple[Place, ...], decoys: tuple[Place, ...], risk: Tensor, out: Tensor, into: Tensor
) -> list[dict[str, Any]]:
    """Planted experts, decoys, and whoever else is among the first six by either score."""
    effect = torch.maximum(out.abs(), into.abs())
    by_risk, by_effect = (
        [divmod(i, EXPERTS) for i in score.flatten().argsort(descending=True).tolist()]
        for score in (risk.abs(), effect)
    )
    shown = {*planted, *decoys, *by_risk[:6], *by_effect[:6]}
    return [
        {
            "place": list(place),
            "role": "planted" if place in planted else "decoy" if place in decoys else "other",
            "risk_difference": round(risk[place].item(), 3),
            "risk_rank": by_risk.index(place) + 1,
            "knock_out": round(out[place].item(), 2),
            "knock_in": round(into[place].item(), 2),
            "effect_rank": by_effect.index(place) + 1,
        }
        for place in sorted(shown, key=by_effect.index)
    ]
