"""The rationales' road: the words that a model names, uses, and that people mark as the reason.

Settings are the paper's (Fayyaz et al. 2024, arXiv 2407.00219, version 2): three annotated sets,
accuracy before all else; rationales that the model names as it likes (Unbound) or as many words as
people marked (Top-Var), and those of attention, saliency and Input×Gradient at people's count,
beside random words; F1 against people's words, flip rates over all instances; 10 epochs of
fine-tuning.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moesteer.engines.transformers.adapters import require_peft
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import MoesteerError
from moesteer.evaluation.comparison import UNSTEERED
from moesteer.rationale.comparing import compare_runs
from moesteer.rationale.explain import Settings, explain
from moesteer.rationale.finetune import RATES, check_instances, finetune
from moesteer.rationale.instances import Instance, read_instances
from moesteer.rationale.measures import baseline_of
from moesteer.rationale.summary import Summary
from moesteer.rationale.training import Training
from moesteer.report.rationale_words import doubts, greyed
from moesteer.reproduce import cells
from moesteer.reproduce.cells import number, text
from moesteer.reproduce.outcome import Claim, Entry, NotRun, Table
from moesteer.reproduce.papers import read_paper
from moesteer.reproduce.steps import Context, Made, Road, Step

PAPER = read_paper("rationales")
ATTRIBUTED = ("attention-mean", "saliency-l2", "input-x-gradient")
PROMPTED = ("unbound", "top-var")
SETS = {
    "e-snli": "its .csv with the words that annotators starred",
    "fever": "the .jsonl of ERASER beside its folder docs",
    "medical-bios": "the part with rationales, a file or a data set",
}
STAND_INS = {"e-snli": "inference", "fever": "claims", "medical-bios": "biographies"}
"""The testbed's tasks in place of the paper's sets."""
TRAINED = "inference"
"""The testbed's task that is fine-tuned on: the one that has room."""


@dataclass(frozen=True)
class Sizes:
    """Instances of each set; those fine-tuned on, and measured meanwhile; random rationales.

    `full`: all weights are trained, else low-rank adapters; at which rate."""

    limit: int | None = None
    train: int | None = None
    measured: int | None = None
    epochs: int = PAPER.number("epochs")
    seeds: int = 3
    full: bool = False
    rate: float = RATES["adapter"]


SMALL = Sizes(limit=24, train=240, measured=24, full=True, rate=1e-4)
"""For the bundled models, whose weights are all trained; of others adapters."""


@dataclass(frozen=True)
class _Work:
    bundled: bool
    instances: Mapping[str, Sequence[Instance]]
    training: Mapping[str, Sequence[Instance]]
    sizes: Sizes

    @property
    def settings(self) -> Settings:
        return Settings(methods=(*ATTRIBUTED, *PROMPTED), seeds=self.sizes.seeds)


