"""Each process of a group: `python split.py OUT`, with RANK, WORLD_SIZE and the like set.

Loads models split both ways; the first process writes down what they say.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from spread_out import attribution, routing
from transformers import Qwen3MoeConfig
from transformers.utils.logging import disable_progress_bar

from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers.splitting import Split
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError

SPLITS: tuple[Split, ...] = ("tensor", "expert")
OTHERS = ("gpt_oss", "deepseek_v3")


def said_of(split: Split, folder: Path) -> dict[str, object]:
    engine = load_transformers("testbed", dtype="float32", split=split)
    facts = engine.facts
    experts = engine.model.get_submodule("model.layers.0.mlp.experts")
    found: dict[str, object] = {key: plain(value) for key, value in routing(engine).items()}
    found["facts"] = [facts.config_hash, *facts.layer_norms, *facts.router_norms]
    found["share"] = [list(weight.to_local().shape) for weight in experts.parameters()]  # pyright: ignore
    found["refused"] = refusal_of(lambda: attribution(engine))
    for name in OTHERS:
        found[name] = dummy_counts(load_transformers(str(folder / name), split=split))
    found["uneven"] = refusal_of(lambda: load_transformers(str(folder / "uneven"), split=split))
    return found


def dummy_counts(engine: TransformersEngine) -> object:
    from moesteer.engines.transformers.steering import count_dummy_selections

    counts = count_dummy_selections(engine.model, engine.layers)
    return [counts[layer.layer].table()[0].tolist() for layer in engine.layers]


def refusal_of(work) -> str:
    try:
        work()
    except MoesteerError as error:
        return str(error)
    return ""


def plain(value):
    return value.tolist() if hasattr(value, "tolist") else value


def make_models(folder: Path) -> None:
    """Tiny models of other families, and one whose heads don't share out between two."""
    from test_transformers_engine import tokenizer

    uneven = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,  # pyright: ignore[reportCallIssue]
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    for name, what in [(name, name) for name in OTHERS] + [("uneven", uneven)]:
        model = tiny_model(what) if isinstance(what, str) else _bare(what)
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)


def _bare(config: Qwen3MoeConfig):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def main(out: str) -> None:
    warnings.simplefilter("ignore")
    disable_progress_bar()
    folder = Path(out).parent
    found = {split: said_of(split, folder) for split in SPLITS}
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
