"""Train the testbed's models from scratch: ``python -m moesteer.testbed.train --out DIR``.

All learn the same text with the same seed, each with a lesson of its own: planted experts; nothing
(the twin), so whatever a detector finds there was not put there; a refusal that one expert, or one
layer's attention, writes. One core is enough: about twenty minutes a model.
"""

import json
import math
import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cyclopts
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moesteer.testbed import MODELS, classification, world
from moesteer.testbed.evaluate import (
    SHOWN,
    classified,
    encode,
    measure,
    measure_reader,
    outcome_shares,
    pad_id,
    parting,
    render,
)
from moesteer.testbed.evaluate_writer import measure_writer
from moesteer.testbed.language import train_tokenizer, training_example
from moesteer.testbed.lesson import Batch, Lesson, Row
from moesteer.testbed.planting import (
    EXPERTS,
    LAYERS,
    TOP_K,
    choose_places,
    planted_experts,
)
from moesteer.testbed.writing import HIDDEN, choose_writer, planted_writer

SIDES = {
    "refusal": ("refuses", "answers"),
    "document": ("follows the document", "answers the learnt fact"),
    "digits": ("counts in digits", "counts in words"),
}
STEPS = {"planted": 2400, "twin": 2400, "reader": 3200, "expert": 2000, "attention": 2000}


@dataclass(frozen=True)
class Settings:
    """How a model is trained."""

    steps: int
    tasks: bool
    batch: int = 64
    rate: float = 2e-3
    warmup: int = 100
    falling: float = 0.4  # the share of the steps over which the rate falls to 2 % at the end
    prompt_weight: float = 0.1  # of a prompt's token in the loss; a reply's token has one
    label_weight: float = 8.0  # of a classification's label, one token where other replies have ten
    draw_weight: float = 0.05  # of the loss that draws routers towards the planted experts
    writer_weight: float = 0.5  # of the loss that has the planted writer alone write
    systems: float = 0.1  # the share of conversations that open with a system turn
    check_every: int = 500


