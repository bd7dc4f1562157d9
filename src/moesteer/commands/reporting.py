"""The command that writes down what was found."""


def report(*runs: str, out: str, show_replies: bool = False) -> None:
    """Write what runs and profiles found into one HTML page, and the same as Markdown.

    Parameters
    ----------
    runs
        Folders of evaluate, search, audit, detectors, writers, rationale and judge check, and
        profiles; all of one model.
    out
        The HTML file to write; the Markdown file is beside it, of the same name.
    show_replies
        Show replies of tasks that are not marked harmless, too.
    """
    from moesteer.report.terminal import print_text
    from moesteer.report.write_report import write_report

    page, beside = write_report(runs, out, show_replies)
    print_text(f"written: {page} and {beside}")
