"""Tiny random models with a habit: to some prompts they reply with one token, to others not.

Their LM head is scaled up, so that one token is all but certain after every prompt, and which one
depends on the prompt. What replies begin with the commonest of them is the behaviour, and the
prompts are sorted by it with plain torch.
"""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conftest import write_model
from moesteer.contrast import Message
from moesteer.directions.prompts import PromptSets, draw_sets
from moesteer.directions.refusal import prepare_sets
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.generate import Prompt

SHARPNESS = 6.0
WORDS = "one two three four five six seven eight nine ten sure never yes no tell me".split()


FOLDER = tempfile.TemporaryDirectory(prefix="made-models-")


@dataclass(frozen=True)
class Habit:
    """A model's folder, its first token's text, and the prompts that are and aren't answered so."""

    folder: Path
    token: int
    word: str
    a: list[str]
    b: list[str]


def rendered(prompt: str) -> str:
    """By hand what conftest's chat template makes of a prompt."""
    return f"<|user|>{prompt}<|end|><|assistant|>"


@dataclass(frozen=True)
class Made:
    """A model with a habit, loaded, and its prompts as sets that are ready to be fitted on."""

    engine: TransformersEngine
    habit: Habit
    sets: PromptSets


def as_prompts(texts: list[str], name: str) -> list[Prompt]:
    return [Prompt((Message("user", text),), f"{name}:{n}") for n, text in enumerate(texts, 1)]


@cache
def made_sets(dense: bool) -> Made:
    """Eight prompts a side to fit on and four to choose on, filtered."""
    habit = with_habit(dense)
    engine = load_transformers(str(habit.folder), dense=dense)
    a, b = as_prompts(habit.a, "a.txt"), as_prompts(habit.b, "b.txt")
    sets = draw_sets(engine, a, b, fit=8, validate=4, seed=1)
    return Made(engine, habit, prepare_sets(engine, sets, batch_size=5))


@cache
def with_habit(dense: bool) -> Habit:
    """A Qwen3-MoE (4 layers), or a dense Llama (3 layers), with a habit."""
    folder = write_model(Path(FOLDER.name) / ("dense" if dense else "moe"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if dense:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=0.3,
            )
            LlamaForCausalLM(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [f"Tell me {x}, {y} {z}." for x in WORDS for y in WORDS[:5] for z in WORDS[9:12]]
    with torch.no_grad():
        model.lm_head.weight *= SHARPNESS
        model.save_pretrained(folder)
        first = []
        for prompt in prompts:
            ids = tokenizer(rendered(prompt), return_tensors="pt").input_ids
            logits = model(ids).logits[0, -1]
            first.append(int(logits.argmax()) if logits.softmax(-1).max() > 0.6 else -1)
    words = [int(t) for t in set(first) if t >= 0 and tokenizer.decode([t]).strip().isascii()]
    words = [
        t for t in words if tokenizer.decode([t]).strip() and t not in tokenizer.all_special_ids
    ]
    token = max(words, key=first.count)
    a = [p for p, f in zip(prompts, first, strict=True) if f == token]
    b = [p for p, f in zip(prompts, first, strict=True) if f not in (token, -1)]
    return Habit(folder, token, tokenizer.decode([token]), a, b)