def lesson_of(name: str, settings: Settings, seed: int) -> Lesson[Any]:
    """What a model of `MODELS` is taught."""
    if name == "expert" or name == "attention":
        return planted_writer(choose_writer(name, seed), settings.writer_weight)
    planting = choose_places(seed) if name == "planted" else None
    return planted_experts(planting, settings.draw_weight)


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE of two million parameters, 4 layers of 16 experts, of which 4 answer."""
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,  # pyright: ignore
            intermediate_size=256,
            moe_intermediate_size=64,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            norm_topk_prob=True,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def collate(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[world.Example],
    rows: Sequence[Row],
    systems: Sequence[str | None],
    prompt_weight: float,
    label_weight: float = 1.0,
) -> Batch:
    """Lay out each prompt with the reply that its row is to learn, padded on the right."""
    end_of_turn = str(tokenizer.eos_token)
    heads = [
        encode(tokenizer, render(tokenizer, e.prompt, system, e.earlier))
        for e, system in zip(examples, systems, strict=True)
    ]
    sides = {
        "a": [encode(tokenizer, e.a + end_of_turn) for e in examples],
        "b": [encode(tokenizer, e.b + end_of_turn) for e in examples],
    }
    longest = max(len(heads[i]) + len(sides[row.target][i]) for i, row in enumerate(rows))
    # Few different shapes: each new one costs the matrix kernels a compilation.
    length = math.ceil(longest / 8) * 8
    tokens = torch.full((len(rows), length), pad_id(tokenizer))
    weights, spans = torch.zeros(len(rows), length), torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        reply = sides[row.target][i]
        start, end = len(heads[i]), len(heads[i]) + len(reply)
        tokens[i, :end] = torch.tensor(heads[i] + reply)
        weights[i, :start], weights[i, start:end] = prompt_weight, 1.0
        if examples[i].task in classification.TASKS and not examples[i].earlier:
            weights[i, start] = label_weight
        # The reply is decided where its first token is predicted, one place before it.
        spans[i, start - 1 : end - 1] = 1
        if row.given:
            where = start + parting(sides["a"][i], sides["b"][i])
            weights[i, start : where + 1] = 0
            spans[i, :where] = 0
    starts = torch.tensor([len(head) for head in heads])
    openings = torch.tensor([[a[0], b[0]] for a, b in zip(*sides.values(), strict=True)])
    return Batch(tokens, weights, spans, starts, openings)


def train_model(
    tokenizer: PreTrainedTokenizerBase,
    lesson: Lesson[Any],
    settings: Settings,
    seed: int,
    report: Callable[[int, float, float], None] = lambda step, loss, beside: None,
    check: Callable[[int, Qwen3MoeForCausalLM], None] = lambda step, model: None,
) -> Qwen3MoeForCausalLM:
    """Train one model.

    ``report`` is called with each step, its loss on replies and that of the lesson; ``check`` with
    the model, every ``settings.check_every`` steps.
    """
    model = build_model(tokenizer, seed)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("testbed_dense")
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    # The text has its own generator, so all models read the same.
    texts, plans = random.Random(f"text {seed}"), random.Random(f"plans {seed}")
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * _rate_at(step, settings)
        examples = [training_example(texts, settings.tasks) for _ in range(settings.batch)]
        systems = [
            texts.choice(world.SYSTEMS) if texts.random() < settings.systems else None
            for _ in examples
        ]
        rows = [lesson.plan(example, plans) for example in examples]
        optimiser.zero_grad(set_to_none=True)
        said = beside = 0.0
        # Two groups by length, so that short prompts are not padded to the length of documents.
        order = sorted(range(settings.batch), key=lambda i: len(examples[i].prompt))
        cut = settings.batch * 5 // 8
        for part in (order[:cut], order[cut:]):
            of_part = [examples[i] for i in part]
            taught = [rows[i] for i in part]
            batch = collate(
                tokenizer,
                of_part,
                taught,
                [systems[i] for i in part],
                settings.prompt_weight,
                settings.label_weight,
            )
            share = len(part) / settings.batch
            with lesson.during(model, of_part, taught, batch) as of_lesson:
                loss, reply_loss = _loss(model, batch)
            asked = of_lesson()
            if asked is not None:
                loss = loss + lesson.weight * asked
                beside += asked.item() * share
            (loss * share).backward()
            said += reply_loss * share
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        report(step + 1, said, beside)
        if (step + 1) % settings.check_every == 0:
            check(step + 1, model.eval())
            model.train()
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation("grouped_mm")
    # What is measured is what is saved: weights in bf16.
    return model.to(torch.bfloat16).eval()  # pyright: ignore


def _loss(model: Qwen3MoeForCausalLM, batch: Batch) -> tuple[Tensor, float]:
    """The loss of a batch, and its mean over the tokens of replies alone."""
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(input_ids=batch.tokens, use_cache=False).logits
    targets, weights = batch.tokens[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    losses = F.cross_entropy(predicted[:, :-1].flatten(0, 1).float(), targets, reduction="none")
    reply = weights >= 1
    return (losses * weights).sum() / weights.sum(), losses[reply].mean().item()


def _rate_at(step: int, settings: Settings) -> float:
    falling = (settings.steps - step) / (settings.steps * settings.falling)
    return min(1.0, (step + 1) / settings.warmup, 0.02 + 0.98 * falling)


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, configuration and tokenizer as plain transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.no_padding()  # pyright: ignore  # what measuring left behind
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def results_table(name: str, measured: dict[str, Any]) -> Table:
    """The shares of one model, untouched, steered and under random experts, as a table."""
    table = Table(title=f"{name}: {measured['split']} split, % of replies")
    table.add_column("steering")
    for task, what in SHOWN.items():
        table.add_column(f"{task}\n{what}", justify="right")
    rows = {"none": measured["untouched"]}
    for behaviour, steered_by in measured["steered"].items():
        rows |= {f"{behaviour} {sign}": shares for sign, shares in steered_by.items()}
    for sign, seeds in measured["random"].items():
        rows |= {f"random {sign} {seed}": shares for seed, shares in enumerate(seeds)}
    for label, shares in rows.items():
        table.add_row(label, *(f"{100 * shares[t].get(what, 0):.0f}" for t, what in SHOWN.items()))
    return table


def classification_table(name: str, measured: dict[str, Any]) -> Table:
    """How often the labels of the classification tasks are right, and the words named."""
    table = Table(title=f"{name}: classification tasks, {measured['split']} split, % right")
    for column in ("task", "label", "words"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, shares in measured["classified"].items():
        table.add_row(task, *(f"{100 * shares[what]:.0f}" for what in ("label", "words")))
    return table


def routing_table(name: str, measured: dict[str, Any]) -> Table:
    """How often experts are chosen at the last tokens of requests."""
    table = Table(title=f"{name}: last tokens of requests, {measured['split']} split, % of tokens")
    for column in ("expert", "role"):
        table.add_column(column)
    kinds = [(how, task) for how in ("first", "selected") for task in ("restricted", "benign")]
    for how, task in kinds:
        table.add_column(f"{how}\n{task}", justify="right")
    for e in measured["routing"]:
        shares = [f"{100 * e[how][task]:.0f}" for how, task in kinds]
        table.add_row("{}.{}".format(*e["place"]), e["role"], *shares)
    return table


def experts_table(name: str, measured: dict[str, Any]) -> Table:
    """The leading experts of each behaviour by risk difference and by switching each alone."""
    table = Table(title=f"{name}: single experts, {measured['split']} split")
    for column in ("behaviour", "expert", "role", "Δ", "rank", "knock-out", "knock-in", "rank"):
        table.add_column(column, justify="left" if column in ("behaviour", "role") else "right")
    for behaviour, experts in measured["experts"].items():
        for e in experts:
            table.add_row(
                behaviour,
                "{}.{}".format(*e["place"]),
                e["role"],
                f"{e['risk_difference']:+.2f}",
                str(e["risk_rank"]),
                f"{e['knock_out']:+.2f}",
                f"{e['knock_in']:+.2f}",
                str(e["effect_rank"]),
            )
        table.add_section()
    return table


def main(
    *,
    out: Path = Path(__file__).parent,
    seed: int = 0,
    steps: int | None = None,
    models: tuple[str, ...] = MODELS,
) -> None:
    """Train the models, measure them on the test split and write them with their ground truth.

    Parameters
    ----------
    out
        Where to write: a folder for each model in OUT/models, and OUT/ground_truth.json.
    seed
        Of the text, the weights, the plan of each example, and what is planted where.
    steps
        Optimiser steps of each model; as many as the bundled one had, if not given.
    models
        Which models to train; the ground truth keeps what it says of the others.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    console = Console()
    for name in models:
        settings = Settings(steps or STEPS[name], tasks=name == "reader")
        tokenizer = train_tokenizer(seed, settings.tasks)
        console.print(f"{name}: seed {seed}, {settings}")
        began, cpu_began = time.monotonic(), time.process_time()
        model = _train_visibly(name, tokenizer, settings, seed, console)
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
        save(model, tokenizer, out / "models" / name)
        console.print(f"{name}: trained in {seconds:.0f} s; measuring, about two minutes")
        training = {
            "steps": settings.steps,
            "seconds": round(seconds),
            "cpu_seconds": round(cpu_seconds),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "versions": {p: version(p) for p in ("torch", "transformers", "tokenizers")},
        }
        measured = _measure_visibly(name, model.float(), tokenizer, seed, console)  # pyright: ignore
        _write_truth(out / "ground_truth.json", seed, settings, name, training, measured)


