"""Commands that show what there is: the demonstration, a model, the bundled models."""

from moesteer.commands.common import command_line, load_engine


def demo(*, report: str | None = None) -> None:
    """See the whole road on the bundled model: find experts, steer, compare with random ones.

    Parameters
    ----------
    report
        An HTML page to write, with every control, detectors against knock-out, figures and
        replies. Takes two minutes more; the runs that it shows stand beside it.
    """
    from pathlib import Path

    import torch

    from moesteer.demo import run_demo
    from moesteer.demo_report import write_demo_report
    from moesteer.report.demo_page import print_demo
    from moesteer.report.progress import steps
    from moesteer.report.terminal import print_text
    from moesteer.report.write_report import check_report

    if report is not None:
        check_report(Path(report))
    torch.set_num_threads(1)  # on so small a model, threads mostly wait for each other
    engine = load_engine("testbed")
    with steps("demo") as step:
        result = run_demo(engine, step)
        if report is not None:
            write_demo_report(engine, result, report, step, command_line())
    print_demo(result)
    if report is not None:
        print_text(f"written: {report}")


def doctor(model: str, /, *, load: bool = False, revision: str | None = None) -> None:
    """Say whether a model can be steered, from its config alone; nothing large is downloaded.

    Parameters
    ----------
    model
        Name on the Hub, folder, or `testbed`.
    load
        Load the weights, too, and test the seam on them (quantised and replaced blocks show there).
    revision
        Branch, tag or commit of the model.
    """
    from moesteer.doctor import examine
    from moesteer.report.terminal import examination_page, print_text

    print_text(examination_page(examine(model, load=load, revision=revision)))


def testbed(*, export: str | None = None, train: str | None = None) -> None:
    """Say what the bundled models are and where their behaviours were planted.

    Parameters
    ----------
    export
        A folder to write the built-in contrast pairs, prompts and instances to, as JSON lines.
    train
        A folder to train the models into, from nothing (two hours on one core).
    """
    from moesteer.report.terminal import print_text
    from moesteer.report.testbed_page import testbed_page
    from moesteer.testbed import ground_truth
    from moesteer.testbed.data import export_data

    if export is not None:
        print_text(f"written: {len(export_data(export))} files in {export}")
    if train is not None:
        from pathlib import Path

        from moesteer.testbed.train import main as train_testbed

        train_testbed(out=Path(train))
    if export is None and train is None:
        print_text(testbed_page(ground_truth()))
