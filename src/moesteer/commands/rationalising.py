"""Commands about rationales: which words a model says it used, which it used, what people say."""

from typing import Literal

from moesteer.commands.common import (
    DEFAULT,
    ModelOptions,
    command_line,
    load_engine,
    load_profile,
)


def run(
    model: str,
    /,
    *,
    task: str,
    out: str | None = None,
    methods: list[str] | None = None,
    with_: str | None = None,
    behaviour: str | None = None,
    controls: int = 3,
    unit: Literal["word", "token"] = "word",
    pool: Literal["sum", "mean", "max"] = "sum",
    mask: Literal["delete", "unknown", "neutral"] = "delete",
    neutral: str | None = None,
    calibrate: bool = False,
    seeds: int = 3,
    limit: int | None = None,
    max_new_tokens: int = 128,
    plain: bool = False,
    checkpointing: bool = False,
    options: ModelOptions = DEFAULT,
    seed: int = 0,
) -> None:
    """Compare the words a model names, uses, and people mark as the reason of its labels.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`; a dense model too.
    task
        Instances to classify: .jsonl with texts, label, labels, rationale and prompt; e-SNLI
        (.csv), FEVER of ERASER (.jsonl beside docs/) or MedicalBios as they are published; a data
        set (ORG/NAME:split), or testbed:TASK[:SPLIT].
    out
        A folder for the results, for `report`. An interrupted run is taken up when started again.
        Without it only the table is printed.
    methods
        Which rationales; without it, all that the model has but integrated-gradients, which take a
        hundred passes an instance. Attributed: attention-last, attention-mean, attention-rollout,
        saliency-l1, saliency-l2, input-x-gradient, integrated-gradients, occlusion,
        gate-x-gradient, behaviour-routing. Prompted: unbound, unbound-two-turn, top-var,
        top-var-two-turn.
    with_
        A profile: the same once more under it, and under its controls.
    behaviour
        A profile with scores (from `detect`), for behaviour-routing.
    controls
        With a profile: how many controls with random experts or directions.
    unit
        What a rationale is made of: words, or tokens.
    pool
        A word's score from those of its tokens.
    mask
        How words are taken out: delete them, put the tokenizer's mask or unknown token in their
        place (unknown), or a neutral token.
    neutral
        With --mask neutral: the text whose first token it is; "_" if left out.
    calibrate
        Take from each label's log-probability what it has where the texts are "N/A".
    seeds
        How many random rationales each instance is compared with.
    limit
        Only the first so many instances.
    max_new_tokens
        Longest reply that names words; longer ones are cut, and counted.
    plain
        Without a chat template: the prompt is the text as it stands (base models).
    checkpointing
        Gradients in less memory and more time.
    seed
        Seed of random rationales and of the intervals.
    """
    from contextlib import nullcontext
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from moesteer.errors import MoesteerError
    from moesteer.generate import merged_options
    from moesteer.options import check_least
    from moesteer.rationale.explain import Settings, arms_with, explain, methods_of
    from moesteer.rationale.instances import read_instances
    from moesteer.report.progress import counted_progress
    from moesteer.report.rationale_page import rationale_page
    from moesteer.report.terminal import print_text

    check_least(0, controls=controls, seed=seed)
    check_least(1, seeds=seeds, limit=limit, max_new_tokens=max_new_tokens)
    if neutral is not None and mask != "neutral":
        raise MoesteerError(f"--neutral is for --mask neutral, and the mask is {mask}.")
    instances = read_instances(task)[:limit]
    profile, scored = load_profile(with_), load_profile(behaviour)
    engine = load_engine(model, options, profile, dense=True)
    settings = Settings(
        methods=methods_of(engine, methods if methods is not None else _default(options), scored),
        unit=unit,
        pool=pool,
        masking=mask,
        neutral="_" if neutral is None else neutral,
        calibrated=calibrate,
        seeds=seeds,
        plain=plain,
        checkpointing=checkpointing,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    if scored is not None and "behaviour-routing" not in settings.methods:
        raise MoesteerError("--behaviour is for behaviour-routing, which is not among --methods.")
    arms = arms_with(profile, engine.facts.layers, controls)
    chat_options = merged_options(profile, options.chat_option or [])
    kept = nullcontext(out) if out is not None else TemporaryDirectory()
    with kept as folder, counted_progress("rationale", "instances") as progress:
        summary = explain(
            engine,
            instances,
            settings,
            out=Path(folder) / "run" if out is None else folder,
            arms=arms,
            behaviour=scored,
            chat_options=chat_options,
            command=command_line(),
            progress=progress,
        )
    print_text(rationale_page(summary))
    if out is not None:
        print_text(f"written: {out}")


def _default(options: ModelOptions) -> list[str] | None:
    """The methods that need no gradients and no attention where the engine shows none."""
    from moesteer.rationale.prompting import PROMPTED

    return ["occlusion", *PROMPTED] if options.engine == "vllm" else None


def compare(runs: list[str], /, *, seed: int = 0) -> None:
    """Compare runs of `rationale` on the same instances: other models, masks, profiles.

    Parameters
    ----------
    runs
        Their folders.
    seed
        Seed of the intervals.
    """
    from moesteer.options import check_least
    from moesteer.rationale.comparing import compare_runs
    from moesteer.report.rationale_page import rationale_page
    from moesteer.report.terminal import print_text

    check_least(0, seed=seed)
    print_text(rationale_page(compare_runs(runs, seed)))
