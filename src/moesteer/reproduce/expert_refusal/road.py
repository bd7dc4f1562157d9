"""Expert-aware refusal steering's road: the refusal direction, and the experts that write it.

Settings are the paper's (Marbut, Olson, Wheeler 2026, arXiv 2606.04160, on Arditi et al. 2024): 128
and 32 prompts a side, filtered by the refusal score; top-1 routing of the last five tokens, over
the paper's threshold; each expert forced; coefficients from 1 to 400; the best of KL ≤ 1 judged on
25 prompts of 25 tokens; ten experts below the threshold put through the same search. Everything is
measured on prompts that no direction was found on, in three outcomes.

    direction → writing; routing → searching, which compares with the direction
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from moesteer.directions.prompts import check_apart, read_prompt_set
from moesteer.errors import MoesteerError
from moesteer.evaluation.direction_choices import WEIGHTED
from moesteer.generate import Prompt
from moesteer.reproduce.expert_refusal.direction import (
    ADDED,
    DIRECTION,
    OUT,
    steer_direction,
)
from moesteer.reproduce.expert_refusal.plan import (
    DATA,
    METHODS,
    PAPER,
    SEED,
    SMALL,
    WAYS,
    Sizes,
    Work,
    folder_of,
)
from moesteer.reproduce.expert_refusal.routing import EXPERTS, route
from moesteer.reproduce.expert_refusal.searching import search_all
from moesteer.reproduce.expert_refusal.writing import find_who_writes
from moesteer.reproduce.outcome import NotRun
from moesteer.reproduce.papers import PaperModel
from moesteer.reproduce.steps import Road, Step

NEEDED = {
    "restricted": "prompts that the model refuses, a prompt a line or .csv or .jsonl with prompt:"
    " 160 to find directions on, and as many again to measure on",
    "harmless": "as many that it answers, in the same forms",
}
LEAST = 24
"""With fewer prompts a side, too few are left to measure on."""
BENCHMARKS = "mmlu hellaswag arc_challenge winogrande gsm8k truthfulqa_mc2"


def road(
    model: str, *, bundled: bool, data: Mapping[str, str] | None = None, limit: int | None = None
) -> Road:
    """The steps for a model, with the two sets of prompts that were brought.

    Raises MoesteerError for other names, for prompts that can't be read or are too few, and where
    one stands in both sets.
    """
    sources = dict(data or {})
    if wrong := [name for name in sources if name not in DATA]:
        raise MoesteerError(f"--data: {wrong[0]} is none of {', '.join(DATA)}.")
    known = None if bundled else PAPER.model_of(model)
    sizes = SMALL if bundled else Sizes()
    sizes = replace(sizes, limit=limit or sizes.limit)
    if bundled:
        sources = {"restricted": "testbed:restricted", "harmless": "testbed:benign"}
    read = {name: read_prompt_set(source) for name, source in sources.items()}
    if len(read) == len(DATA):
        check_apart(read["restricted"], read["harmless"])
    parts = {
        name: (prompts, read_prompt_set(f"{sources[name]}:test"))
        if bundled
        else parted(prompts, sources[name], sizes)
        for name, prompts in read.items()
    }
    work = Work(
        bundled,
        {name: found_on for name, (found_on, _) in parts.items()},
        {name: kept_back for name, (_, kept_back) in parts.items()},
        sizes,
        _threshold(known),
    )
    missing = " ".join(
        f"--data {name}=FILE, {NEEDED[name]}." for name in DATA if name not in sources
    )
    return Road(
        PAPER,
        model,
        bundled,
        sizes.limit,
        _settings(work, known),
        tuple(replace(step, missing=missing) for step in _steps(work)),
        (
            NotRun(
                "capability: MMLU, HellaSwag, ARC, Winogrande, GSM8K, TruthfulQA",
                "another command: moesteer lm-eval MODEL"
                f" --with OUT/{folder_of(WAYS[0][0], 'one')}/best.safetensors --tasks {BENCHMARKS}",
            ),
        ),
        {} if bundled else sources,
    )


def _steps(work: Work) -> tuple[Step, ...]:
    return (
        Step(
            "refusal direction",
            "that of dense models: found, projected out, and added",
            partial(steer_direction, work),
            runs=(DIRECTION, OUT, ADDED),
        ),
        Step(
            "who writes it",
            "what attention and the experts write along it",
            partial(find_who_writes, work),
            runs=("writers",),
        ),
        Step(
            "refusal-specific routing",
            f"first choices of the last 5 tokens, kept from {work.threshold:g} points on; every"
            " expert's direction",
            partial(route, work),
            runs=(EXPERTS,),
        ),
        Step(
            "directions of experts",
            "the best of all kept experts, positions and coefficients, alone and by layer; and of"
            " experts below the threshold",
            partial(search_all, work),
            runs=tuple(folder_of(way, method) for way, _ in WAYS for method in METHODS),
        ),
    )


def _threshold(known: PaperModel | None) -> float:
    found = None if known is None else known.threshold
    return float(PAPER.number("threshold") if found is None else found)


def _settings(work: Work, known: PaperModel | None) -> tuple[str, ...]:
    sizes = work.sizes
    judged = min(sizes.limit or PAPER.number("judged_prompts"), PAPER.number("judged_prompts"))
    return (
        f"prompts: up to {sizes.fit} a side to fit on and {sizes.validate} to choose on, filtered"
        " by the refusal score; measured on others"
        + (f", the first {sizes.limit} of each set" if sizes.limit else ""),
        "refusal direction: lowest bypass with KL ≤ 0.1, induce ≥ 0, layer below 0.8 of all",
        f"routing: top-1, last 5 tokens, kept from {work.threshold:g} percentage points on"
        + (f" (the paper's for {known.name})" if known else ""),
        "directions of experts: each expert forced, last 5 positions; added at its layer, weighted"
        " by the router's probability",
        f"search: coefficients from {WEIGHTED[0]:g} to {WEIGHTED[-1]:g}, KL ≤ 1, the best"
        f" {sizes.budget} judged on {judged} prompts"
        f" of {16 if work.bundled else PAPER.number('judged_tokens')} tokens",
        f"controls: {sizes.seeds} of each kind; {PAPER.number('control_experts')} experts below the"
        " threshold (or as many as are kept) in the same search",
    )


def parted(
    prompts: Sequence[Prompt], source: str, sizes: Sizes
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to find directions on, no more than half of them, and those that are kept back."""
    if len(prompts) < LEAST:
        raise MoesteerError(
            f"{source} holds {len(prompts)} prompts; at least {LEAST} are needed: half of them to"
            " find directions on, half to measure on."
        )
    if several := [prompt for prompt in prompts if len(prompt.messages) > 1]:
        raise MoesteerError(
            f"{several[0].source}: {len(several[0].messages)} messages; give prompts of one."
        )
    drawn = random.Random(SEED).sample(list(prompts), len(prompts))
    found_on = min(sizes.fit + sizes.validate, len(prompts) // 2)
    return drawn[:found_on], drawn[found_on:]
