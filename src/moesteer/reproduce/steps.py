"""A road is a list of steps, each of which is run, or not for want of something.

What a step makes is kept in a run or a file of its own under the road's folder, so that a road that
was interrupted is taken up where it was, and one that wanted data goes on once they are brought:

    run.json, inputs.jsonl    which paper, which model, how; which data were given for what
    …                         the steps' own runs, profiles and prompts
    summary.json              see `outcome.py`: written at the very end, from what `walk` returns

A step makes results, dataclasses of the paper's; what is said of them is the report's. One that
fails, for want of a judge, say, is told with its reason, and the others go on.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moesteer.errors import MoesteerError
from moesteer.provenance import about
from moesteer.reproduce.outcome import NotRun
from moesteer.reproduce.papers import Paper
from moesteer.runs import Run, open_run

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

SUMMARY = "summary.json"
INPUTS = "inputs"
ChatOptions = dict[str, bool | int | float | str]
Stage = Callable[[str, str], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a part of the work by its title and unit; what it gives is told how much is done."""


def untold(_title: str, _unit: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A stage that tells nobody."""
    return nullcontext(lambda _done, _total: None)


@dataclass(frozen=True)
class Context:
    """What every step works with."""

    engine: "Engine"
    load: "Callable[[], Engine]"
    """Loads the model anew: for what changes its weights."""
    out: Path
    chat_options: ChatOptions
    batch_size: int
    command: str
    say: Callable[[str], None]
    stage: Stage


@dataclass(frozen=True)
class Step:
    """`title` names it, `plan` says what will be done; `missing`: what it wants, empty if nothing.

    `run` gives its results, and a NotRun for a part of it that could not be run. `runs` are the
    folders and files that it makes, for a report.
    """

    title: str
    plan: str
    run: Callable[[Context], Iterable[object]]
    missing: str = ""
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Road:
    """All steps of a paper on one model.

    `settings` say in sentences how it is walked, `inputs` which data were given, `absent` which
    parts of steps are left out for want of data. `limit`: only so many prompts of each task.
    """

    paper: Paper
    model: str
    bundled: bool
    limit: int | None
    settings: tuple[str, ...]
    steps: tuple[Step, ...]
    absent: tuple[NotRun, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def ready(self) -> tuple[Step, ...]:
        """The steps that nothing is missing for."""
        return tuple(step for step in self.steps if not step.missing)

    @property
    def not_ready(self) -> tuple[NotRun, ...]:
        """What will not be run, and what is missing."""
        waiting = (NotRun(step.title, step.missing) for step in self.steps if step.missing)
        return (*waiting, *self.absent)

    def check(self) -> None:
        """MoesteerError where nothing at all can be run."""
        if not self.ready:
            lacks = "\n".join(f"  {one.step}: {one.missing}" for one in self.not_ready)
            raise MoesteerError(
                f"nothing of {self.paper.title} can be run with what was given:\n{lacks}\n"
                "With --model testbed it runs without any data."
            )


@dataclass(frozen=True)
class Walked:
    """What came of a road on the model of this name: the results of its steps, in their order, and
    what was not run. `thinking` says whether the model was let think; `runs` are in `folder`."""

    road: Road
    model: str
    thinking: str
    results: tuple[object, ...]
    not_run: tuple[NotRun, ...]
    folder: Path
    runs: tuple[str, ...]


def walk(
    road: Road,
    load: "Callable[[], Engine]",
    out: str | Path,
    *,
    chat_options: Mapping[str, bool | int | float | str] | None = None,
    batch_size: int = 16,
    command: str = "",
    say: Callable[[str], None] | None = None,
    stage: Stage = untold,
) -> Walked:
    """Run every step that can be run, in the folder `out`.

    `load` loads the model. An interrupted road is taken up, and what was brought since is run.
    Raises MoesteerError where nothing can be run, and where `out` holds another paper's road,
    another model's, one of other settings, or one of other data for the same name.
    """
    road.check()
    told = say or (lambda _: None)
    engine = load()
    options, thinking = without_thinking(engine, chat_options or {})
    identity = {
        "paper": road.paper.name,
        "model": engine.facts.id,
        "model_facts": asdict(engine.facts),
        "limit": road.limit,
        "batch_size": batch_size,
        "chat_options": options,
    }
    with open_run(out, f"reproduce {road.paper.name}", identity, about(command)) as run:
        _keep_inputs(run, road.inputs)
        context = Context(engine, load, run.folder, options, batch_size, command, told, stage)
        results: list[object] = []
        for number, step in enumerate(road.ready, start=1):
            told(f"step {number} of {len(road.ready)}: {step.title}")
            try:
                results += step.run(context)
            except MoesteerError as error:
                told(f"{step.title} was not finished: {error}")
                results.append(NotRun(step.title, str(error), failed=True))
        return Walked(
            road,
            engine.facts.id,
            thinking,
            tuple(one for one in results if not isinstance(one, NotRun)),
            (*(one for one in results if isinstance(one, NotRun)), *road.not_ready),
            run.folder,
            tuple(name for step in road.ready for name in step.runs if _done(run.folder / name)),
        )


def without_thinking(
    engine: "Engine", given: Mapping[str, bool | int | float | str]
) -> tuple[ChatOptions, str]:
    """The chat options with thinking off, where the model's template has the switch; a sentence."""
    if "enable_thinking" in given:
        return dict(given), f"thinking: enable_thinking={given['enable_thinking']}, as you said"
    if "enable_thinking" in str(engine.tokenizer.chat_template):
        return {**given, "enable_thinking": False}, "thinking: off (enable_thinking=false)"
    why = "the chat template has no switch enable_thinking, and nothing was set for it"
    return dict(given), f"thinking: {why}"


def digest(source: str) -> str:
    """What tells a file's content from another's; of what is no file, its name."""
    path = Path(source)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else source


def _keep_inputs(run: Run, inputs: Mapping[str, str]) -> None:
    """Which data were given for what; MoesteerError where it was other data before.

    More may come with time, so this is no setting that must be the same; but what was found with
    what was given before would be missing from the tables without it.
    """
    there = {line["name"]: line["digest"] for line in run.lines(INPUTS, "name", "digest")}
    new = {name: digest(source) for name, source in inputs.items()}
    if left_out := [name for name in there if name not in new]:
        raise MoesteerError(
            f"{run.folder} was begun with {' and '.join(left_out)}, too; give them again with what"
            " is new, or another --out."
        )
    if changed := [name for name in new if there.get(name, new[name]) != new[name]]:
        raise MoesteerError(
            f"{run.folder} was begun with other data for {changed[0]} than {inputs[changed[0]]};"
            " give that again, or another --out."
        )
    if more := [{"name": n, "digest": d} for n, d in new.items() if n not in there]:
        run.add(INPUTS, more)


def _done(path: Path) -> bool:
    """Whether a step has left its result there: a profile, or a run with its summary."""
    return path.is_file() or any((path / name).is_file() for name in (SUMMARY, "epochs.jsonl"))
