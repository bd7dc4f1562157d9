"""What `moesteer plan` prints: a line a step, and what would make it less."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesteer.engines.transformers.memory import GIB
from moesteer.planning.estimate import WORDS, Plan, Step

NOTE = """\
Time: from the estimate divided by {factor:g} to that many times it, every reply using all of its
tokens; those that end earlier take less. Memory: weights + cache of keys and values + the largest
batch. A search finds its experts by a detection, which comes before it; knock-out is all of
`moesteer detectors`. Judges that are models or endpoints are not in it.\
"""


def plan_page(plan: Plan) -> RenderableType:
    """The model and the machine, the steps, and advice."""
    job = plan.job
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_row("model", f"{plan.model}, {plan.dtype}: {size(plan.steps[0].weights)} of weights")
    facts.add_row("machine", f"{plan.where}; {size(plan.free)} free")
    if plan.process:
        facts.add_row("besides", f"{size(plan.process)} for the process itself")
    facts.add_row(
        "work",
        f"{job.pairs:,} pairs of {job.pair_tokens} tokens a side; {_number(job.tasks, 'task')} of"
        f" {job.prompts:,} prompts of {job.prompt_tokens} tokens, {job.new_tokens} new ones each",
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("step")
    for name in ("passes", "time", "from", "to"):
        table.add_column(name, justify="right")
    table.add_column("mostly")
    for name in ("memory", "weights", "cache", "batch"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for step in plan.steps:
        table.add_row(*_row(plan, step))
    parts: list[RenderableType] = [facts, Text(""), table, Text("")]
    parts += [Text(f"To make it less: {line}.") for line in plan.advice]
    return Group(*parts, Text(NOTE.format(factor=plan.factor)))


def _row(plan: Plan, step: Step) -> list[str]:
    share = step.seconds[step.mostly] / step.total if step.total else 1.0
    return [
        step.name,
        f"{step.passes:,.0f}",
        *(duration(step.total * times) for times in (1.0, 1 / plan.factor, plan.factor)),
        f"{WORDS[step.mostly]} ({share:.0%})",
        *(size(part) for part in (step.memory, step.weights, step.cache, step.working)),
        "yes" if plan.fits(step) else "no",
    ]


def duration(seconds: float) -> str:
    """In the largest unit of which there is one or more, to two digits."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{_digits(seconds / length)} {unit}"
    return f"{_digits(seconds)} s"


def size(number: float) -> str:
    """Bytes in GiB, or MiB where there are few."""
    if number >= GIB:
        return f"{_digits(number / GIB)} GiB"
    return f"{_digits(number / 2**20)} MiB"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def _number(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
