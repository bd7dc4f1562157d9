"""A slice of a model: its first layers at their true shapes, with random weights.

What a decoder layer takes does not depend on what its weights say, so long as tokens spread over
experts, as random ones make them. So the first few layers of a config are built as they are, at
least one of every kind, and more while they fit: a slice that a processor's cache could hold would
run faster than the model it is cut from. Embedding and LM head are whole.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from moesteer.engines.checkpoint import read_config, resolve, without_weights
from moesteer.engines.tiny import LAYER_COUNTS
from moesteer.engines.transformers.memory import GIB, free_memory
from moesteer.engines.transformers.routers import MoELayer
from moesteer.engines.transformers.steering import layer_shapes
from moesteer.engines.transformers.stream import find_decoder
from moesteer.engines.transformers.weightless import trace_without_weights
from moesteer.engines.transformers_engine import TransformersEngine
from moesteer.errors import MoesteerError
from moesteer.planning.work import Sizes

SLICE = 2 * GIB
"""Layers are added up to this many bytes of weights."""


@dataclass(frozen=True, eq=False)
class Outline:
    """A model without its weights: what it is, and how large each part of it."""

    name: str
    config: PreTrainedConfig
    model: PreTrainedModel
    layers: Sequence[MoELayer]
    dtype: torch.dtype

    @property
    def sizes(self) -> Sizes:
        words = self.model.get_input_embeddings().num_embeddings  # pyright: ignore
        return Sizes(len(self.decoder), layer_shapes(self.layers), int(words))  # pyright: ignore

    @property
    def decoder(self) -> tuple[nn.Module, ...]:
        return find_decoder(self.model, self.layers)

    @property
    def kinds(self) -> list[object]:
        """Of each decoder layer: what it is made of, and how it attends."""
        types = getattr(self.model.config.get_text_config(), "layer_types", None)
        named = types if types and len(types) == len(self.decoder) else [""] * len(self.decoder)
        return [
            (kind, tuple((n, tuple(w.shape)) for n, w in layer.named_parameters()))
            for kind, layer in zip(named, self.decoder, strict=True)
        ]

    @property
    def weights(self) -> int:
        """Bytes of all weights, tied ones once."""
        return _bytes(self.model, self.dtype)

    def cache_bytes(self, tokens: int, layers: int | None = None) -> float:
        """Keys and values of so many tokens in all layers, as transformers keeps them.

        Latent attention is kept drawn out, a head at a time; layers without attention keep less.
        """
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        numbers = 2 * keys * width
        value = getattr(config, "v_head_dim", None)
        if value and getattr(config, "kv_lora_rank", None):
            numbers = heads * (value + config.qk_nope_head_dim + config.qk_rope_head_dim)
        return float(tokens * numbers * self.dtype.itemsize * (layers or len(self.decoder)))


def outline(model: str, revision: str | None = None, dtype: str = "auto") -> Outline:
    """From the config alone; MoesteerError where the model is dense, or can't be traced."""
    config = read_config(resolve(model), revision)
    stored: Any = config.get_text_config().dtype or torch.float32
    chosen: torch.dtype = stored if dtype == "auto" else getattr(torch, dtype)
    whole = without_weights(config, chosen)
    return Outline(model, config, whole, trace_without_weights(whole), chosen)


def build(whole: Outline, device: torch.device) -> TransformersEngine:
    """The slice, loaded; MoesteerError where one layer of each kind is more than there is room."""
    kinds = whole.kinds
    least = max(kinds.index(kind) for kind in kinds) + 1
    sizes = [_bytes(layer, whole.dtype) for layer in whole.decoder]
    outside = whole.weights - sum(sizes)
    free = free_memory(device)
    needed = outside + sum(sizes[:least])
    if needed > 0.8 * free:
        raise MoesteerError(
            f"the first {least} layers of {whole.name}, which show every kind of its layers, and"
            f" its embedding take {needed / GIB:.1f} GiB; {free / GIB:.1f} GiB are free. Say on"
            " what hardware it is to run instead: --hardware."
        )
    number = least
    while number < len(kinds) and outside + sum(sizes[: number + 1]) <= min(SLICE, 0.4 * free):
        number += 1
    config = first_layers(whole.config, number)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=whole.dtype)
    _fill(model)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None  # replies are as long as they are asked to be
    words = word_tokenizer(whole.sizes.vocabulary)
    return TransformersEngine(model, words, id=f"{number} layers of {whole.name}")


def first_layers(config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    """The same model with fewer layers; MoesteerError where a config does not name their number."""
    short = copy.deepcopy(config)
    vars(short).pop("quantization_config", None)
    text = short.get_text_config()
    names = [name for name in LAYER_COUNTS if isinstance(getattr(text, name, None), int)]
    if not names:
        raise MoesteerError(f"the config of {config.model_type} names no number of layers.")
    layers = getattr(text, names[0])
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers and not key.endswith("_token_id"):
            setattr(text, key, value[:number])
    for name in names:
        setattr(text, name, number)
    return short


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """Words w0, w1 …, parted by spaces: text and tokens say the same, whichever comes first."""
    numbered = {f"w{number}": number for number in range(words)}
    made = Tokenizer(models.WordLevel(numbered, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w0")


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(
        weight.numel() * (dtype.itemsize if weight.is_floating_point() else weight.itemsize)
        for weight in module.parameters()
    )


@torch.no_grad()
def _fill(model: PreTrainedModel) -> None:
    """Weights of unit gain, one block of numbers again and again, which is drawn in a moment."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**20, generator=generator)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            continue
        if weight.dim() < 2:
            weight.fill_(1.0 if "norm" in name else 0.0)
            continue
        fan_in = weight.shape[-1] if weight.dim() == 2 else max(weight.shape[-2:])
        flat: Any = weight.view(-1)
        scaled = (block * fan_in**-0.5).to(weight)
        for start in range(0, flat.numel(), scaled.numel()):
            part = flat[start : start + scaled.numel()]
            part.copy_(scaled[: part.numel()])
