"""Commands that watch how requests are routed, beside how ordinary ones are."""

import sys
from typing import Literal

from moesteer.commands.common import DEFAULT, ModelOptions, check_out, command_line, load_engine


def watch_fit(
    model: str,
    /,
    *,
    reference: str,
    out: str,
    linked: str | None = None,
    false_alarms: float = 0.01,
    over: Literal["prompt", "reply"] = "prompt",
    options: ModelOptions = DEFAULT,
    seed: int = 0,
) -> None:
    """Learn from ordinary prompts how they are routed, and from which drift on to raise an alarm.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    reference
        Prompts of ordinary use: a file with a prompt a line, .csv with a column prompt, .jsonl with
        {"prompt": …} or {"messages": […]}, a data set (ORG/NAME:split), or testbed:TASK[:SPLIT].
        Half are fitted on, half are held out for the thresholds.
    out
        The file to write, for `moesteer watch --by` and `moesteer serve --watch`.
    linked
        A profile whose experts (those it activates, or else those it deactivates) are watched for
        falling silent, e.g. the experts of refusal.
    false_alarms
        The share of ordinary prompts that may raise an alarm.
    over
        Whose tokens are watched: the prompt's, or those of the reply that stands beside it (a
        .jsonl of prompt and reply, as `moesteer generate` writes it).
    seed
        Seed of which prompts are held out.
    """
    from moesteer.directions.prompts import read_prompt_set
    from moesteer.generate import check_limits
    from moesteer.monitoring.watch import fit_to_file
    from moesteer.profile import Profile
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import print_text
    from moesteer.report.watch_page import reference_lines

    check_limits(1, 0, seed=seed)
    check_out(out, reference, linked)
    prompts = read_prompt_set(reference)
    experts = None if linked is None else Profile.load(linked)
    engine = load_engine(model, options)
    with counted_progress("watch", "tokens") as progress:
        found = fit_to_file(
            engine,
            prompts,
            experts,
            out=out,
            over=over,
            false_alarms=false_alarms,
            chat_options=options.chat_option or [],
            source=reference,
            seed=seed,
            command=command_line(),
            progress=progress,
        )
    print_text(*reference_lines(found))


def watch_run(
    model: str,
    /,
    *prompts: str,
    by: str,
    file: str | None = None,
    out: str | None = None,
    system: str | None = None,
    options: ModelOptions = DEFAULT,
) -> None:
    """Say of each prompt, or reply, whether it is routed as ordinary ones are; JSON lines out.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    prompts
        What to judge. Without prompts and file: one a line from standard input.
    by
        What `moesteer watch fit` wrote.
    file
        A file of prompts: a line each, .csv with a column prompt, or .jsonl with {"prompt": …}
        or {"messages": […]}, with "reply" beside it where replies are watched.
    out
        Where to write the JSON lines; without it, standard output.
    system
        A system prompt for all.
    """
    from pathlib import Path

    from moesteer.generate import read_prompts
    from moesteer.monitoring.reference_file import load_reference
    from moesteer.monitoring.watch import check
    from moesteer.report.progress import counted_progress
    from moesteer.report.watch_page import verdict_lines

    if out is not None:
        check_out(out, file, by)
    reference = load_reference(Path(by))
    asked = read_prompts(prompts, file, system)
    engine = load_engine(model, options)
    with counted_progress("watch", "texts") as progress:
        verdicts = check(
            engine,
            asked,
            reference,
            out=out,
            chat_options=options.chat_option or [],
            progress=progress,
        )
    for line in verdict_lines(verdicts, reference):
        print(line, file=sys.stderr)
