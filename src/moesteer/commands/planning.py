"""The command that says what work on a model will take, before it starts."""

from typing import Literal


def plan(
    model: str,
    /,
    *,
    pairs: int,
    pair_tokens: int = 200,
    prompt_tokens: int = 100,
    prompts: int = 100,
    new_tokens: int = 512,
    batch_size: int = 16,
    tasks: int = 2,
    seeds: int = 3,
    budget: int = 48,
    layers: int | None = None,
    hardware: str | None = None,
    device: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    revision: str | None = None,
) -> None:
    """Say what memory and time detection, knock-out, search and evaluation will take.

    From the config alone: a few of the model's layers are built with random weights and measured
    here, or other hardware is reckoned with.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    pairs
        How many contrast pairs.
    pair_tokens
        Tokens of one side of a pair.
    prompt_tokens
        Tokens of a rendered prompt: a task's, and what stands in a pair before its sides part.
    prompts
        How many prompts a task has, on dev and on test each.
    new_tokens
        Tokens of a reply.
    batch_size
        Prompts a batch, as of `evaluate` and `search`.
    tasks
        How many tasks: the target, and those that measure the price.
    seeds
        How many controls of each kind, as of `evaluate` and `search`.
    budget
        Trials of one search.
    layers
        Into how many layers knock-out goes, as of `detectors`.
    hardware
        A machine that is not here: memory=80GB,tflops=400,bandwidth=3.3TB. Far rougher than what is
        measured.
    device
        The device to measure on: cpu, cuda:0, …; by default the first GPU, if there is one.
    dtype
        auto, float32, bfloat16 or float16.
    revision
        Branch, tag or commit of the model.
    """
    from moesteer.errors import MoesteerError
    from moesteer.options import check_least
    from moesteer.planning.estimate import plan_given, plan_here
    from moesteer.planning.roofline import parse_hardware
    from moesteer.planning.sliced import outline
    from moesteer.planning.work import Job
    from moesteer.report.plan_page import plan_page
    from moesteer.report.terminal import print_text

    if hardware is not None and device is not None:
        raise MoesteerError(
            "--device is what is measured on, and --hardware reckons with a machine that is not"
            " here; give one of them."
        )
    numbers = {
        "pairs": pairs,
        "pair_tokens": pair_tokens,
        "prompt_tokens": prompt_tokens,
        "prompts": prompts,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "tasks": tasks,
        "budget": budget,
    }
    check_least(1, **numbers, layers=layers)
    check_least(0, seeds=seeds)
    job = Job(**numbers, seeds=seeds, layers=layers)
    given = None if hardware is None else parse_hardware(hardware)
    whole = outline(model, revision, dtype)
    made = plan_here(whole, job, device) if given is None else plan_given(whole, job, given)
    print_text(plan_page(made))
