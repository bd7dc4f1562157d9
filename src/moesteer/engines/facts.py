"""What a profile knows its model by: the facts of a loaded model, and of one that is not loaded.

Engines that don't hold a model as transformers does (or not in this process) say the very same
facts of it, so that a profile fits whichever engine runs its model. They come from the config,
traced without weights, and from the files of the checkpoint, read a parameter at a time.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moesteer.engines.checkpoint import (
    commit_of,
    read_config,
    read_tokenizer,
    resolve,
    weight_files,
    without_weights,
)
from moesteer.engines.stored_weights import StoredWeights, stored_dtype
from moesteer.engines.transformers.routers import MoELayer, is_dense
from moesteer.engines.transformers.steering import layer_shapes
from moesteer.engines.transformers.stream import find_decoder
from moesteer.engines.transformers.weightless import trace_without_weights
from moesteer.model_facts import ModelFacts

HASHED_CONFIG = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
"""The config entries that make two models the same for a profile. Not the whole config: each
version of transformers writes other defaults into it."""

PIECE = 2**24
"""How many weights are squared at a time, in 64 bits each."""

Weights = Callable[[str], Iterable[tuple[str, Tensor | None]]]
"""The parameters of the module of a name, each by its own; None for one that can't be read."""


def facts_of_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[MoELayer],
    *,
    id: str,
    revision: str | None = None,
) -> ModelFacts:
    """The facts of a loaded model.

    Weights that are offloaded are read from the files it was loaded from; without safetensors files
    there are no norms. Of a model that is split over processes, all of them must ask.
    """
    stored = cache(lambda: StoredWeights(model, weight_files(str(model.name_or_path), revision)))

    def weights(module: str) -> Iterable[tuple[str, Tensor | None]]:
        offloaded: set[str] = set()
        for name, weight in model.get_submodule(module).named_parameters(prefix=module):
            if weight.is_meta:
                offloaded.add(name)
            else:
                yield name, weight.detach()
        if offloaded:
            yield from ((n, weight) for n, weight in stored().under(module) if n in offloaded)

    return _facts(model, tokenizer, layers, weights, id, revision)


def facts_of_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    dense: bool = False,
) -> ModelFacts:
    """The facts that `TransformersEngine` would say of a model, without loading it.

    Memory for the largest single parameter is enough, experts counted one by one. The files of a
    model on the Hub are downloaded if they aren't in its cache. Norms that the files don't show are
    left out: all of them without safetensors files of the names and shapes that transformers reads,
    those of the layers where weights are quantised (their routers seldom are).

    Raises MoesteerError where transformers has no config, architecture or tokenizer for the model,
    or its routing can't be read; with `dense`, a model without experts will do.
    """
    path = resolve(model)
    config = read_config(path, revision)
    commit = commit_of(path, revision)
    files = weight_files(path, commit or revision)  # of the config's own commit, not a later one
    outline = without_weights(config)
    if files and outline.config.dtype is None:
        outline = without_weights(config, stored_dtype(files[0]))
    return _facts(
        outline,
        read_tokenizer(path, revision, chat_template),
        [] if dense and is_dense(outline) else trace_without_weights(outline),
        StoredWeights(outline, files).under,
        model,
        revision or commit,
    )


def _facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[MoELayer],
    weights: Weights,
    id: str,
    revision: str | None,
) -> ModelFacts:
    config = model.config.get_text_config()
    shapes = layer_shapes(layers)
    entries = {key: _entry(config, key) for key in HASHED_CONFIG}
    entries["layers"] = [[s.layer, s.experts, s.top_k] for s in shapes]
    words = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    squares = [_squares(model, layer, weights) for layer in layers]
    if not layers:
        squares = [(0.0, _dense_square(layer)) for layer in find_decoder(model, layers)]
    return ModelFacts(
        id=id,
        revision=revision,
        model_type=config.model_type,
        config_hash=_hash(json.dumps(entries, sort_keys=True)),
        tokenizer_hash=_hash(words + str(tokenizer.chat_template)),
        family="; ".join(dict.fromkeys(layer.family for layer in layers)),
        layers=shapes,
        router_norms=_norms([router for router, _ in squares]) if layers else (),
        layer_norms=_norms([rest for _, rest in squares]),
        dtype=str(model.dtype).removeprefix("torch."),
        decoder_layers=_number(config, "num_hidden_layers"),
        hidden=_number(config, "hidden_size"),
    )


def _entry(config: PreTrainedConfig, key: str) -> object:
    """A config's entry; None where it has none, or another one for each layer."""
    try:
        return getattr(config, key, None)
    except Exception:  # configs of unequal layers refuse to name one value for all
        return None


def _number(config: PreTrainedConfig, key: str) -> int:
    value = _entry(config, key)
    return value if isinstance(value, int) else 0


def _norms(squares: Sequence[float | None]) -> tuple[float, ...]:
    """The root of each layer's square; none at all where some could not be read."""
    return tuple(s**0.5 for s in squares if s is not None) if None not in squares else ()


def _squares(
    model: PreTrainedModel, layer: MoELayer, weights: Weights
) -> tuple[float | None, float | None]:
    """Sums of squares: of the router's weights, and of the decoder layer's other floating ones."""
    number = layer.name.split(".").index(str(layer.layer))
    name = ".".join(layer.name.split(".")[: number + 1])
    parameters = dict(model.get_submodule(name).named_parameters(prefix=name))
    of_router = {id(weight) for weight in layer.module.parameters()}
    router: dict[str, float | None] = {}
    rest: dict[str, float | None] = {}
    for own_name, parameter in parameters.items():
        if id(parameter) in of_router:
            router[own_name] = None
        elif parameter.is_floating_point():
            rest[own_name] = None
    for own_name, weight in weights(name):
        for squares, square in ((router, _router_square), (rest, _rest_square)):
            if own_name in squares and weight is not None:
                squares[own_name] = square(weight)
    return _total(router), _total(rest)


def _router_square(weight: Tensor) -> float:
    """Rows are weighted from 1 to 2 along the experts."""
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    squares = weight.double().cpu().square()
    if weight.dim() < 2:
        return float(squares.sum())
    rows = torch.linspace(1, 2, weight.shape[0], dtype=torch.float64)
    return float((squares.flatten(1).sum(-1) * rows).sum())


def _rest_square(weight: Tensor) -> float:
    """Of tensors that stack all experts only the first counts: enough to tell, and quick."""
    part = weight[0] if weight.dim() > 2 else weight
    if isinstance(part, DTensor):  # a share of it lies in each process
        part = part.full_tensor()
    pieces = part.flatten().split(PIECE)
    return sum(float(piece.double().square().sum()) for piece in pieces)


def _dense_square(layer: nn.Module) -> float | None:
    """Of a decoder layer without a router."""
    weights = [weight for weight in layer.parameters() if weight.is_floating_point()]
    return (
        None if any(w.is_meta for w in weights) else sum(_rest_square(w.detach()) for w in weights)
    )


def _total(squares: dict[str, float | None]) -> float | None:
    known = [square for square in squares.values() if square is not None]
    return sum(known) if len(known) == len(squares) else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