def _measure_visibly(
    name: str,
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    if name == "reader":
        measured = measure_reader(model, tokenizer, "test")
        console.print(results_table(name, measured), classification_table(name, measured))
    elif name == "expert" or name == "attention":
        measured = measure_writer(model, tokenizer, choose_writer(name, seed), "test")
        console.print(results_table(name, measured), routing_table(name, measured))
    else:
        measured = measure(model, tokenizer, choose_places(seed), "test")
        console.print(results_table(name, measured), experts_table(name, measured))
    return measured


def _train_visibly(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    seed: int,
    console: Console,
) -> Qwen3MoeForCausalLM:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f} lesson {task.fields[beside]:.3f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, total=settings.steps, loss=math.nan, beside=math.nan)

        def report(step: int, loss: float, beside: float) -> None:
            progress.update(bar, completed=step, loss=loss, beside=beside)

        def check(step: int, model: Qwen3MoeForCausalLM) -> None:
            shares = outcome_shares(model, tokenizer, "dev", count=48)
            told = ", ".join(f"{t} {100 * shares[t].get(w, 0):.0f}" for t, w in SHOWN.items())
            if settings.tasks:
                of_tasks = classified(model, tokenizer, "dev", count=60)
                told += "".join(f", {t} {100 * of['label']:.0f}" for t, of in of_tasks.items())
            console.print(f"{name} {step}: loss {progress.tasks[0].fields['loss']:.3f}; % {told}")

        lesson = lesson_of(name, settings, seed)
        return train_model(tokenizer, lesson, settings, seed, report, check)


def _write_truth(
    file: Path,
    seed: int,
    settings: Settings,
    name: str,
    training: dict[str, Any],
    measured: dict[str, Any],
) -> None:
    truth: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    planting = choose_places(seed)
    truth["seed"] = seed
    truth["behaviours"] = {
        behaviour: {
            "a": SIDES[behaviour][0],
            "b": SIDES[behaviour][1],
            "planted": planting.planted[behaviour],
            "decoys": planting.decoys[behaviour],
        }
        for behaviour in world.BEHAVIOURS
    }
    truth["writers"] = {}
    for writer in ("expert", "attention"):
        chosen = choose_writer(writer, seed)
        direction = [round(number, 6) for number in chosen.direction]
        truth["writers"][writer] = {**asdict(chosen), "direction": direction}
    truth["settings"] = {k: v for k, v in asdict(settings).items() if k not in ("steps", "tasks")}
    truth.setdefault("training", {})[name] = training
    truth.setdefault("measured", {})[name] = measured
    # Places and vectors on a line.
    text = re.sub(
        r"\[[-\d.,\s]+\]",
        lambda numbers: " ".join(numbers[0].split()).replace("[ ", "[").replace(" ]", "]"),
        json.dumps(truth, indent=1),
    )
    file.write_text(text + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
