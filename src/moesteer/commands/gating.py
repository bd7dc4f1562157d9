"""Commands that say on which requests a profile steers."""

from typing import Literal

from moesteer.commands.common import (
    DEFAULT,
    ModelOptions,
    check_out,
    command_line,
    load_engine,
    save_profile,
)


def gate(
    model: str,
    /,
    *,
    with_: str,
    opens: str,
    keeps_shut: str,
    out: str,
    by: Literal["routing", "direction"] = "routing",
    false_alarms: float = 0.05,
    last: int = 1,
    fit: int = 128,
    validate: int = 128,
    batch_size: int = 16,
    options: ModelOptions = DEFAULT,
    seed: int = 0,
) -> None:
    """Let a profile steer only requests of one kind: fit a probe on prompts, choose its threshold.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    with_
        The profile to put the gate on; a gate that it has is replaced.
    opens
        Prompts that are to be steered: a line each, .jsonl with {"prompt": …} or {"messages": […]},
        .csv with a column prompt, a data set ORG/NAME:split, or testbed:TASK.
    keeps_shut
        Prompts that are to be left alone, in the same forms.
    out
        The profile to write.
    by
        What is read of a prompt: which experts its tokens select (routing), or the residual stream
        at its last token (direction; to be fitted with --engine transformers).
    false_alarms
        The share of dev prompts of --keeps-shut that may open the gate.
    last
        With --by routing: how many of a prompt's last tokens are read; 0: all. The last ones have
        heard the whole prompt.
    fit
        Prompts a side to fit on.
    validate
        Prompts a side for dev, which the threshold is chosen on.
    batch_size
        Prompts a batch.
    seed
        Seed of which prompts are fitted on and which are dev.
    """
    from dataclasses import replace

    from moesteer.directions.prompts import check_sizes, draw_sets, read_prompt_set
    from moesteer.errors import MoesteerError
    from moesteer.gating.fitting import fit_gate
    from moesteer.gating.threshold import check_enough
    from moesteer.generate import check_limits, check_steers, merged_options
    from moesteer.options import check_least
    from moesteer.profile import Profile
    from moesteer.profile_fit import check_model
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import print_text, profile_facts
    from moesteer.tally import tally

    if by == "direction" and options.engine == "vllm":
        raise MoesteerError(
            "a direction is fitted to what enters every layer, which vLLM does not show; make the"
            " gate with --engine transformers. vLLM runs it then."
        )
    if by == "direction" and last != 1:
        raise MoesteerError("--last is for --by routing; a direction is read at the last token.")
    check_limits(1, 0, batch_size, seed)
    check_least(0, last=last)
    check_sizes(fit, validate)
    check_out(out, with_, opens, keeps_shut)
    profile = Profile.load(with_)
    check_steers(profile)
    a, b = read_prompt_set(opens), read_prompt_set(keeps_shut)
    check_enough(min(len(b), validate), false_alarms)
    chat_options = merged_options(profile, options.chat_option or [])
    engine = load_engine(model, options, profile, dense=by == "direction")
    check_model(profile, engine.facts)
    sets = draw_sets(engine, a, b, fit=fit, validate=validate, chat_options=chat_options, seed=seed)
    dev = len(sets.validation.a) + len(sets.validation.b)
    with counted_progress("gate", "prompts") as progress:
        found = fit_gate(
            engine,
            sets,
            by=by,
            last=last or None,
            false_alarms=false_alarms,
            batch_size=batch_size,
            seed=seed,
            source=f"{opens} and {keeps_shut}",
            command=command_line(),
            progress=tally(progress, len(sets.all) + dev),
        )
    gated = replace(profile, gate=found)
    save_profile(gated, out)
    print_text(profile_facts(gated))
    print_text(f"written: {out}")
