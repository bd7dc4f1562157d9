"""The command line: which command is which function, and what becomes of errors.

The commands are in `commands/`, one function each, without logic of their own. The first line of a
function's docstring is its help in `moesteer --help`, which is printed without importing anything
but the standard library. Everything else is imported by the command that needs it; the parser
itself is made from the signatures (cyclopts).
"""

import errno
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING

from moesteer.commands.auditing import audit
from moesteer.commands.common import ModelOptions
from moesteer.commands.comparing import detectors
from moesteer.commands.directing import aim, direction
from moesteer.commands.exporting import export
from moesteer.commands.finding import (
    combine,
    detect,
    import_ranking,
    pairs_document,
    pairs_refusal,
    select,
    show,
)
from moesteer.commands.finetuning import finetune
from moesteer.commands.gating import gate
from moesteer.commands.harnessing import lm_eval
from moesteer.commands.judging import judge_check, tasks
from moesteer.commands.looking import demo, doctor, testbed
from moesteer.commands.planning import plan
from moesteer.commands.playing import play
from moesteer.commands.proving import evaluate, search
from moesteer.commands.rationalising import compare, run
from moesteer.commands.reporting import report
from moesteer.commands.reproducing import expert_refusal, rationales, steermoe
from moesteer.commands.running import chat, generate
from moesteer.commands.serving import serve
from moesteer.commands.sharing import pull, push
from moesteer.commands.watching import watch_fit, watch_run
from moesteer.commands.writing import writers

if TYPE_CHECKING:
    from cyclopts import App, ArgumentCollection

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "doctor": doctor,
    "plan": plan,
    "pairs refusal": pairs_refusal,
    "pairs document": pairs_document,
    "detect": detect,
    "detectors": detectors,
    "import-ranking": import_ranking,
    "select": select,
    "combine": combine,
    "direction": direction,
    "aim": aim,
    "writers": writers,
    "gate": gate,
    "show": show,
    "generate": generate,
    "chat": chat,
    "play": play,
    "serve": serve,
    "watch run": watch_run,
    "watch fit": watch_fit,
    "audit": audit,
    "tasks": tasks,
    "judge check": judge_check,
    "evaluate": evaluate,
    "lm-eval": lm_eval,
    "search": search,
    "rationale run": run,
    "rationale compare": compare,
    "rationale finetune": finetune,
    "reproduce steermoe": steermoe,
    "reproduce expert-refusal": expert_refusal,
    "reproduce rationales": rationales,
    "report": report,
    "export": export,
    "push": push,
    "pull": pull,
    "testbed": testbed,
}


def overview() -> str:
    """All commands, each with what it does."""
    lines = [
        "Usage: moesteer COMMAND …",
        "",
        "Find the experts of a Mixture-of-Experts model that carry a behaviour, steer them at",
        "inference, and prove what changed. Start with: moesteer demo",
        "",
    ]
    width = min(get_terminal_size().columns, 100)
    for name, command in COMMANDS.items():
        said = (command.__doc__ or "").splitlines()[0]
        lines += wrap(said, width, initial_indent=f"  {name:<26}", subsequent_indent=" " * 28)
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


def parser() -> "App":
    """The parser of all commands, made from their signatures and docstrings."""
    from inspect import Parameter as Kind
    from inspect import signature

    from cyclopts import App, Parameter

    app = App(
        name="moesteer",
        help_format="plaintext",
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # ours says what becomes of the work
        config=_check_whole_numbers,
    )
    Parameter(name="*")(ModelOptions)  # its fields are options of the command that takes it
    groups = {
        "pairs": App(name="pairs", help="Make contrast pairs from your data."),
        "judge": App(name="judge", help="Judge the judges of a task."),
        "rationale": App(name="rationale", help="Words that a model names and words that it uses."),
        "reproduce": App(name="reproduce", help="Walk a paper's road on your model."),
        "watch": App(name="watch", help="Is a request routed as ordinary ones are?"),
    }
    for name, command in COMMANDS.items():
        group, _, inner = name.rpartition(" ")
        # `--tasks a b`, but `--chat-option x=1 "a prompt"` where prompts are arguments.
        kinds = {parameter.kind for parameter in signature(command).parameters.values()}
        lists = Parameter(negative=(), consume_multiple=Kind.VAR_POSITIONAL not in kinds)
        (groups[group] if group else app).command(command, name=inner, default_parameter=lists)
        if inner == "run":  # `rationale MODEL` runs
            groups[group].default_parameter = lists
            groups[group].default(command)
    for group in groups.values():
        app.command(group)
    return app


def _check_whole_numbers(
    app: "App", commands: tuple[str, ...], options: "ArgumentCollection"
) -> None:
    """Refuse 1.5 where a whole number is asked for, which cyclopts would round in silence."""
    from typing import get_args

    from moesteer.errors import MoesteerError

    for option in options:
        kinds = {option.hint, *get_args(option.hint)}
        for token in option.tokens if int in kinds and float not in kinds else ():
            with suppress(ValueError):  # what is no number at all is refused by cyclopts
                if not float(token.value).is_integer():
                    raise MoesteerError(f"{option.name} is {token.value}; give a whole number.")


def _run(tokens: list[str]) -> int:
    from cyclopts import CycloptsError

    from moesteer.errors import MoesteerError

    app = parser()
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
        with_out = {"generate", "detectors", "judge", "rationale", "watch"}
        always = {"audit", "detect", "evaluate", "lm-eval", "reproduce", "search", "writers"}
        goes_on = (
            tokens[0] in always
            or (tokens[0] in with_out and "--out" in tokens)
            or (tokens[0] == "direction" and "--experts" in tokens)
        )
        _complain("interrupted." + (" Started again, it goes on from there." if goes_on else ""))
        return 130
    return 0


def _warn(others: Callable[..., None]) -> Callable[..., None]:
    """Our own warnings as one line each, and once; all others as before."""
    from moesteer.errors import MoesteerWarning

    shown: set[str] = set()

    def show(message: object, category: type, *place: object, **more: object) -> None:
        if issubclass(category, MoesteerWarning):
            if str(message) not in shown:
                print(f"moesteer: warning: {message}", file=sys.stderr)
            shown.add(str(message))
        else:
            others(message, category, *place, **more)

    return show


def _complain(message: str) -> int:
    print(f"moesteer: {message}", file=sys.stderr)
    return 2
