"""Fine-tuning on a task, and what becomes of its rationales from epoch to epoch.

Does a model that knows the task better give the reasons that people give, and does its label hang
on them (Fayyaz et al. 2024, arXiv 2407.00219, §5)?

    run.json               which model, which instances, how it is trained, how rationales are made
    checkpoints/epoch-N    the adapter, or with `full` the model, after epoch N, with its tokenizer
    epoch-N                the run of `rationale` on the dev instances after it; 0 is before
    epochs.jsonl           a line an epoch: its number and the summary of that run

An epoch is trained, kept and measured before the next begins. A run that was interrupted goes on
from the last checkpoint, to the same result: an epoch follows from the checkpoint before it alone.
This is training on the user's own task, not steering: nothing of a profile enters the weights.
"""

import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moesteer.chat import NO_OPTIONS
from moesteer.engines.checkpoint import adapter_base
from moesteer.engines.transformers.adapters import add_adapter, load_adapter, require_peft
from moesteer.engines.transformers.routers import describe
from moesteer.engines.transformers.splitting import check_whole
from moesteer.engines.transformers.stream import find_decoder
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.provenance import about
from moesteer.rationale.epochs import EPOCHS, epochs_of
from moesteer.rationale.explain import Settings, explain
from moesteer.rationale.instances import Instance, filled, instances_hash
from moesteer.rationale.layout import lay_out
from moesteer.rationale.summary import Summary
from moesteer.rationale.training import (
    Training,
    end_of_turn,
    example,
    flags_restored,
    optimiser_of,
    train_epoch,
)
from moesteer.runs import open_run

if TYPE_CHECKING:
    from peft import PeftModel

KIND = "rationale finetune"
OPTIMISER = "optimizer.pt"
RATES = {"adapter": 2e-4, "full": 2e-5}
"""The default rates: what models of a billion weights and more are usually trained with."""

