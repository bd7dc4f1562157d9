"""Can the judges be believed? Their checks, on the bundled models, whose replies are known."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from moesteer.evaluation.judge_check import JudgeCheck, check_judges
from moesteer.reproduce.steermoe.plan import Work
from moesteer.reproduce.steps import Context, Step


@dataclass(frozen=True)
class Judged:
    """By task, what its judges see of replies of known outcome."""

    checks: Mapping[str, JudgeCheck]


def judging(work: Work) -> Step:
    names = tuple(work.tasks.cards) if work.bundled else ()
    return Step(
        "judges",
        f"what their judges see of controlled changes: {', '.join(names)}",
        partial(_judge, work),
        ""
        if work.bundled
        else "replies of known outcome, for each task: moesteer judge check TASK"
        " --gold FILE --out OUT/judge-TASK; what it finds then stands beside the numbers.",
        tuple(f"judge-{name}" for name in names),
    )


def _judge(work: Work, context: Context) -> Iterator[object]:
    checks = {}
    for name, card in work.tasks.cards.items():
        with context.stage(f"judge of {name}", "replies") as progress:
            checks[name] = check_judges(
                card,
                context.engine,
                out=str(context.out / f"judge-{name}"),
                chat_options=context.chat_options,
                command=context.command,
                progress=progress,
            )
    yield Judged(checks)
