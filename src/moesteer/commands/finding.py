"""Commands that find experts: from pairs to scores to a profile."""

from typing import Literal

from moesteer.commands.common import (
    DEFAULT,
    ModelOptions,
    check_out,
    command_line,
    load_engine,
    save_profile,
)


def pairs_refusal(source: str, /, *, out: str, refusals: str | None = None, seed: int = 0) -> None:
    """Make contrast pairs from prompts with replies: A refuses, B is the reply.

    Parameters
    ----------
    source
        JSONL or CSV with prompt and reply, or a data set.
    out
        The JSONL file of pairs to write.
    refusals
        A file with a refusal a line, instead of the built-in ones.
    seed
        Seed of which refusal goes where.
    """
    from moesteer.pair_builders import DEFAULT_REFUSALS, read_refusals, refusal_pairs, write_pairs

    phrases = read_refusals(refusals) if refusals else DEFAULT_REFUSALS
    check_out(out, source, refusals)
    write_pairs(refusal_pairs(source, phrases, seed), out)


def pairs_document(source: str, /, *, out: str) -> None:
    """Make contrast pairs from documents with questions: A asks with the document, B without.

    Parameters
    ----------
    source
        JSONL or CSV with document and question, or a data set.
    out
        The JSONL file of pairs to write.
    """
    from moesteer.pair_builders import document_pairs, write_pairs

    check_out(out, source)
    write_pairs(document_pairs(source), out)


def detect(
    model: str,
    /,
    *,
    pairs: str,
    out: str,
    activate: int = 0,
    deactivate: int = 0,
    toward: Literal["a", "b"] | None = None,
    detector: str = "risk-difference",
    match_spans: bool = False,
    options: ModelOptions = DEFAULT,
    seed: int = 0,
) -> None:
    """Find the experts that go with a behaviour, from contrast pairs; writes a profile.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    pairs
        JSONL or CSV file, data set (ORG/NAME:split), or testbed:BEHAVIOUR[:SPLIT].
    out
        The profile to write. An interrupted run is taken up when started again.
    activate
        How many experts to activate; with 0 and 0 all scores are kept for `select`.
    deactivate
        How many experts to deactivate.
    toward
        The side of the pairs to steer towards.
    detector
        The score: risk-difference, log-odds, paired-t, npmi, top-1 (risk difference of the expert
        with the largest weight), probability (difference of the router's) or stability.
    match_spans
        Count equally many target tokens of either side, at the same relative positions.
    seed
        Seed of the intervals and tests.
    """
    from moesteer.chat import parse_chat_options
    from moesteer.contrast import read_pairs
    from moesteer.detection.detect_to_file import detect_to_file
    from moesteer.detection.detectors import detector_named
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import print_text, profile_page

    chat_options = parse_chat_options(options.chat_option or [])
    check_out(out, pairs)
    detector_named(detector)
    read = read_pairs(pairs)
    engine = load_engine(model, options)
    with counted_progress("detect", "tokens") as progress:
        profile = detect_to_file(
            engine,
            read,
            out=out,
            select=(activate, deactivate, toward),
            detector=detector,
            match_spans=match_spans,
            chat_options=chat_options,
            source=pairs,
            seed=seed,
            command=command_line(),
            progress=progress,
        )
    print_text(profile_page(profile, top=10))
    print_text(f"written: {out}")


def import_ranking(file: str, /, *, top_k: int, out: str) -> None:
    """Read a ranking that the SteerMoE authors published (a pickled table) into a profile.

    Parameters
    ----------
    file
        The pickle. It is read by an allow-list that can build a table and nothing else.
    top_k
        Experts a token of that model (k), which such files don't say.
    out
        The profile to write; choose experts from it with `select`.
    """
    from moesteer.detection.importing import profile_from_ranking
    from moesteer.report.terminal import print_text, profile_page

    profile = profile_from_ranking(file, top_k=top_k, command=command_line())
    save_profile(profile, out)
    print_text(profile_page(profile, top=10))
    print_text(f"written: {out}")


def select(
    profile: str, /, *, activate: int = 0, deactivate: int = 0, toward: Literal["a", "b"], out: str
) -> None:
    """Choose which experts a profile activates and deactivates, from the scores it holds.

    Parameters
    ----------
    profile
        A profile with scores, from `detect` or `import-ranking`.
    activate
        How many experts to activate.
    deactivate
        How many experts to deactivate.
    toward
        The side of the pairs to steer towards.
    out
        The profile to write.
    """
    from moesteer.detection.selecting import select_experts
    from moesteer.profile import Profile
    from moesteer.report.terminal import print_text, profile_page

    chosen = select_experts(
        Profile.load(profile), activate=activate, deactivate=deactivate, toward=toward
    ).made_by(command_line())
    save_profile(chosen, out)
    print_text(profile_page(chosen, top=10))
    print_text(f"written: {out}")


def combine(*profiles: str, out: str) -> None:
    """Make one profile that does what several do: experts, directions, or both.

    Parameters
    ----------
    profiles
        Profiles of one model that don't contradict each other.
    out
        The profile to write.
    """
    from moesteer.profile import Profile
    from moesteer.profile_combining import combine as combined
    from moesteer.report.terminal import print_text, profile_page

    check_out(out, *profiles)
    both = combined(*map(Profile.load, profiles))
    save_profile(both, out)
    print_text(profile_page(both, top=10))
    print_text(f"written: {out}")


def show(profile: str, /, *, json: bool = False, top: int = 20) -> None:
    """Show what a profile steers, how, where, on which model, and from which evidence.

    Parameters
    ----------
    profile
        The profile file.
    json
        Everything, for programs: one JSON object.
    top
        How many experts, or directions, to list.
    """
    from moesteer.errors import MoesteerError
    from moesteer.profile import Profile
    from moesteer.report.direction_page import direction_page
    from moesteer.report.terminal import print_text, profile_page

    if top < 0:
        raise MoesteerError(f"--top is {top}; it can't be negative.")
    loaded = Profile.load(profile)
    if json:
        print(loaded.to_json())
    else:
        print_text((direction_page if loaded.candidates else profile_page)(loaded, top))
