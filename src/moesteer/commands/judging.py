"""Commands about tasks and who judges them."""

import sys

from moesteer.commands.common import DEFAULT, ModelOptions, command_line, load_engine


def tasks(name: str | None = None, /) -> None:
    """List the tasks, what data each needs and whether it is there; or show one card whole.

    Parameters
    ----------
    name
        A task, or your own card (FILE.toml).
    """
    from moesteer.evaluation.cards import all_cards, read_card
    from moesteer.report.judges_page import card_page, tasks_page
    from moesteer.report.terminal import print_text

    print_text(tasks_page(all_cards()) if name is None else card_page(read_card(name)))


def judge_check(
    card: str,
    /,
    *,
    gold: str | None = None,
    out: str | None = None,
    model: str | None = None,
    options: ModelOptions = DEFAULT,
) -> None:
    """Judge a task's judges: do they see what controlled changes did to replies?

    Parameters
    ----------
    card
        A task, or your own card (FILE.toml).
    gold
        JSONL with the task's columns, reply and outcome. The testbed's tasks have their own.
    out
        A folder for the verdicts and the summary. An interrupted check is taken up.
    model
        The unsteered model, for judges that read with it; for the testbed's tasks, the testbed.
    """
    from moesteer.chat import parse_chat_options
    from moesteer.evaluation.cards import read_card
    from moesteer.evaluation.judge_check import check_judges, doubts
    from moesteer.report.judges_page import check_page
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import print_text

    read = read_card(card)
    chat_options = parse_chat_options(options.chat_option or [])
    if model is None and read.testbed and any(s.settings.needs_engine for s in read.judges):
        model = "testbed"
    engine = None if model is None else load_engine(model, options)
    with counted_progress("judge check", "replies") as progress:
        check = check_judges(
            read,
            engine,
            gold=gold,
            out=out,
            chat_options=chat_options,
            command=command_line(),
            progress=progress,
        )
    print_text(check_page(read, check))
    for doubt in doubts(read, check):
        print(f"moesteer: warning: {doubt}", file=sys.stderr)
    if out is not None:
        print_text(f"written: {out}")
