"""SteerMoE's road: find experts on contrast pairs, steer them, and see what it does and costs.

Settings are the paper's (Fayyaz et al. 2025, arXiv 2509.09660): risk difference over target spans,
experts ranked over all layers by |Δ|, its own rule, greedy replies of up to 512 tokens, thinking
off, its judges; for its six models its numbers of experts. What goes beyond it: numbers for other
models are chosen on dev prompts and measured on others, and controls stand beside everything.

    judging → detection → numbers → outcomes, a step an aim → ablation, fluency
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from moesteer.contrast import read_pairs
from moesteer.errors import MoesteerError
from moesteer.reproduce.given import bundled_tasks, given_tasks
from moesteer.reproduce.outcome import NotRun
from moesteer.reproduce.steermoe.ablation import ablation
from moesteer.reproduce.steermoe.detection import detection
from moesteer.reproduce.steermoe.fluency import fluency
from moesteer.reproduce.steermoe.judging import judging
from moesteer.reproduce.steermoe.numbers import numbers
from moesteer.reproduce.steermoe.outcomes import steering
from moesteer.reproduce.steermoe.plan import (
    AIMS,
    PAIRS,
    PAPER,
    SMALL,
    STAND_INS,
    Aim,
    Sizes,
    Work,
)
from moesteer.reproduce.steps import Road


def road(
    model: str,
    *,
    bundled: bool,
    pairs: Mapping[str, str] | None = None,
    data: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Road:
    """The steps for a model, with what was brought: contrast pairs by behaviour, prompts by task.

    Raises MoesteerError for names that are none, and for data that can't be read.
    """
    sources = dict(pairs or {})
    known = None if bundled else PAPER.model_of(model)
    if wrong := [name for name in sources if name not in PAIRS]:
        raise MoesteerError(f"--pairs: {wrong[0]} is none of {', '.join(PAIRS)}.")
    if bundled:
        sources = {behaviour: f"testbed:{behaviour}" for behaviour in PAIRS}
        aims = tuple(
            replace(aim, targets=targets, prices=prices)
            for aim in AIMS
            for targets, prices in [STAND_INS[aim.behaviour]]
        )
        tasks, sizes = bundled_tasks(_names(aims)), SMALL
    else:
        aims = AIMS
        splits = ("test",) if known else ("dev", "test")
        tasks, sizes = given_tasks(_names(aims), data or {}, splits), Sizes()
    work = Work(
        known,
        bundled,
        sources,
        {behaviour: read_pairs(source) for behaviour, source in sources.items()},
        tasks,
        replace(sizes, limit=limit or sizes.limit),
        aims,
    )
    return Road(
        PAPER,
        model,
        bundled,
        work.sizes.limit,
        _settings(work),
        (
            judging(work),
            *(detection(work, behaviour) for behaviour in PAIRS),
            numbers(work),
            *(steering(work, aim) for aim in aims),
            ablation(work),
            fluency(work),
        ),
        tuple(_absent(work)),
        {} if bundled else {f"pairs {name}": file for name, file in sources.items()} | tasks.files,
    )


def _names(aims: Sequence[Aim]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for aim in aims for name in (*aim.targets, *aim.prices)))


def _settings(work: Work) -> tuple[str, ...]:
    sizes = work.sizes
    tokens = PAPER.number("max_new_tokens")
    known = work.known
    return (
        "detector: risk difference over the target spans, ranked over all layers by its size",
        "rule: the paper's, on the log-softmax of the router's logits, ε = 0.01",
        "numbers of experts: "
        + (f"the paper's for {known.name}" if known else "chosen on dev prompts, as below"),
        "replies: greedy, "
        + ("up to 16 tokens, as the testbed's tasks say" if work.bundled else f"{tokens} tokens"),
        "prompts: the test split of each task"
        + (f", the first {sizes.limit} of it" if sizes.limit else ""),
        f"controls: reversed, bottom-ranked, and {sizes.seeds} each of random and matched experts",
    )


def _absent(work: Work) -> Iterator[NotRun]:
    """Each task that is not here, once, with the steps that would ask it."""
    for name, missing in work.tasks.missing.items():
        steps = [aim.title for aim in work.aims if name in (*aim.targets, *aim.prices)]
        steps += ["activation against deactivation"] * (name == "fluency")
        yield NotRun(f"{name} ({', '.join(steps)})", missing)
    if "strongreject" not in work.tasks.own:
        yield NotRun(
            "through a prompt template (away from safe)",
            "none is shipped: copy the card (moesteer tasks strongreject), write yours as its"
            " template, and give --data MY_CARD.toml=FILE.",
        )
