"""Commands that run other people's test suites on a steered model."""

import os
import sys

from moesteer.commands.common import (
    DEFAULT,
    ModelOptions,
    command_line,
    load_engine,
    load_profile,
)


def lm_eval(
    model: str,
    /,
    *,
    with_: str,
    tasks: list[str],
    out: str,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    apply_chat_template: bool = False,
    seeds: int = 3,
    options: ModelOptions = DEFAULT,
) -> None:
    """Run tasks of lm-evaluation-harness: a profile beside the unsteered model and random controls.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    with_
        The profile to measure.
    tasks
        Tasks or groups of lm-eval, also joined by commas. `lm-eval ls tasks` lists them.
    out
        The folder of results: lm-eval's own of each arm, and the comparison. An interrupted run is
        taken up when started again.
    include_path
        A folder with tasks of your own, as lm-eval's YAML.
    limit
        Only the first so many documents of each task.
    num_fewshot
        How many examples stand before each question, instead of each task's own number.
    batch_size
        Texts a batch.
    apply_chat_template
        Put the prompts into the model's chat template; lm-eval does not without it.
    seeds
        How many random controls.
    """
    from moesteer.errors import MoesteerError

    if options.engine == "vllm":
        raise MoesteerError(
            "lm-eval's arms run in transformers. For vLLM start `moesteer serve MODEL --profile"
            " NAME=FILE` and run lm-eval's own model local-completions on it, steered as"
            " model=MODEL:NAME; the page on harnesses in the documentation shows how."
        )
    if options.chat_option and not apply_chat_template:
        raise MoesteerError("--chat-option has no effect without --apply-chat-template.")
    if not sys.stderr.isatty():  # bars of progress of lm-eval and datasets
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        from moesteer.harnesses.lm_eval_arms import compare_on_tasks
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0].startswith("moesteer"):
            raise
        raise MoesteerError(
            f"lm-evaluation-harness is not installed ({error.name} is missing):"
            " pip install 'moesteer[lm-eval]'"
        ) from None
    from moesteer.chat import parse_chat_options
    from moesteer.report.harness_page import harness_page
    from moesteer.report.terminal import print_text

    chat_options = parse_chat_options(options.chat_option or [])
    profile = load_profile(with_)
    assert profile is not None
    comparison = compare_on_tasks(
        load_engine(model, options, profile, dense=not profile.steered_layers),
        profile,
        [name for text in tasks for name in text.split(",") if name],
        out=out,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        chat_options=chat_options,
        seeds=seeds,
        say=_say,
        command=command_line(),
    )
    print_text(harness_page(comparison))
    print_text(f"written: {out}")


def _say(line: str) -> None:
    print(f"moesteer: {line}", file=sys.stderr)