Stage = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a stage of the work by its title; what it gives is told how many instances are done."""


def finetune(
    engine: TransformersEngine,
    train: Sequence[Instance],
    dev: Sequence[Instance],
    training: Training,
    settings: Settings,
    *,
    out: str | Path,
    chat_options: Mapping[str, object] = NO_OPTIONS,
    command: str = "",
    stage: Stage | None = None,
) -> list[tuple[int, Summary]]:
    """Train the engine's model, in place, and measure its rationales before and after each epoch.

    The summaries of the dev instances' rationales by epoch, 0 first. Everything is kept in the
    folder `out`; an interrupted run is taken up. Raises MoesteerError where instances of `dev` are
    also in `train`, where `train` has one label only, where a number is out of range, where the
    package peft is missing and adapters are asked for, and where the folder holds another run.
    """
    check_training(training)
    check_instances(train, dev)
    _check_model(engine, training)
    stage = stage or (lambda _title: nullcontext(lambda _done, _total: None))
    laid = lay_out(
        train,
        engine.tokenizer,
        unit=settings.unit,
        plain=settings.plain,
        chat_options=chat_options,
        max_tokens=engine.max_tokens,
    )
    end = end_of_turn(train[0], engine.tokenizer, plain=settings.plain, chat_options=chat_options)
    examples = [example(item, end) for item in laid]
    identity = {
        "model": engine.facts.id,
        "model_facts": asdict(engine.facts),
        "train": instances_hash(train),
        "instances": instances_hash(dev),
        "training": asdict(training),
        "options": asdict(settings),
        "chat_options": dict(chat_options),
    }
    with open_run(out, KIND, identity, about(command)) as run:
        known = dict(epochs_of(run))

        def measure(epoch: int, engine: TransformersEngine) -> None:
            if epoch in known:
                return
            with stage(f"rationales after epoch {epoch}") as progress:
                known[epoch] = explain(
                    engine,
                    dev,
                    settings,
                    out=run.folder / f"epoch-{epoch}",
                    chat_options=chat_options,
                    command=command,
                    progress=progress,
                )
            summary = json.loads(known[epoch].to_json())
            run.add(EPOCHS, [{"epoch": epoch, "summary": summary}])

        measure(0, engine)
        kept = _Kept(run.folder / "checkpoints")
        again = find_decoder(engine.model, engine.layers) if settings.checkpointing else ()
        if training.epochs not in known:
            last = kept.last
            with flags_restored(engine.model):
                adapter = _trained_weights(engine, training, kept.folder(last) if last else None)
                optimiser = optimiser_of(engine.model, training)
                if last:
                    measure(last, _after(engine, last))
                if 0 < last < training.epochs:
                    kept.restore(last, optimiser)
                for epoch in range(last + 1, training.epochs + 1):
                    with stage(f"epoch {epoch}") as progress:
                        train_epoch(
                            engine.model,
                            optimiser,
                            examples,
                            training,
                            epoch,
                            again=again,
                            progress=progress,
                        )
                    kept.save(epoch, engine, adapter, optimiser)
                    measure(epoch, _after(engine, epoch))
        kept.drop_optimisers()
        return sorted(known.items())


# -- what is asked for ---------------------------------------------------------------------------


def check_training(training: Training) -> None:
    """Raise MoesteerError for numbers that nothing can be trained with."""
    if not 0 < training.rate < math.inf:
        raise MoesteerError(f"the rate is {training.rate:g}; it must be above 0, as 2e-4 is.")
    for name in ("epochs", "batch_size", "rank"):
        if (number := getattr(training, name)) < 1:
            raise MoesteerError(f"{name.replace('_', ' ')} is {number}; it must be at least 1.")


def check_instances(train: Sequence[Instance], dev: Sequence[Instance]) -> None:
    """Raise MoesteerError where the model would be measured on what it was taught, or where there
    is nothing to learn."""
    labels = {instance.label for instance in train}
    if len(labels) < 2:
        raise MoesteerError(
            f"all {len(train)} instances to train on ({train[0].source} …) have the label"
            f" {train[0].label!r}; a task has two labels or more."
        )
    places = {filled(instance)[0]: instance.source for instance in reversed(train)}
    both = [(i.source, places[said]) for i in dev if (said := filled(i)[0]) in places]
    if both:
        raise MoesteerError(
            f"{both[0][0]} is to be measured and is trained on, too ({both[0][1]}), and so are"
            f" {len(both)} of {len(dev)} in all; take them out of one of the files."
        )


def _check_model(engine: TransformersEngine, training: Training) -> None:
    model, name = engine.model, engine.facts.id
    check_whole(model, "gradients of weights")
    if any(weight.is_meta for weight in model.parameters()):
        raise MoesteerError(
            f"some weights of {name} are offloaded, and such a model can't be trained; give it"
            " devices that hold it."
        )
    if adapter_base(name) is not None:
        raise MoesteerError(f"{name} holds an adapter already; fine-tune its model.")
    if not training.full:
        require_peft()
    elif getattr(model, "hf_quantizer", None) is not None:
        raise MoesteerError(
            f"{describe(model)} is quantised, and such weights can't be trained; leave out --full."
        )
    elif model.dtype != torch.float32:
        warnings.warn(
            f"all weights are trained in {engine.facts.dtype}, which rounds small steps away;"
            " --dtype float32 keeps them, in more memory.",
            MoesteerWarning,
            stacklevel=3,
        )


# -- weights -------------------------------------------------------------------------------------


def _trained_weights(
    engine: TransformersEngine, training: Training, checkpoint: Path | None
) -> "PeftModel | None":
    """Give the model the weights of a checkpoint, or a new adapter; the adapter, unless `full`.

    Only what is to be trained is open to gradients afterwards.
    """
    model, facts = engine.model, engine.facts
    if training.full:
        for weight in model.parameters():
            weight.requires_grad_(weight.is_floating_point())
        if checkpoint is not None:
            stored = type(model).from_pretrained(checkpoint, dtype="auto")
            model.load_state_dict(stored.state_dict())
        return None
    if checkpoint is not None:
        return load_adapter(model, checkpoint, trainable=True)
    torch.manual_seed(training.seed)
    # A name on the Hub or a bundled model's stays as it is.
    base = str(Path(facts.id).resolve()) if Path(facts.id).is_dir() else facts.id
    return add_adapter(model, training.rank, base, facts.revision)


def _after(engine: TransformersEngine, epoch: int) -> TransformersEngine:
    """The engine anew, for the model's weights have changed, and what is known of them with it."""
    return TransformersEngine(
        engine.model, engine.tokenizer, id=f"{engine.facts.id} after epoch {epoch}"
    )


class _Kept:
    """The checkpoints of a run; the optimiser's state is kept in the last one only."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, epoch: int) -> Path:
        return self.root / f"epoch-{epoch}"

    @property
    def last(self) -> int:
        """The last epoch that was kept, 0 without one."""
        numbers = [folder.name.removeprefix("epoch-") for folder in self.root.glob("epoch-*")]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def save(
        self,
        epoch: int,
        engine: TransformersEngine,
        adapter: "PeftModel | None",
        optimiser: torch.optim.Optimizer,
    ) -> None:
        """Keep all that the next epoch follows from; a folder of that name is whole."""
        unfinished = self.root / ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            if adapter is None:
                engine.model.save_pretrained(unfinished)
            else:
                adapter.save_pretrained(str(unfinished), save_embedding_layers=False)
            engine.tokenizer.save_pretrained(unfinished)
            torch.save(optimiser.state_dict(), unfinished / OPTIMISER)
            unfinished.rename(self.folder(epoch))
        except OSError as error:
            raise MoesteerError(
                f"the checkpoint {self.folder(epoch)} can't be written: {error.strerror or error}."
            ) from error
        self.drop_optimisers(but=epoch)

    def restore(self, epoch: int, optimiser: torch.optim.Optimizer) -> None:
        path = self.folder(epoch) / OPTIMISER
        if not path.is_file():
            raise MoesteerError(
                f"{path} is missing, without which training can't go on as it would have; start"
                " again in another folder."
            )
        optimiser.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def drop_optimisers(self, but: int = 0) -> None:
        for path in self.root.glob(f"epoch-*/{OPTIMISER}"):
            if path.parent != self.folder(but):
                path.unlink()
