"""The command that says who writes a direction."""

from moesteer.commands.common import DEFAULT, ModelOptions, command_line, load_engine


def writers(
    model: str,
    /,
    *,
    with_: str,
    restricted: str,
    harmless: str,
    out: str,
    batch_size: int = 16,
    options: ModelOptions = DEFAULT,
    seed: int = 0,
) -> None:
    """Say who writes a direction: attention, each expert, or the rest, in which layer.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`; a dense model too.
    with_
        A profile with one direction, from `direction` or `aim`.
    restricted
        Prompts that call the behaviour forth (side A), best others than it was found on: a file
        with a prompt a line, .csv with a column prompt, .jsonl with {"prompt": …} or
        {"messages": […]}, a data set (ORG/NAME:split), or testbed:TASK[:SPLIT].
    harmless
        Prompts that do not (side B), in the same forms.
    out
        A folder for the results, for `report`. An interrupted run is taken up when started again.
    batch_size
        Prompts a batch.
    seed
        Seed of the intervals.
    """
    from moesteer.directions.prompts import read_prompt_set
    from moesteer.directions.writers import find_writers
    from moesteer.errors import MoesteerError
    from moesteer.generate import check_limits
    from moesteer.profile import Profile
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import print_text
    from moesteer.report.writers_page import writers_page

    if options.engine != "transformers":
        raise MoesteerError(
            "writers reads what every part of the model writes, which only --engine transformers"
            " shows."
        )
    check_limits(1, 0, batch_size, seed)
    profile = Profile.load(with_)
    a, b = read_prompt_set(restricted), read_prompt_set(harmless)
    engine = load_engine(model, options, dense=True)
    with counted_progress("writers", "prompts") as progress:
        result = find_writers(
            engine,
            profile,
            a,
            b,
            out=out,
            batch_size=batch_size,
            seed=seed,
            command=command_line(),
            progress=progress,
        )
    print_text(writers_page(result))
    print_text(f"written: {out}")
