"""Work whose size is known to the token, and a count of what really goes through a model."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from moesteer.contrast import ContrastPair, parse_pair
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.evaluation.cards import Card, read_card
from moesteer.planning.sliced import Outline, build, outline

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


def write_config(folder: Path, **entries: Any) -> Path:
    """A Qwen3-MoE of 4 layers and 8 experts (k = 3), the first layer dense, as a config alone."""
    sizes: dict[str, Any] = {
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
        "dtype": "float32",
    }
    Qwen3MoeConfig(**sizes | entries).save_pretrained(folder)
    return folder


def built(folder: Path) -> tuple[Outline, TransformersEngine]:
    """The model of a config, whole; it speaks in words w0 to w999, and never comes to an end."""
    whole = outline(str(folder))
    engine = build(whole, torch.device("cpu"))
    engine.tokenizer.chat_template = TEMPLATE
    return whole, engine


def sentence(number: int, length: int) -> str:
    return " ".join(f"w{1 + (7 * number + 13 * i) % 900}" for i in range(length))


def pairs_of(number: int, tokens: int, prompt: int) -> list[ContrastPair]:
    """Pairs of `tokens` a side that part after `prompt` of them."""
    return [
        parse_pair(
            {
                "prompt": sentence(i, prompt),
                "a": " ".join(["w901"] * (tokens - prompt)),
                "b": " ".join(["w902"] * (tokens - prompt)),
            },
            f"pair {i}",
        )
        for i in range(number)
    ]


def tasks_of(folder: Path, prompt: int, names: Sequence[str]) -> tuple[list[Card], dict[str, str]]:
    """Tasks of prompts of so many tokens, the first the target; and where their prompts are."""
    cards, data = [], {}
    for name in names:
        role = "price" if cards else "target"
        cards.append(
            replace(read_card("harmless-100"), name=name, role=role, outcome="non-response")
        )
        file = folder / f"{name}.jsonl"
        lines = [{"prompt": f"{sentence(i, prompt - 1)} w{950 + len(cards)}"} for i in range(400)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        data[name] = str(file)
    return cards, data


@contextmanager
def token_layers(engine: TransformersEngine) -> Iterator[list[int]]:
    """Tokens that enter decoder layers and are computed there, a number a call."""
    seen: list[int] = []

    def see(module: Any, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if "forward" not in module.__dict__:  # else it only hands on what it gets
            seen.append(hidden.shape[0] * hidden.shape[1])

    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in engine.model.get_submodule("model.layers").children():
            stack.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
        yield seen
