"""Can this model be steered? Answered from its config, on a tiny random model of its architecture.

What decides is the architecture's code, not its weights: where the router sits, what its top-k
sorts, whether the experts obey. So the config is shrunk, a random model built and put through the
seam's self-test, and nobody downloads 60 GB to learn that a model is not supported. Quantised or
replaced blocks show only on the real weights: `load=True`.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from moesteer.engines.checkpoint import read_config, resolve, without_weights
from moesteer.engines.tiny import tiny_model
from moesteer.engines.transformers.routers import find_routers
from moesteer.engines.transformers.steering import checked_layers
from moesteer.engines.transformers_engine import load_transformers

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "moe_top_k", "top_k")


@dataclass(frozen=True)
class Examination:
    """What was found; `experts` and `top_k` are those of the config, None where it names none."""

    model: str
    model_type: str
    family: str
    layers: tuple[int, ...]
    experts: int | None
    top_k: int | None
    tested_on: str
    quantised: str | None


def examine(model: str, *, load: bool = False, revision: str | None = None) -> Examination:
    """Test the seam for a model; MoesteerError says why it can't be steered."""
    config = read_config(resolve(model), revision)
    text = config.get_text_config()
    quantised = getattr(config, "quantization_config", None)
    if load:
        engine = load_transformers(model, revision=revision)
        found, numbers = engine.layers, tuple(layer.layer for layer in engine.layers)
        tested_on = "the loaded weights"
    else:
        numbers = tuple(router.layer for router in find_routers(without_weights(config)))
        found = checked_layers(tiny_model(config))
        tested_on = "a tiny random model of this architecture"
    return Examination(
        model=model,
        model_type=text.model_type,
        family="; ".join(dict.fromkeys(layer.family for layer in found)),
        layers=numbers,
        experts=found[0].num_experts if load else _entry(text, EXPERTS),
        top_k=found[0].top_k if load else _entry(text, TOP_K),
        tested_on=tested_on,
        quantised=_method(quantised),
    )


def _entry(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _method(quantisation: object) -> str | None:
    if quantisation is None:
        return None
    entries = quantisation if isinstance(quantisation, dict) else vars(quantisation)
    return str(entries.get("quant_method", "yes"))
