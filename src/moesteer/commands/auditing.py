"""The command that audits how robust a behaviour is against the loss of experts."""

import sys

from moesteer.commands.common import DEFAULT, ModelOptions, command_line, load_engine


def audit(
    model: str,
    /,
    *,
    out: str,
    pairs: str | None = None,
    target: str | None = None,
    prices: list[str] | None = None,
    data: list[str] | None = None,
    pairs_used: int = 64,
    layers: int | None = None,
    most: int = 8,
    seeds: int = 3,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    options: ModelOptions = DEFAULT,
) -> None:
    """See who carries a behaviour, what is left when these experts are lost, and what restores it.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    out
        The folder of results, with the profiles of what was lost and of what restores it. An
        interrupted audit is taken up when started again.
    pairs
        Contrast pairs of one prompt and two replies, of which A shows the behaviour: JSONL or CSV
        file, data set (ORG/NAME:split), or testbed:BEHAVIOUR. Some are held out, to see what holds.
    target
        The task whose share of its outcome is the behaviour; TASK=OUTCOME for another of its
        outcomes. Bundled models are audited for refusal without --pairs and --target.
    prices
        Tasks that show what else is lost. Without it, those that measure the price and have their
        prompts here. May be repeated.
    data
        TASK=FILE: where your prompts of a task are. May be repeated.
    pairs_used
        How many pairs of each split every expert is switched off and on on, drawn at random.
    layers
        Screen the layers by blocks of experts, and go into so many. Without it: all, or as many as
        have 1,000 experts together.
    most
        At most so many experts are lost, or activated to restore.
    seeds
        How many sets of random experts.
    limit
        Only the first so many prompts of each task and split.
    max_new_tokens
        The longest reply, in tokens, instead of each task's own.
    batch_size
        Prompts a batch.
    """
    from moesteer.auditing.audit import audit as run_audit
    from moesteer.chat import parse_chat_options
    from moesteer.commands.proving import parted, target_card
    from moesteer.detection.comparing import marks_of, planted_in
    from moesteer.engines.checkpoint import BUNDLED
    from moesteer.errors import MoesteerError
    from moesteer.evaluation.cards import read_card
    from moesteer.report.audit_page import audit_page
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import print_text

    if model in BUNDLED and pairs is target is None:
        pairs, target = "testbed:refusal", "testbed-restricted"
        prices = prices or ["testbed-benign", "testbed-facts", "testbed-fluency"]
    if pairs is None or target is None:
        missing = "--pairs" if pairs is None else "--target"
        raise MoesteerError(
            f"{missing} is missing. An audit takes pairs whose A shows a behaviour (--pairs"
            " refusal.jsonl) and the task that measures it in replies (--target advbench);"
            " `moesteer pairs` makes pairs of your data, `moesteer tasks` lists tasks."
        )
    card, priced = target_card(target), [read_card(name) for name in prices or []]
    files = dict(parted(text, "=", "TASK=FILE") for text in data or [])
    chat_options = parse_chat_options(options.chat_option or [])
    engine = load_engine(model, options)
    result = run_audit(
        engine,
        pairs,
        card,
        out=out,
        prices=priced,
        data=files,
        pairs_used=pairs_used,
        layers=layers,
        most=most,
        seeds=seeds,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        chat_options=chat_options,
        say=lambda line: print(f"moesteer: {line}", file=sys.stderr),
        stage=counted_progress,
        command=command_line(),
    )
    print_text(audit_page(result, marks_of(planted_in(model, pairs))))
    print_text(f"written: {out}")
