"""The command that compares detectors with what interventions show."""

from typing import Literal

from moesteer.commands.common import DEFAULT, ModelOptions, command_line, load_engine


def detectors(
    model: str,
    /,
    *,
    pairs: str,
    out: str | None = None,
    over: Literal["decision", "span"] = "decision",
    beside: list[str] | None = None,
    neutral: str | None = None,
    layers: int | None = None,
    pairs_used: int | None = None,
    options: ModelOptions = DEFAULT,
    seed: int = 0,
) -> None:
    """Compare what detectors say of experts with what switching each expert does.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    pairs
        JSONL or CSV file, data set (ORG/NAME:split), or testbed:BEHAVIOUR[:SPLIT].
    out
        A folder for the results, with profiles of the causal scores (knock-out.safetensors, …) for
        `select` and `search`. An interrupted run is taken up when started again.
    over
        What is read: the token where the sides part, or the probability of the whole targets, for
        pairs whose prompts differ.
    beside
        Pairs of another behaviour, to see what else an expert moves. May be repeated.
    neutral
        JSONL or CSV with prompt and reply on which no behaviour shows.
    layers
        Screen the layers by blocks of experts, and go into so many. Without it: all, or as many as
        have 1,000 experts together.
    pairs_used
        Use only so many pairs of each set, drawn at random.
    seed
        Seed of intervals and tests.
    """
    import sys

    from moesteer.chat import parse_chat_options
    from moesteer.contrast import read_pairs
    from moesteer.detection.compare_to_folder import compare_to_folder
    from moesteer.detection.comparing import drawn, marks_of, planted_in, read_neutral
    from moesteer.errors import MoesteerError
    from moesteer.report.detectors_page import cost_line, detectors_page
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import print_text

    if options.engine != "transformers":
        raise MoesteerError("detectors needs gradients, which only --engine transformers has.")
    chat_options = parse_chat_options(options.chat_option or [])
    read = drawn(read_pairs(pairs), pairs_used)
    others = {name: drawn(read_pairs(name), pairs_used) for name in beside or []}
    texts = drawn(read_neutral(neutral), pairs_used) if neutral else []
    engine = load_engine(model, options)
    truth = planted_in(model, pairs)
    with counted_progress("detectors", "texts") as progress:
        result = compare_to_folder(
            engine,
            read,
            out=out,
            source=pairs,
            beside=others,
            neutral=texts,
            over=over,
            layers=layers,
            truth=truth,
            chat_options=chat_options,
            seed=seed,
            command=command_line(),
            say=lambda cost: print(cost_line(cost, len(engine.facts.layers)), file=sys.stderr),
            progress=progress,
        )
    print_text(detectors_page(result, marks_of(truth)))
    if out:
        print_text(f"written: {out}")