def road(
    model: str,
    *,
    bundled: bool,
    data: Mapping[str, str] | None = None,
    train: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Road:
    """The steps for a model, with the sets that were brought, and those to fine-tune on.

    Raises MoesteerError for names that are none, for instances that can't be read, and where some
    are to be trained on and measured, too.
    """
    sources, training = dict(data or {}), dict(train or {})
    for option, given in (("--data", sources), ("--train", training)):
        if wrong := [name for name in given if name not in SETS]:
            raise MoesteerError(f"{option}: {wrong[0]} is none of {', '.join(SETS)}.")
    if lost := [name for name in training if name not in sources]:
        raise MoesteerError(
            f"--train names {lost[0]}, but nothing to measure it on is here: --data {lost[0]}=FILE."
        )
    sizes = SMALL if bundled else Sizes()
    if limit is not None:
        measured = min(limit, sizes.measured or limit)
        sizes = replace(sizes, limit=limit, measured=measured)
    if bundled:
        sources = {name: f"testbed:{name}" for name in STAND_INS.values()}
        training = {TRAINED: f"testbed:{TRAINED}:fit"}
    instances = {name: read_instances(source)[: sizes.limit] for name, source in sources.items()}
    teaching = {name: read_instances(source)[: sizes.train] for name, source in training.items()}
    for name, learnt in teaching.items():
        check_instances(learnt, instances[name])
    work = _Work(bundled, instances, teaching, sizes)
    names = tuple(STAND_INS.values()) if bundled else tuple(SETS)
    return Road(
        PAPER,
        model,
        bundled,
        sizes.limit,
        _settings(work),
        (
            *(
                Step(
                    f"rationales of {name}",
                    f"{len(instances.get(name, ()))} instances: accuracy, agreement with people,"
                    " flips",
                    partial(_explain, work, name),
                    "" if name in instances else f"{SETS[name]}: --data {name}=FILE.",
                    (name,),
                )
                for name in names
            ),
            *(
                Step(
                    f"fine-tuning on {name}",
                    f"{sizes.epochs} epochs over {len(teaching.get(name, ()))} instances, measured"
                    " before and after each",
                    partial(_finetune, work, name),
                    _lacks_for_training(work, name),
                    (f"{name}-finetuned",),
                )
                for name in ((TRAINED,) if bundled else names)
            ),
        ),
        ()
        if bundled
        else (NotRun("the paper's other models", "the same command for each: --model."),),
        {}
        if bundled
        else sources | {f"{name}, to train on": source for name, source in training.items()},
    )


def _settings(work: _Work) -> tuple[str, ...]:
    sizes = work.sizes
    how = "all weights" if sizes.full else "low-rank adapters beside the attention's"
    return (
        f"attributed: {', '.join(ATTRIBUTED)} (attention: the mean over layers and heads; saliency:"
        " the norm of the gradient), as many tokens as people marked",
        "prompted: unbound and top-var, with the label in one reply",
        f"random: as many tokens by lot, {sizes.seeds} times",
        "masking: words are deleted (the paper masks them; with what was not noted)",
        f"fine-tuning: {sizes.epochs} epochs of {how}, rate {sizes.rate:g}",
    )


def _lacks_for_training(work: _Work, name: str) -> str:
    if name not in work.training:
        return f"instances to train on, others than those measured: --train {name}=FILE."
    if not work.bundled:
        try:
            require_peft()
        except MoesteerError as error:
            return str(error)
    return ""


# -- rationales ----------------------------------------------------------------------------------


def _explain(work: _Work, name: str, context: Context) -> Iterator[Made]:
    with context.stage(f"rationales of {name}", "instances") as progress:
        summary = explain(
            context.engine,
            work.instances[name],
            work.settings,
            out=context.out / name,
            chat_options=context.chat_options,
            command=context.command,
            progress=progress,
        )
    yield _accuracy(f"Labels of {name}", summary, name)
    yield _methods(work, name, summary)
    apart = _against_prompted(name, summary)
    yield apart
    compared = sum(row[3] != cells.NOTHING for row in apart.rows)
    yield Claim(
        "counts", f"{name}: of {len(apart.rows)} pairs of methods, {compared} were compared"
    )
    arm = summary.arm(UNSTEERED)
    yield Claim(
        "accuracy",
        f"{name}: accuracy {arm.accuracy:.0%} ({100 * arm.low:.0f} … {100 * arm.high:.0f});"
        f" {arm.doubt or 'nothing speaks against its flip rates'}",
    )
    yield Claim("faithful", f"{name}: {_less_faithful(summary)}")


def _accuracy(title: str, summary: Summary, source: str) -> Table:
    """How often the label is right, beside saying the commonest one always."""
    arm = summary.arm(UNSTEERED)
    words = f"{arm.accuracy:.0%} ({100 * arm.low:.0f} … {100 * arm.high:.0f})"
    rows = {
        "instances": number(arm.n),
        "labelled rightly": Entry(words, arm.accuracy, arm.low, arm.high),
        "the commonest label alone": number(arm.majority, ".0%"),
        "how probable all labels are as the reply (median)": number(arm.mass, ".0%"),
        **{f"labelled {label}": number(count) for label, count in arm.predicted.items()},
    }
    return Table(
        title,
        " ".join(doubts(summary)),
        ("", "measured"),
        tuple((text(name), entry) for name, entry in rows.items()),
        source,
    )


def _methods(work: _Work, name: str, summary: Summary) -> Table:
    """A row a method: agreement with people and flips, alone and less random words of its count."""
    pale = bool(greyed(summary, UNSTEERED))
    rows = []
    for method in summary.methods:
        against = baseline_of(method, summary.methods)
        row = [text(method)]
        row += [
            cells.mean(summary.mean(UNSTEERED, method, measure), pale and measure == "flip")
            for measure in ("tokens", "f1", "flip")
        ]
        row += [
            cells.change(
                summary.difference(UNSTEERED, measure, method, against), pale and measure == "flip"
            )
            for measure in ("f1", "flip")
        ]
        rows.append(row)
    headings = ("method", "tokens", "F1", "flip rate", "F1 − random", "flips − random")
    about = "Means over instances; p by sign flips, adjusted over methods (Holm)."
    if not work.bundled:
        headings = (*headings, "paper")
        rows = [[*row, cells.NOTHING] for row in rows]
        about += f" The paper's column is empty: {PAPER.not_kept} were not noted here."
    return Table(f"Rationales of {name}", about, headings, tuple(map(tuple, rows)), name)


def _against_prompted(name: str, summary: Summary) -> Table:
    """Attributed less prompted rationales."""
    pale = bool(greyed(summary, UNSTEERED))
    rows = [
        (
            text(method),
            text(prompted),
            cells.change(summary.difference(UNSTEERED, "f1", method, prompted)),
            cells.change(summary.difference(UNSTEERED, "flip", method, prompted), pale),
        )
        for prompted in PROMPTED
        for method in ATTRIBUTED
    ]
    return Table(
        f"Attributed less prompted, {name}",
        "Flips are compared only where both were to choose as many tokens of every instance: at"
        " different counts the comparison is confounded (arXiv 2601.03089).",
        ("attributed", "prompted", "F1", "flip rate"),
        tuple(rows),
        name,
    )


def _less_faithful(summary: Summary) -> str:
    """Flips of each method less random words of its count, for neither stands on other counts."""
    said = []
    for method in (*ATTRIBUTED, *PROMPTED):
        against = baseline_of(method, summary.methods)
        found = cells.change(summary.difference(UNSTEERED, "flip", method, against))
        said.append(f"{method} {found.text}")
    doubt = summary.arm(UNSTEERED).doubt
    return f"flips beyond random: {'; '.join(said)}" + (
        f"; but flip rates mean little here, as {doubt}" if doubt else ""
    )


# -- fine-tuning ---------------------------------------------------------------------------------


def _finetune(work: _Work, name: str, context: Context) -> Iterator[Made]:
    engine, sizes = context.load(), work.sizes  # its weights will change
    assert isinstance(engine, TransformersEngine)
    folder = context.out / f"{name}-finetuned"
    training = Training(rate=sizes.rate, epochs=sizes.epochs, full=sizes.full)
    epochs = finetune(
        engine,
        work.training[name],
        work.instances[name][: sizes.measured],
        training,
        work.settings,
        out=folder,
        chat_options=context.chat_options,
        command=context.command,
        stage=lambda title: context.stage(title, "instances"),
    )
    yield _by_epoch(name, epochs)
    last = epochs[-1][0]
    compared = compare_runs([folder / "epoch-0", folder / f"epoch-{last}"])
    rows = [
        (
            text(method),
            *(
                cells.change(compared.change(measure, method, f"epoch-{last}", "epoch-0"))
                for measure in ("f1", "flip")
            ),
        )
        for method in (*ATTRIBUTED, *PROMPTED)
    ]
    accuracy = cells.change(compared.change("accuracy", "", f"epoch-{last}", "epoch-0"))
    yield Table(
        f"What fine-tuning changed on {name}",
        f"After {last} epochs less before. Accuracy {accuracy.text}. Flips only where as many"
        " tokens were to be chosen both times.",
        ("method", "F1", "flip rate"),
        tuple(rows),
        folder.name,
    )
    for key, methods in (("finetuned-attributed", ATTRIBUTED), ("finetuned-prompted", PROMPTED)):
        said = "; ".join(
            f"{row[0].text} F1 {row[1].text}, flips {row[2].text}"
            for row in rows
            if row[0].text in methods
        )
        yield Claim(key, f"{name}, {last} epochs: {said}")


def _by_epoch(name: str, epochs: Sequence[tuple[int, Summary]]) -> Table:
    """A row an epoch: accuracy, then F1 and flip rate of every method."""
    methods = (*ATTRIBUTED, *PROMPTED)
    rows = []
    for epoch, summary in epochs:
        arm = summary.arms[0]
        pale = bool(greyed(summary, arm.name))
        words = f"{arm.accuracy:.0%} ({100 * arm.low:.0f} … {100 * arm.high:.0f})"
        row = [number(epoch), Entry(words, arm.accuracy, arm.low, arm.high)]
        for method in methods:
            for measure in ("f1", "flip"):
                found = summary.mean(arm.name, method, measure)
                row.append(
                    cells.NOTHING
                    if found is None
                    else number(found.value, ".2f" if measure == "f1" else ".0%")
                )
                row[-1] = replace(row[-1], pale=pale and measure == "flip")
        rows.append(tuple(row))
    headings = [f"{method}, {word}" for method in methods for word in ("F1", "flips")]
    noted = [f"Epoch {n}: {why}" for n, summary in epochs for why in doubts(summary)]
    return Table(
        f"Epochs on {name}",
        " ".join([f"{epochs[0][1].arms[0].n} instances, none of them trained on.", *noted]),
        ("epoch", "accuracy", *headings),
        tuple(rows),
        f"{name}-finetuned",
    )
