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
from moesteer.rationale.comparing import compare_runs
from moesteer.rationale.explain import Settings, explain
from moesteer.rationale.finetune import RATES, check_instances, finetune
from moesteer.rationale.instances import Instance, read_instances
from moesteer.rationale.summary import Summary
from moesteer.rationale.training import Training
from moesteer.reproduce.outcome import NotRun
from moesteer.reproduce.papers import read_paper
from moesteer.reproduce.steps import Context, Road, Step

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


@dataclass(frozen=True)
class Explained:
    """What came of the rationales of a set."""

    name: str
    summary: Summary


def _explain(work: _Work, name: str, context: Context) -> Iterator[Explained]:
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
    yield Explained(name, summary)


# -- fine-tuning ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finetuned:
    """A set's summaries by epoch, 0 before all; `compared`: the last and the first side by side."""

    name: str
    epochs: tuple[tuple[int, Summary], ...]
    compared: Summary


def _finetune(work: _Work, name: str, context: Context) -> Iterator[Finetuned]:
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
    compared = compare_runs([folder / "epoch-0", folder / f"epoch-{epochs[-1][0]}"])
    yield Finetuned(name, tuple(epochs), compared)
