"""The command line: one function a command, without logic of its own.

The first line of a function's docstring is its help in `moesteer --help`, which is printed without
importing anything but the standard library. Everything else is imported by the command that needs
it; the parser itself is made from the signatures (cyclopts).
"""

import errno
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

if TYPE_CHECKING:
    from moesteer.engines.transformers_engine import TransformersEngine
    from moesteer.profile import Profile


def demo() -> None:
    """See the whole road on the bundled model: find experts, steer, compare with random ones."""
    import torch

    from moesteer.demo import run_demo
    from moesteer.report.demo_page import print_demo
    from moesteer.report.progress import steps

    torch.set_num_threads(1)  # on so small a model, threads mostly wait for each other
    engine = _load("testbed")
    with steps("demo") as step:
        result = run_demo(engine, step)
    print_demo(result)


def detect(
    model: str,
    /,
    *,
    pairs: str,
    out: str,
    activate: int = 0,
    deactivate: int = 0,
    toward: Literal["a", "b"] | None = None,
    count: Literal["top-k", "top-1"] = "top-k",
    chat_option: list[str] | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str | None = None,
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
    count
        Count all k experts of a token, or the one with the largest weight.
    chat_option
        KEY=VALUE for the chat template, e.g. enable_thinking=false. May be repeated.
    chat_template
        A file with a chat template, for models without one.
    revision
        Branch, tag or commit of the model.
    dtype
        auto, float32, bfloat16 or float16.
    device
        Device map for loading: auto, cpu, cuda:0, …
    seed
        Seed of the intervals.
    """
    from moesteer.chat import parse_chat_options
    from moesteer.contrast import read_pairs
    from moesteer.detection.detect_to_file import detect_to_file
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import print_text, profile_page

    options = parse_chat_options(chat_option or [])
    _check_out(out, pairs)
    read = read_pairs(pairs)
    engine = _load(model, revision, dtype, device, chat_template)
    with counted_progress("detect", "tokens") as progress:
        profile = detect_to_file(
            engine,
            read,
            out=out,
            select=(activate, deactivate, toward),
            counted=count,
            chat_options=options,
            source=pairs,
            seed=seed,
            command=_command(),
            progress=progress,
        )
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
    ).made_by(_command())
    _save(chosen, out)
    print_text(profile_page(chosen, top=10))
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
        How many experts to list.
    """
    from moesteer.errors import MoesteerError
    from moesteer.profile import Profile
    from moesteer.report.terminal import print_text, profile_page

    if top < 0:
        raise MoesteerError(f"--top is {top}; it can't be negative.")
    loaded = Profile.load(profile)
    if json:
        print(loaded.to_json())
    else:
        print_text(profile_page(loaded, top))


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
    chat_option: list[str] | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str | None = None,
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
    chat_option
        KEY=VALUE for the chat template. May be repeated; a profile's own options hold otherwise.
    chat_template
        A file with a chat template, for models without one.
    revision
        Branch, tag or commit of the model.
    dtype
        auto, float32, bfloat16 or float16.
    device
        Device map for loading: auto, cpu, cuda:0, …
    seed
        Seed of sampling.
    """
    from moesteer.generate import generate_to, read_prompts
    from moesteer.report.progress import counted_progress
    from moesteer.report.terminal import evidence_lines

    if out is not None:
        _check_out(out, file, with_)
    asked = read_prompts(prompts, file, system)
    profile = _profile(with_)
    engine = _load(model, revision, dtype, device, chat_template)
    with counted_progress("generate", "prompts") as progress:
        evidence = generate_to(
            out,
            engine,
            asked,
            profile,
            options=chat_option or [],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    for line in evidence_lines(evidence):
        print(line, file=sys.stderr)


def chat(
    model: str,
    /,
    *,
    with_: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    chat_option: list[str] | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str | None = None,
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
    chat_option
        KEY=VALUE for the chat template. May be repeated.
    chat_template
        A file with a chat template, for models without one.
    revision
        Branch, tag or commit of the model.
    dtype
        auto, float32, bfloat16 or float16.
    device
        Device map for loading: auto, cpu, cuda:0, …
    """
    from moesteer.chat_session import ChatSession, talk

    profile = _profile(with_)
    engine = _load(model, revision, dtype, device, chat_template)
    talk(ChatSession(engine, profile, system, chat_option or [], max_new_tokens, temperature))


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
    _check_out(out, source, refusals)
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

    _check_out(out, source)
    write_pairs(document_pairs(source), out)


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

    profile = profile_from_ranking(file, top_k=top_k, command=_command())
    _save(profile, out)
    print_text(profile_page(profile, top=10))
    print_text(f"written: {out}")


def testbed(*, export: str | None = None, train: str | None = None) -> None:
    """Say what the bundled models are and where their behaviours were planted.

    Parameters
    ----------
    export
        A folder to write the built-in contrast pairs and prompts to, as JSON lines.
    train
        A folder to train both models into, from nothing (about an hour on one core).
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


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "doctor": doctor,
    "pairs refusal": pairs_refusal,
    "pairs document": pairs_document,
    "detect": detect,
    "import-ranking": import_ranking,
    "select": select,
    "show": show,
    "generate": generate,
    "chat": chat,
    "testbed": testbed,
}


def overview() -> str:
    """All commands, a line each."""
    lines = [
        "Usage: moesteer COMMAND …",
        "",
        "Find the experts of a Mixture-of-Experts model that carry a behaviour, steer them at",
        "inference, and prove what changed. Start with: moesteer demo",
        "",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<16}{(command.__doc__ or '').splitlines()[0]}")
    return "\n".join([*lines, "", "moesteer COMMAND --help says what a command takes."])


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exits with 0, with 2 where the user can mend it, with 1 where we must."""
    tokens = sys.argv[1:] if arguments is None else arguments
    try:
        if not tokens or tokens in (["--help"], ["-h"]):
            print(overview())
            status = 0
        elif tokens == ["--version"]:
            from moesteer.version import __version__

            print(f"moesteer {__version__}")
            status = 0
        else:
            status = _run(tokens)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read us has seen enough
        status = _without_output(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        _complain(f"standard output can't be written: {error.strerror}.")
        status = _without_output(2)
    if status or arguments is None:
        sys.exit(status)


def _without_output(status: int) -> int:
    """Keep the interpreter from failing once more when it flushes standard output at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _run(tokens: list[str]) -> int:
    from cyclopts import App, CycloptsError, Parameter

    from moesteer.errors import MoesteerError

    app = App(
        name="moesteer",
        help_format="plaintext",
        result_action="return_value",
        default_parameter=Parameter(negative=()),
        suppress_keyboard_interrupt=False,  # ours says what becomes of the work
    )
    groups = {"pairs": App(name="pairs", help="Make contrast pairs from your data.")}
    for name, command in COMMANDS.items():
        group, _, inner = name.rpartition(" ")
        (groups[group] if group else app).command(command, name=inner)
    for group in groups.values():
        app.command(group)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn(warnings.showwarning)
            app(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _complain(f"{error}\nmoesteer COMMAND --help says what a command takes.")
    except MoesteerError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        goes_on = tokens[0] == "detect" or (tokens[0] == "generate" and "--out" in tokens)
        _complain("interrupted." + (" Started again, it goes on from there." if goes_on else ""))
        return 130
    return 0


def _warn(others: Callable[..., None]) -> Callable[..., None]:
    """Our own warnings as one line each; all others as before."""
    from moesteer.errors import MoesteerWarning

    def show(message: object, category: type, *place: object, **more: object) -> None:
        if issubclass(category, MoesteerWarning):
            print(f"moesteer: warning: {message}", file=sys.stderr)
        else:
            others(message, category, *place, **more)

    return show


def _complain(message: str) -> int:
    print(f"moesteer: {message}", file=sys.stderr)
    return 2


def _command() -> str:
    import shlex

    return shlex.join(["moesteer", *sys.argv[1:]])


def _check_out(out: str, *inputs: str | None) -> None:
    from pathlib import Path

    from moesteer.files import check_writable

    check_writable(Path(out), *inputs)


def _save(profile: "Profile", out: str) -> None:
    from pathlib import Path

    from moesteer.files import sole_writer

    with sole_writer(Path(out)):
        profile.save(out)


def _profile(path: str | None):
    from moesteer.profile import Profile

    return None if path is None else Profile.load(path)


def _load(
    model: str,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str | None = None,
    chat_template: str | None = None,
) -> "TransformersEngine":
    from pathlib import Path

    from transformers.utils.logging import disable_progress_bar

    from moesteer.engines.transformers_engine import load_transformers
    from moesteer.records import read_text

    if not sys.stderr.isatty():
        disable_progress_bar()

    return load_transformers(
        model,
        revision=revision,
        dtype=dtype,
        device_map=device,
        chat_template=None if chat_template is None else read_text(Path(chat_template)),
    )
