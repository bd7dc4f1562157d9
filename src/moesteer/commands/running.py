"""Commands that run a model, steered or not."""

import sys

from moesteer.commands.common import DEFAULT, ModelOptions, check_out, load_engine, load_profile


def generate(
    model: str,
    /,
    *prompts: str,
    with_: str | None = None,
    file: str | None = None,
    out: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    batch_size: int = 16,
    options: ModelOptions = DEFAULT,
    seed: int = 0,
) -> None:
    """Reply to prompts, steered by a profile or not; JSON lines out.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    prompts
        What to ask. Without prompts and file: one a line from standard input.
    with_
        The profile to steer with.
    file
        A file of prompts: a line each, .csv with a column prompt, or .jsonl with {"prompt": …}
        or {"messages": […]}.
    out
        Where to write the JSON lines; without it, standard output.
    system
        A system prompt for all.
    max_new_tokens
        The longest reply, in tokens.
    temperature
        0 is greedy.
    batch_size
        Prompts a batch.
    seed
        Seed of sampling.
    """
    from moesteer.generate import check_limits, generate_to, read_prompts
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import evidence_lines, gate_lines

    if out is not None:
        check_out(out, file, with_)
    check_limits(max_new_tokens, temperature, batch_size, seed)
    asked = read_prompts(prompts, file, system)
    profile = load_profile(with_)
    engine = load_engine(model, options, profile, dense=bool(profile and profile.directions))
    with counted_progress("generate", "prompts") as progress:
        evidence, opened = generate_to(
            out,
            engine,
            asked,
            profile,
            options=options.chat_option or [],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    for line in [*evidence_lines(evidence), *gate_lines(opened)]:
        print(line, file=sys.stderr)


def chat(
    model: str,
    /,
    *,
    with_: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    options: ModelOptions = DEFAULT,
) -> None:
    """Talk with a model, and switch, replace or drop the steering while you talk.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    with_
        The profile to start with.
    system
        A system prompt.
    max_new_tokens
        The longest reply, in tokens.
    temperature
        0 is greedy.
    """
    from moesteer.chat_session import ChatSession, talk
    from moesteer.generate import check_limits

    check_limits(max_new_tokens, temperature)
    profile = load_profile(with_)
    engine = load_engine(model, options, profile, dense=bool(profile and profile.directions))
    talk(
        ChatSession(engine, profile, system, options.chat_option or [], max_new_tokens, temperature)
    )
